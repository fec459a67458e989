"""The notebook API for autoregressive models: prompts in, completions with statistics out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from decode.core.requests import round_batch
from decode.core.sampling import Sampling
from decode.generate import PROMPT_BUCKET, Completion, Prompt, encode, is_single
from decode.speculative.accept import AcceptanceRule, Match
from decode.speculative.contracts import Drafter
from decode.speculative.drafters.no_draft import NoDraft
from decode.speculative.loop import (
    SpeculativeMethod,
    SpeculativeState,
    decode,
    init_state,
    prefill,
)
from dlm.lm import LanguageModel

STOP_ROUNDS = 16  # after so many rounds, texts are searched for stop strings


def complete(
    lm: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    drafter: Drafter = NoDraft(),  # noqa: B008  components are immutable
    acceptance: AcceptanceRule = Match(),  # noqa: B008
    gen_len: int | Sequence[int] = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
) -> Any:
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
      drafter: who proposes, see `decode/drafters`.
      acceptance: which drafts are kept, see `decode.speculative.accept`. `Match` is right for every
        drafter; for drafts that are drawn (`is_sampled`) `SpeculativeSampling` accepts more.
      gen_len: most tokens to write, end-of-text included, for all or per prompt.
      temperature: 0: arg-max.
      top_k, top_p, min_p, repetition_penalty: see `decode.core.sampling`.
      stop: strings that end a text; the text is cut before the first of them.
      stop_ids: tokens that end a text, besides the model's end-of-text.
      seed: one number (prompt i then uses seed + i) or one per prompt.

    Returns:
      A `Completion`, or a list of them if `prompts` is a list of prompts. Its `tokens` end before
      end-of-text and stop tokens; `finish_reason` is "eos" (either of these), "stop" (a string) or
      "length".

    Raises:
      ValueError: on prompts, lengths or options that make no sense, in one sentence.
      TypeError: if `prompts` is neither text nor token ids.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    if stops and lm.tokenizer is None:
        raise ValueError("stop has strings but the checkpoint has no tokenizer: use stop_ids")
    if not all(stops):
        raise ValueError("stop has an empty string, which is found everywhere: remove it")
    single = is_single(prompts)
    requests: Any = [prompts] if single else prompts
    encoded = [encode(lm, prompt) for prompt in requests]
    sampling = Sampling(
        temperature=None if temperature == 0 else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    method = SpeculativeMethod(drafter, acceptance, sampling, tuple(stop_ids))
    longest = max(map(len, encoded), default=0)
    lengths = [gen_len] if isinstance(gen_len, int) else list(gen_len)
    bucket = -(-max(longest, 1) // PROMPT_BUCKET) * PROMPT_BUCKET
    limit = lm.cfg.max_seq_len - max(lengths, default=0)
    with contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh):
        state = init_state(
            lm.cfg,
            method,
            encoded,
            gen_len=gen_len,
            seeds=seed,
            prompt_len=max(longest, min(bucket, limit)),
            batch_size=round_batch(len(encoded)),
        )
        state = prefill(lm.params, lm.cfg, method, state)
        if not stops:
            state = decode(lm.params, lm.cfg, method, state)
        while stops and not bool(state.has_stopped.all()):
            state = decode(lm.params, lm.cfg, method, state, STOP_ROUNDS)
            has_stop = [_cut(text, stops) < len(text) for text in _texts(state, lm)]
            state = state.replace(has_stopped=state.has_stopped | np.array(has_stop))
    completions = collect(state, lm, method, stops, num=len(encoded))
    return completions[0] if single else completions


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
        text = None
        if lm.tokenizer is not None:
            text = lm.tokenizer.decode([int(t) for t in canvas[:n]])
            if (place := _cut(text, stops)) < len(text):
                text, reason = text[:place], "stop"
                n = next(
                    k for k in range(n + 1)
                    if len(lm.tokenizer.decode([int(t) for t in canvas[:k]])) >= place
                )  # fmt: skip
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
        lm.tokenizer.decode([int(t) for t in row[first:last]])
        for row, first, last in zip(tokens, start, length, strict=True)
    ]


def _cut(text: str, stops: Sequence[str]) -> int:
    """Where the first stop string begins; the text's length if there is none."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, default=len(text))
