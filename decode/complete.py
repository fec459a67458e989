"""The notebook API for autoregressive models: prompts in, completions with statistics out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard, Unpack, cast, overload

import numpy as np
from tqdm import tqdm

from decode.constraints.hosted import HostConstraint
from decode.constraints.monitors.contracts import Monitor
from decode.constraints.monitors.watched import watch
from decode.core.component import entry
from decode.core.requests import (
    ManyPrompts,
    OnePrompt,
    Prompt,
    read_requests,
    read_stop_ids,
    whole_number,
)
from decode.core.results import (
    Completion,
)
from decode.core.streaming import Piece, stream_answer
from decode.core.texts import (
    Asked,
    Loop,
    MethodOptions,
    TextOptions,
    check_known,
    gather,
    gather_samples,
    inside,
    read_asked,
    read_sampling,
)
from decode.diffusion.contracts import Constraint
from decode.search import answers as search
from decode.search import hosted as hosted_search
from decode.search.astar import AStar
from decode.search.components import METHODS as SEARCHES
from decode.search.loop import SearchMethod
from decode.search.planner import Planner
from decode.speculative import answers, hosted, pearl
from decode.speculative.accept import AcceptanceRule
from decode.speculative.contracts import Drafter
from decode.speculative.controller import Controller
from decode.speculative.loop import SpeculativeMethod
from decode.speculative.points import METHODS as DRAFTED
from dlm.lm import LanguageModel

NO_STOPS = "a search whose texts may all change looks for no strings, only for stop_ids"
PLANNERS: dict[str, Planner] = {"a_star": AStar()}  # searches on the host that need nothing more
AnyMethod = SpeculativeMethod | SearchMethod | Planner
AnyConstraint = Constraint | Monitor | HostConstraint


class Choices(MethodOptions, total=False):
    """The keyword arguments of `complete` that say how to decode."""

    method: str | AnyMethod | None
    drafter: Drafter | None
    acceptance: AcceptanceRule | None
    controller: Controller | None
    constraint: AnyConstraint | None


class Options(Choices, TextOptions, total=False):
    """The keyword arguments of `complete`."""


@overload
def complete(lm: LanguageModel, prompts: OnePrompt, **options: Unpack[Options]) -> Completion: ...
@overload
def complete(
    lm: LanguageModel, prompts: ManyPrompts, **options: Unpack[Options]
) -> list[Completion]: ...
def complete(
    lm: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    method: str | AnyMethod | None = None,
    drafter: Drafter | None = None,
    acceptance: AcceptanceRule | None = None,
    gen_len: int | Sequence[int] = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    epsilon_cutoff: float | None = None,
    eta_cutoff: float | None = None,
    repetition_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    num_return: int = 1,
    top_logprobs: int = 0,
    controller: Controller | None = None,
    constraint: AnyConstraint | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Completion | list[Completion]:
    """Writes on with an autoregressive model, several tokens per forward where a drafter helps.

    The text does not depend on the drafter: at temperature 0 it is the greedy one, token for token,
    else it follows the same distribution (except with `Typical`). The first call with a drafter and
    shapes compiles; temperatures, seeds, and prompt lengths within a bucket of 32 do not again.

    Example:
      >>> lm = dlm.load("path/to/checkpoint")
      >>> answer = complete(lm, "def fibonacci(n):", drafter=PromptLookup())
      >>> answer.text, answer.mean_acceptance_length

    Args:
      lm: from `dlm.load`; a block-diffusion model writes in blocks of one.
      prompts: a string or a list of token ids, or a list of these. Strings get what the model's
        tokenizer puts around a text; those of `lm.tokenizer.apply_chat_template`, for chat models,
        are whole. `lm.tokenizer.encode(text, plain=True)` makes text of special tokens in a text.
      method: where to start from: a name of `decode.speculative.points.METHODS` or, to search for
        texts, of `decode.search.components.METHODS` ("beam_4"), or a method; what else is given
        replaces its choices. `decode.speculative.pearl.Pearl` drafts while the model judges;
        `decode.search.astar.AStar` ("a_star") and `decode.search.pg_td.PGTD` search on the host,
        one prompt after the other. None: one token per forward.
      drafter: who proposes, see `decode/speculative/drafters`.
      acceptance: which drafts are kept, see `decode.speculative.accept`. `Match` is right for every
        drafter; for drafts that are drawn (`is_sampled`) `SpeculativeSampling` accepts more.
      gen_len: most tokens to write, end-of-text included, for all or per prompt.
      temperature: 0: the arg-max; None: the method's own, which is the arg-max but for searches
        that draw.
      top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, repetition_penalty: see
        `decode.core.sampling`.
      logit_bias: token id -> what is added to its logit.
      stop: strings that end a text, special tokens included; it is cut before the first that is
        whole.
      stop_ids: tokens that end a text, besides the model's end-of-text.
      seed: one number (prompt i then uses seed + i) or one per prompt.
      num_return: samples per prompt, in the order of their seeds, the first as if it were alone; of
        a search that draws nothing its best completions, the best first. The further ones are the
        first one's `others`.
      top_logprobs: so many of the most probable tokens are reported at each position, with their
        log-probabilities when the position was written; 0: none.
      controller: judges in every round as many drafts as pay on this device and this text, and
        asks for none if none do; `Controller()` measures once what rounds cost. None: all.
      constraint: what may be written; None: everything. A monitor, see
        `decode/constraints/monitors`, or another `decode.constraints.hosted.HostConstraint` is
        asked on the host between two rounds; of a search it may also be one of
        `decode/constraints`.
      batch_size: rows at once: those that are done make place for the next prompts; None: as many
        as there are prompts, up to 32.
      progress: whether to show a bar of prompts that are done, tokens per second and the seconds
        of compiling.

    Returns:
      A `Completion`, or a list of them if `prompts` is a list of prompts. Its `tokens` end before
      end-of-text and stop tokens; `finish_reason` is "eos" (either of these), "stop" (a string),
      "length" or, of a search that can write nothing that is allowed, "stuck".

    Raises:
      ValueError: on prompts, lengths or options that make no sense, in one sentence.
      TypeError: if `prompts` is neither text nor token ids.
    """
    found = as_finished(
        lm, prompts,
        method=method, drafter=drafter, acceptance=acceptance, temperature=temperature,
        top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p,
        epsilon_cutoff=epsilon_cutoff, eta_cutoff=eta_cutoff,
        repetition_penalty=repetition_penalty, logit_bias=logit_bias, stop_ids=stop_ids,
        top_logprobs=top_logprobs, controller=controller, constraint=constraint,
        gen_len=gen_len, stop=stop,
        seed=seed, num_return=num_return, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    return gather(prompts, found)


def as_finished(
    lm: LanguageModel, prompts: Prompt | Sequence[Prompt], **options: Unpack[Options]
) -> Iterator[tuple[int, Completion]]:
    """The number of each prompt and its completion, as they finish: decodes as it is asked.

    The arguments, and errors, are those of `complete`.
    """
    check_known("as_finished", options, Options)
    method, asked = _read(lm, prompts, options)
    if isinstance(method, Planner):
        if options.get("batch_size") is not None:
            name, size = type(method).__name__, options["batch_size"]
            raise ValueError(f"batch_size={size} must be None: {name} answers one after the other")
        read_requests(
            lm.cfg, asked.prompts, asked.gen_lens, asked.seeds, None, None, None,
            may_be_empty=False,
        )  # fmt: skip
        return inside(lm, _planned(asked, method, options.get("progress", False)))
    found = asked.as_finished(
        loop_of(method), method, options.get("batch_size"), options.get("progress", False)
    )
    if _finds_several(method):
        return found
    return gather_samples(found, options.get("num_return", 1))


def warm_up(
    lm: LanguageModel, prompts: Prompt | Sequence[Prompt], **options: Unpack[Options]
) -> float:
    """Compiles what `complete` needs for such prompts, and decodes nothing: the seconds it took.

    The arguments, and errors, are those of `complete`.
    """
    check_known("warm_up", options, Options)
    method, asked = _read(lm, prompts, options)
    if isinstance(method, Planner):
        raise ValueError(f"method={method!r} decides on the host what it needs: call complete")
    if isinstance(method, hosted.Hosted | hosted_search.HostedSearch):
        raise ValueError(
            "constraint must be None: what it says on the host decides what is needed, so call "
            "complete"
        )
    return asked.warm_up(loop_of(method), method, options.get("batch_size"))


def stream_text(
    lm: LanguageModel,
    prompt: OnePrompt,
    *,
    gen_len: int = 256,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    **choices: Unpack[Choices],
) -> Iterator[Piece]:
    """The text of `complete`, piece by piece as it is written: one per round.

    Where a search may still change all of it, the best so far is what stands `ahead`.

    Example:
      >>> for piece in stream_text(lm, "def fibonacci(n):", method="prompt_lookup"):
      ...     print(piece.text, end="", flush=True)

    Args:
      lm, prompt, gen_len, stop, seed, choices: see `complete`.

    Yields:
      What is new. The last piece has the `Completion`.

    Raises:
      ValueError: on prompts, lengths or options that make no sense, or without a tokenizer.
    """
    check_known("stream_text", choices, Choices)
    method = choose(lm, choices)
    if isinstance(method, Planner):
        raise ValueError(f"method={method!r} knows its text at the end only: call complete")
    if stop and isinstance(method, SearchMethod) and not method.strategy.commits:
        raise ValueError(f"stop={stop!r}: {NO_STOPS}")
    return stream_answer(lm, prompt, loop_of(method), method, gen_len=gen_len, stop=stop, seed=seed)


def _read(
    lm: LanguageModel, prompts: Prompt | Sequence[Prompt], options: Options
) -> tuple[AnyMethod, Asked]:
    """How to decode, and what."""
    method = choose(lm, options)
    is_open = isinstance(method, SearchMethod) and not method.strategy.commits
    if options.get("stop") and (is_open or isinstance(method, Planner)):
        raise ValueError(f"stop={options['stop']!r}: {NO_STOPS}")
    if not isinstance(method, Planner) and not _finds_several(method):
        return method, read_asked(lm, prompts, options)
    num_return = whole_number("num_return", options.get("num_return", 1))
    if num_return < 1:
        raise ValueError(f"num_return={num_return} must be at least 1")
    if isinstance(method, Planner):
        if num_return > method.num_results:
            raise ValueError(
                f"num_return={num_return} must be in [1, {method.num_results}], see num_results of "
                f"{type(method).__name__}"
            )
        return method, read_asked(lm, prompts, cast(TextOptions, {**options, "num_return": 1}))
    method = method.replace(num_return=max(num_return, method.num_return))
    return method, read_asked(lm, prompts, cast(TextOptions, {**options, "num_return": 1}))


def _finds_several(method: SpeculativeMethod | SearchMethod) -> TypeGuard[SearchMethod]:
    """Whether several completions of a prompt come from one search, and are no samples."""
    return isinstance(method, SearchMethod) and not method.strategy.draws


def loop_of(method: SpeculativeMethod | SearchMethod) -> Loop:
    """The loop that a method is for."""
    if isinstance(method, hosted_search.HostedSearch):
        return search.HOSTED_LOOP
    if isinstance(method, SearchMethod):
        return search.LOOP
    if isinstance(method, hosted.Hosted):
        return answers.HOSTED_LOOP
    return answers.PEARL_LOOP if isinstance(method, pearl.Pearl) else answers.LOOP


def choose(lm: LanguageModel, choices: Choices) -> AnyMethod:
    """The method that was asked for, see `complete`."""
    if lm.cfg.never_causal and lm.cfg.block_len is None:
        raise ValueError(
            "this is a diffusion model, which never learned to write from left to right: use "
            "decode.generate"
        )
    given: dict[str, Any] = {
        "drafter": choices.get("drafter"),
        "acceptance": choices.get("acceptance"),
        "controller": choices.get("controller"),
        "sampling": read_sampling(lm, choices) or None,
        "stop_ids": read_stop_ids(choices.get("stop_ids", ())),
        "top_logprobs": choices.get("top_logprobs") or None,
    }
    method = choices.get("method")
    if method is None:
        method = SpeculativeMethod()
    elif isinstance(method, str):
        every: dict[str, AnyMethod] = {**DRAFTED, **SEARCHES, **PLANNERS}
        method = entry(every, method)
    if isinstance(method, Planner):
        return _plan(method, given, choices)
    constraint = choices.get("constraint")
    is_on_host = isinstance(constraint, Monitor | HostConstraint)
    if isinstance(method, SearchMethod):
        if not is_on_host:
            return _search(lm, method, given | {"constraint": constraint})
        method = _search(lm, method, given)
        return hosted_search.host(method, _on_host(lm, method, constraint))
    if not isinstance(method, SpeculativeMethod):
        raise ValueError(
            f"method={method!r} must be a SpeculativeMethod or a SearchMethod, or the name of one"
        )
    method.check_kinds()
    method = method.replace(**_changes(method, given))
    method.check_kinds()
    if constraint is None:
        return method
    if not is_on_host:
        raise ValueError(
            f"constraint={constraint!r} must be a Monitor or a HostConstraint; others are for "
            "searches: give one as method, such as 'beam_4'"
        )
    if isinstance(method, pearl.Pearl):
        raise ValueError("constraint must be None with Pearl, whose rounds wait for nobody")
    return hosted.host(method, _on_host(lm, method, constraint))


def _on_host(
    lm: LanguageModel, method: SpeculativeMethod | SearchMethod, constraint: Any
) -> HostConstraint:
    """A constraint of the host, of a monitor what it allows."""
    if isinstance(constraint, Monitor):
        return watch(lm, constraint, np.ravel(method.stop_ids).astype(int).tolist())
    found: HostConstraint = constraint
    return found


def _plan(method: Planner, given: Mapping[str, Any], choices: Choices) -> Planner:
    """A search on the host with what was given beside it."""
    refused = {**given, "constraint": choices.get("constraint")}
    for name in ("drafter", "acceptance", "controller", "top_logprobs", "constraint"):
        if refused[name] is not None:
            raise ValueError(
                f"{name}={refused[name]!r} must be left out with {type(method).__name__}"
            )
    ids = given["stop_ids"]
    return method.with_choices(given["sampling"], None if ids is None else tuple(ids.tolist()))


def _changes(method: SpeculativeMethod | SearchMethod, given: Mapping[str, Any]) -> dict[str, Any]:
    """Choices that replace those of a method: of its sampling what was given, and no more."""
    some = {name: choice for name, choice in given.items() if choice is not None}
    if "sampling" in some:
        some["sampling"] = method.sampling.replace(**some["sampling"])
    return some


def _planned(asked: Asked, method: Planner, progress: bool) -> Iterator[tuple[int, Completion]]:
    """The answers of a search on the host, one prompt after the other."""
    requests = list(zip(asked.prompts, asked.gen_lens, asked.seeds, strict=True))
    every = tqdm(requests, unit="prompt", disable=not progress)
    for i, (prompt, gen_len, seed) in enumerate(every):
        first, *others = method.answer(asked.lm, prompt, gen_len, seed)
        yield i, dataclasses.replace(first, others=tuple(others))


def _search(lm: LanguageModel, method: SearchMethod, given: Mapping[str, Any]) -> SearchMethod:
    """A search with what was given beside it."""
    for name in ("drafter", "acceptance", "controller", "top_logprobs"):
        if given[name] is not None:
            raise ValueError(f"{name}={given[name]!r} is for one text at a time: a search has none")
    method.check_kinds()
    beside = {name: given.get(name) for name in ("sampling", "stop_ids", "constraint")}
    method = method.replace(**_changes(method, beside))
    method.check_kinds()
    return method.replace(strategy=method.strategy.for_model(lm))
