"""The notebook API for autoregressive models: prompts in, completions with statistics out."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack, overload

import jax
import numpy as np

from decode.core.requests import (
    ManyPrompts,
    OnePrompt,
    Prompt,
    encode,
    is_single,
    repeat_requests,
    round_batch,
    round_prompt,
)
from decode.core.results import (
    Completion,
    gather_samples,
    read_bias,
    read_stops,
    run_until,
    to_text,
)
from decode.core.sampling import Sampling
from decode.speculative.accept import AcceptanceRule
from decode.speculative.contracts import Drafter
from decode.speculative.loop import (
    SpeculativeMethod,
    SpeculativeState,
    decode,
    init_state,
    prefill,
)
from decode.speculative.points import named
from dlm.lm import LanguageModel


class Options(TypedDict, total=False):
    """The keyword arguments of `complete`."""

    method: str | SpeculativeMethod
    drafter: Drafter
    acceptance: AcceptanceRule
    gen_len: int | Sequence[int]
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str]
    stop_ids: Sequence[int]
    seed: int | Sequence[int]
    num_return: int


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
    method: str | SpeculativeMethod | None = None,
    drafter: Drafter | None = None,
    acceptance: AcceptanceRule | None = None,
    gen_len: int | Sequence[int] = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    num_return: int = 1,
) -> Completion | list[Completion]:
    """Writes on with an autoregressive model, several tokens per forward where a drafter helps.

    The text does not depend on the drafter: at temperature 0 it is the greedy one, token for token,
    else it follows the same law (except with `Typical`). The first call with a drafter and shapes
    compiles; temperatures, seeds, and prompt lengths within a bucket of 32 do not compile again.

    Example:
      >>> lm = dlm.load("path/to/checkpoint")
      >>> answer = complete(lm, "def fibonacci(n):", drafter=PromptLookup())
      >>> answer.text, answer.mean_acceptance_length

    Args:
      lm: from `dlm.load`.
      prompts: a string or a list of token ids, or a list of these. Strings are encoded as they are;
        for chat models render them with `lm.tokenizer.apply_chat_template` first.
      method: where to start from: a name of `decode.speculative.points.METHODS`, or a method; what
        else is given replaces its choices. None: one token per forward.
      drafter: who proposes, see `decode/drafters`.
      acceptance: which drafts are kept, see `decode.speculative.accept`. `Match` is right for every
        drafter; for drafts that are drawn (`is_sampled`) `SpeculativeSampling` accepts more.
      gen_len: most tokens to write, end-of-text included, for all or per prompt.
      temperature: 0: arg-max.
      top_k, top_p, min_p, repetition_penalty: see `decode.core.sampling`.
      logit_bias: token id -> what is added to its logit.
      stop: strings that end a text; the text is cut before the first of them.
      stop_ids: tokens that end a text, besides the model's end-of-text.
      seed: one number (prompt i then uses seed + i) or one per prompt.
      num_return: samples per prompt; the further ones are the first one's `others`.

    Returns:
      A `Completion`, or a list of them if `prompts` is a list of prompts. Its `tokens` end before
      end-of-text and stop tokens; `finish_reason` is "eos" (either of these), "stop" (a string) or
      "length".

    Raises:
      ValueError: on prompts, lengths or options that make no sense, in one sentence.
      TypeError: if `prompts` is neither text nor token ids.
    """
    stops = read_stops(lm, stop)
    single = is_single(prompts)
    requests: Any = [prompts] if single else prompts
    encoded, lengths, seeds = repeat_requests(
        [encode(lm, prompt) for prompt in requests], gen_len, seed, num_return
    )
    bias = read_bias(lm, logit_bias)
    sampling = Sampling(temperature or None, top_k, top_p, min_p, repetition_penalty, bias)
    given = {
        "drafter": drafter,
        "acceptance": acceptance,
        "sampling": sampling if temperature or sampling.has_filters else None,
        "stop_ids": tuple(stop_ids) or None,
    }
    if method is None:
        method = SpeculativeMethod()
    elif isinstance(method, str):
        method = named(method)
    chosen = method.replace(**{k: choice for k, choice in given.items() if choice is not None})
    with contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh):
        state = prepare(lm, chosen, encoded, gen_len=lengths, seed=seeds)
        state = run_until(
            lambda state, rounds: decode(lm.params, lm.cfg, chosen, state, rounds),
            state,
            lambda state: _texts(state, lm),
            stops,
        )
    completions = collect(state, lm, chosen, stops, num=len(encoded))
    completions = gather_samples(completions, num_return)
    return completions[0] if single else completions


def prepare(
    lm: LanguageModel,
    method: SpeculativeMethod,
    prompts: Sequence[Sequence[int]],
    *,
    gen_len: int | Sequence[int],
    seed: int | Sequence[int] = 0,
) -> SpeculativeState:
    """`init_state` with shapes rounded up, see `decode.core.requests`, and the prompts read."""
    state = init_state(
        lm.cfg,
        method,
        prompts,
        gen_len=gen_len,
        seeds=seed,
        prompt_len=round_prompt(lm.cfg, prompts, gen_len),
        batch_size=round_batch(len(prompts)),
    )
    return prefill(lm.params, lm.cfg, method, state)


def collect(
    state: SpeculativeState,
    lm: LanguageModel,
    method: SpeculativeMethod,
    stops: Sequence[str] = (),
    num: int | None = None,
) -> list[Completion]:
    """Completions of the first `num` rows of a state, fetched from the device in one go.

    Args:
      state: a finished state, or one that is under way.
      lm: for its end-of-text id and tokenizer.
      method: for its stop ids.
      stops: strings before the first of which texts are cut.
      num: how many rows; None: all.
    """
    fetched: Any = jax.device_get(state.replace(cache=None, drafter=None))
    ends = {lm.cfg.eos_token_id, *map(int, np.asarray(method.stop_ids).reshape(-1))}
    completions = []
    for b in range(len(fetched.tokens) if num is None else num):
        start, length = int(fetched.prompt_len[b]), int(fetched.length[b])
        canvas = fetched.tokens[b, start:length]
        n = len(canvas)
        reason = "length"
        if n and int(canvas[-1]) in ends:
            n, reason = n - 1, "eos"
        text, n, was_cut = to_text(lm.tokenizer, canvas[:n], stops)
        reason = "stop" if was_cut else reason
        num_forwards = int(fetched.num_forwards[b])
        log_prob = fetched.log_prob[b, : len(canvas)]
        completions.append(
            Completion(
                text=text,
                tokens=canvas[:n],
                num_forwards=num_forwards,
                tokens_per_forward=n / max(num_forwards, 1),
                finish_reason=reason,
                canvas=canvas,
                step_map=fetched.step_map[b, : len(canvas)],
                confidence=np.exp(log_prob),
                log_prob=log_prob,
                draft_forwards=int(fetched.draft_forwards[b]),
                acceptance_histogram=fetched.acceptance_histogram[b],
            )
        )
    return completions


def _texts(state: SpeculativeState, lm: LanguageModel) -> list[str]:
    assert lm.tokenizer is not None
    tokens, start, length = jax.device_get((state.tokens, state.prompt_len, state.length))
    return [
        lm.tokenizer.decode(row[first:last].tolist())
        for row, first, last in zip(tokens, start, length, strict=True)
    ]
