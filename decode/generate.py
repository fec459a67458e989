"""The notebook API of masked diffusion: prompts in, completions with statistics out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack, overload

import jax
import numpy as np

from decode.constraints.filters import Filters
from decode.constraints.token_ban import TokenBan
from decode.core.requests import (
    ManyPrompts,
    OnePrompt,
    Prompt,
    read_stop_ids,
    whole_number,
)
from decode.core.results import (
    Completion,
    to_text,
)
from decode.core.sampling import Sampling
from decode.core.streaming import Piece, stream_answer
from decode.core.texts import (
    GEN_LEN,
    Loop,
    MethodOptions,
    TextOptions,
    check_known,
    gather,
    gather_samples,
    read_asked,
    read_sampling,
)
from decode.diffusion.caches.canvas import CachePolicy
from decode.diffusion.components import FixedBlocks, by_name
from decode.diffusion.contracts import (
    CommitRule,
    Confidence,
    Constraint,
    Inputs,
    Reviser,
    Scheduler,
    Stopper,
)
from decode.diffusion.loop import DiffusionMethod, DiffusionState, decode, init_state
from decode.diffusion.method import AXES, check_axes
from decode.diffusion.points import blocks_of, complete, named
from dlm.lm import LanguageModel


class Choices(MethodOptions, total=False):
    """The keyword arguments of `generate` that say how to decode."""

    method: str | DiffusionMethod | None
    rule: CommitRule | None
    cache: str | CachePolicy | None
    confidence: str | Confidence | None
    stopper: str | Stopper | None
    scheduler: Scheduler | None
    reviser: Reviser | None
    constraint: Constraint | None
    inputs: Inputs | None
    block_len: int | Literal["auto"] | None
    guidance: float | None
    lookahead: int | None


class Options(Choices, TextOptions, total=False):
    """The keyword arguments of `generate`."""

    infill: bool


@overload
def generate(lm: LanguageModel, prompts: OnePrompt, **options: Unpack[Options]) -> Completion: ...
@overload
def generate(
    lm: LanguageModel, prompts: ManyPrompts, **options: Unpack[Options]
) -> list[Completion]: ...
def generate(
    lm: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    method: str | DiffusionMethod | None = None,
    rule: CommitRule | None = None,
    cache: str | CachePolicy | None = None,
    confidence: str | Confidence | None = None,
    stopper: str | Stopper | None = None,
    scheduler: Scheduler | None = None,
    reviser: Reviser | None = None,
    constraint: Constraint | None = None,
    inputs: Inputs | None = None,
    gen_len: int | Sequence[int] = 256,
    block_len: int | Literal["auto"] | None = "auto",
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    epsilon_cutoff: float | None = None,
    eta_cutoff: float | None = None,
    repetition_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    guidance: float | None = None,
    lookahead: int | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    num_return: int = 1,
    top_logprobs: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
    infill: bool = False,
) -> Completion | list[Completion]:
    """Decodes completions with a masked-diffusion model, many tokens per forward.

    The first call with a method and shapes compiles; thresholds, seeds, and prompt lengths within a
    bucket of 32 do not compile again.

    Example:
      >>> lm = dlm.load("path/to/checkpoint")
      >>> answer = generate(lm, "Reverse the list: a b c", method="klass", cache="dual")
      >>> answer.text, answer.num_forwards

    Args:
      lm: from `dlm.load`.
      prompts: a string or a list of token ids, or a list of these. Strings get what the model's
        tokenizer puts around a text; those of `lm.tokenizer.apply_chat_template`, for chat models,
        are whole. `lm.tokenizer.encode(text, plain=True)` makes text of special tokens in a text.
      method: where to start from: a name of `decode.diffusion.points.METHODS` ("klass"), or a
        method; what else is given replaces its choices. None: `Threshold(0.9)` in blocks, done at
        the end of the text.
      rule: which proposals to commit, e.g. `Threshold(0.9)`, `Quota(32)`.
      cache: "none", "prefix", "dual", or a cache policy. The latter two are approximations.
      confidence: "probability", "margin", "neg_entropy", "random", or a component.
      stopper: "eos" (stop at the first end-of-text; the text is the same), "filled", or a
        component.
      scheduler: which positions are eligible; default: `FixedBlocks(block_len)`, or the blocks that
        the model was trained in, with their exact cache.
      reviser: whether decided tokens may change.
      constraint: which tokens are allowed; default: all but MASK.
      inputs: what the model sees at undecided positions; default: MASK.
      gen_len: completion length in tokens, for all or per prompt.
      block_len: positions per block; "auto": the model's own if it was trained in blocks, else 32;
        None: one block. Unused with a `scheduler` or a method object.
      temperature: > 0: proposals are sampled; 0: the arg-max; None: the method's own, by default
        the arg-max.
      top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, repetition_penalty: see
        `decode.core.sampling`. They count before rules do: what is left is more probable, and so
        more is committed at once.
      logit_bias: token id -> what is added to its logit.
      guidance: classifier-free guidance scale; 0: off; None: the method's own, by default off.
      lookahead: guess so many rounds ahead and check them with one forward: the same answer with
        fewer forwards, each of them larger. Only without cache. 0: none; None: the method's own, by
        default none.
      stop: strings that end a text, special tokens included; it is cut before the first that is
        whole.
      stop_ids: tokens that end a text, besides the model's end-of-text.
      seed: one number (prompt i then uses seed + i) or one per prompt.
      num_return: samples per prompt; the further ones are the first one's `others`.
      top_logprobs: so many of the most probable tokens are reported at each position, with their
        log-probabilities when the position was written; 0: none.
      batch_size: rows at once: those that are done make place for the next prompts; None: as many
        as there are prompts, up to 32.
      progress: whether to show a bar of prompts that are done, tokens per second and the seconds
        of compiling.
      infill: whether MASK tokens inside of prompts are filled, before and while `gen_len` tokens
        (0: none) are written behind. What stands around them stays, and a text ends behind it only.
        `tokens` and `text` are then the whole text, the other arrays of a `Completion` begin at the
        prompt's first MASK.

    Returns:
      A `Completion`, or a list of them if `prompts` is a list of prompts.

    Raises:
      ValueError: on prompts, lengths or options that make no sense, in one sentence.
      TypeError: if `prompts` is neither text nor token ids.
    """
    found = as_finished(
        lm, prompts,
        method=method, rule=rule, cache=cache, confidence=confidence, stopper=stopper,
        scheduler=scheduler, reviser=reviser, constraint=constraint, inputs=inputs,
        block_len=block_len, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        typical_p=typical_p, epsilon_cutoff=epsilon_cutoff, eta_cutoff=eta_cutoff,
        repetition_penalty=repetition_penalty, logit_bias=logit_bias, guidance=guidance,
        lookahead=lookahead, stop_ids=stop_ids, top_logprobs=top_logprobs,
        gen_len=gen_len, stop=stop,
        seed=seed, num_return=num_return, batch_size=batch_size, progress=progress, infill=infill,
    )  # fmt: skip
    return gather(prompts, found)


def as_finished(
    lm: LanguageModel, prompts: Prompt | Sequence[Prompt], **options: Unpack[Options]
) -> Iterator[tuple[int, Completion]]:
    """The number of each prompt and its completion, as they finish: decodes as it is asked.

    The arguments, and errors, are those of `generate`.
    """
    check_known("as_finished", options, Options)
    asked = read_asked(lm, prompts, options, options.get("infill", False))
    method = choose(lm, options.get("gen_len", GEN_LEN), options)
    found = asked.as_finished(
        LOOP, method, options.get("batch_size"), options.get("progress", False)
    )
    return gather_samples(found, options.get("num_return", 1))


def warm_up(
    lm: LanguageModel, prompts: Prompt | Sequence[Prompt], **options: Unpack[Options]
) -> float:
    """Compiles what `generate` needs for such prompts, and decodes nothing: the seconds it took.

    The arguments, and errors, are those of `generate`.
    """
    check_known("warm_up", options, Options)
    asked = read_asked(lm, prompts, options, options.get("infill", False))
    method = choose(lm, options.get("gen_len", GEN_LEN), options)
    return asked.warm_up(LOOP, method, options.get("batch_size"))


def stream_text(
    lm: LanguageModel,
    prompt: OnePrompt,
    *,
    gen_len: int = 256,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    **choices: Unpack[Choices],
) -> Iterator[Piece]:
    """The text of `generate`, piece by piece as it becomes certain: one per round.

    Text is certain once all positions before it are decided and the reviser cannot change it any
    more; `Piece.ahead` is the canvas behind it as it is now.

    Example:
      >>> for piece in stream_text(lm, "Reverse the list: a b c", cache="dual"):
      ...     print(piece.text, end="", flush=True)

    Args:
      lm, prompt, gen_len, stop, seed, choices: see `generate`.

    Yields:
      What is new. The last piece has the `Completion`.

    Raises:
      ValueError: on prompts, lengths or options that make no sense, or without a tokenizer.
    """
    check_known("stream_text", choices, Choices)
    method = choose(lm, gen_len, choices)
    return stream_answer(lm, prompt, LOOP, method, gen_len=gen_len, stop=stop, seed=seed)


def choose(lm: LanguageModel, gen_len: int | Sequence[int], choices: Choices) -> DiffusionMethod:
    """The method that was asked for, see `generate`."""
    method, constraint = choices.get("method"), choices.get("constraint")
    asked = {name: x for name, x in read_sampling(lm, choices).items() if name != "temperature"}
    filters = Sampling(None, **asked)
    if filters.has_filters:
        if constraint is not None:
            raise ValueError(
                f"constraint={constraint} and filters, repetition_penalty or logit_bias are two "
                "constraints: give one"
            )
        had = method.constraint if isinstance(method, DiffusionMethod) else TokenBan()
        if isinstance(method, str):
            had = named(method, 1).constraint
        if not isinstance(had, TokenBan):
            raise ValueError(
                f"the method's constraint={had} and filters, repetition_penalty or logit_bias are "
                "two constraints: give one"
            )
        constraint = Filters(filters, ids=had.ids, ban_mask=had.ban_mask)
    given: dict[str, Any] = {
        **{axis: choices.get(axis) for axis in ("rule", "scheduler", "reviser", "inputs")},
        "cache": by_name("cache", choices.get("cache")),
        "confidence": by_name("confidence", choices.get("confidence")),
        "stopper": by_name("stopper", choices.get("stopper")),
        "constraint": constraint,
        "top_logprobs": choices.get("top_logprobs") or None,
        "stop_ids": read_stop_ids(choices.get("stop_ids", ())),
    }
    given = {name: choice for name, choice in given.items() if choice is not None}
    numbers: Mapping[str, Any] = choices
    off = {"temperature": None, "guidance": None, "lookahead": 0}
    given |= {k: numbers[k] or none for k, none in off.items() if numbers.get(k) is not None}
    check_axes({axis: choice for axis, choice in given.items() if axis in AXES})
    block_len = choices.get("block_len", "auto")
    if block_len == "auto":
        block_len = lm.cfg.block_len or 32
    if block_len is not None:
        block_len = whole_number("block_len", block_len)
    if method is None:
        return complete(block_len, **(blocks_of(lm.cfg, block_len) | given))
    if isinstance(method, str):
        longest = max(np.ravel(gen_len).tolist(), default=1)
        method = named(method, longest if block_len is None else block_len)
        if block_len is None and type(method.scheduler) is FixedBlocks:
            # One block, whose length need not be part of the program.
            method = method.replace(scheduler=FixedBlocks(None))
    elif not isinstance(method, DiffusionMethod):
        raise ValueError(f"method={method!r} must be a DiffusionMethod, or the name of one")
    return method.replace(**given)


def collect(
    state: DiffusionState,
    lm: LanguageModel,
    method: DiffusionMethod,
    num: int | None = None,
    stops: Sequence[str] = (),
) -> list[Completion]:
    """Completions of the first `num` rows of a state, fetched from the device in one go.

    Args:
      state: a finished state, or one that is under way.
      lm: for its end-of-text id and tokenizer.
      method: for its stop ids.
      num: how many rows; None: all.
      stops: strings before the first of which texts are cut.
    """
    P = state.prompt_len
    reported = (
        state.tokens,
        state.end,
        state.step_map,
        state.confidence,
        state.log_prob,
        state.num_forwards,
        state.top,
        state.start,
        state.given,
    )
    fetched = jax.device_get(reported)
    tokens, end, step_map, confidence, log_prob, num_forwards, top, start, given = fetched
    ends = [*lm.cfg.eos_ids, *np.asarray(method.stop_ids).tolist()]
    completions = []
    for b in range(tokens.shape[0] if num is None else num):
        length = end[b] - P
        canvas = tokens[b, P : P + length]
        steps = step_map[b, :length]
        is_end = np.isin(canvas, ends) & (steps >= 0)
        head = tokens[b, P:P]
        if given is not None:
            stays = given[b, :length]
            steps = np.where(stays, -2, steps)
            is_end &= np.cumsum(stays[::-1])[::-1] == 0  # nothing that was given follows
            head = tokens[b, start[b] : P]
        n = int(is_end.argmax()) if is_end.any() else int(length)
        whole = np.append(head, canvas[:n])
        text, num_kept, was_cut = to_text(lm.tokenizer, whole, stops)
        num_made = num_kept - len(head) - int((steps[:n] == -2).sum())
        completions.append(
            Completion(
                text=text,
                tokens=whole[:num_kept],
                num_forwards=int(num_forwards[b]),
                tokens_per_forward=num_made / max(int(num_forwards[b]), 1),
                finish_reason="stop" if was_cut else "eos" if is_end.any() else "length",
                canvas=canvas,
                step_map=steps,
                confidence=confidence[b, :length],
                log_prob=log_prob[b, :length],
                top=None if top is None else top.of_row(b, length),
            )
        )
    return completions


def _written(
    state: DiffusionState, method: DiffusionMethod
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each row what stands before the first undecided position, and the rest of the canvas.

    If the reviser may change what is decided, only what stands before the open block is certain.
    """
    P = state.prompt_len
    fetched = (state.tokens[:, P:], state.step_map, state.block_start - P, state.end - P)
    tokens, step_map, closed, end = jax.device_get(fetched)
    lengths = np.cumprod(step_map >= 0, axis=1).sum(axis=1)
    if method.reviser.changes:
        lengths = np.minimum(lengths, closed)
    rows = list(zip(tokens, np.minimum(lengths, end), end, strict=True))
    return [row[:n] for row, n, _ in rows], [row[n:stop] for row, n, stop in rows]


def _prepare(lm: LanguageModel, method: DiffusionMethod, prompts: Any, **asked: Any) -> Any:
    return init_state(lm.cfg, method, prompts, **asked)


LOOP = Loop(
    prepare=_prepare,
    decode=decode,
    reported=lambda state: state.replace(cache=None, components=None, drafts=None),
    written=_written,
    collect=collect,
    may_be_empty=lambda cfg: not cfg.shifted_logits,
)
