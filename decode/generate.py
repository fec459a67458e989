"""The notebook API: strings or token ids in, completions with their statistics out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from decode.core.requests import round_batch
from decode.diffusion.caches.canvas import CachePolicy
from decode.diffusion.components import (
    CACHES,
    CONFIDENCES,
    STOPPERS,
    FixedBlocks,
    Keep,
    MaskInputs,
    Threshold,
    TokenBan,
)
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
from dlm.config import ModelConfig
from dlm.lm import LanguageModel

PROMPT_BUCKET = 32  # prompts are padded to a multiple of this, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class Completion:
    """One decoded answer.

    Arrays have one entry per canvas position: `gen_len`, or fewer if the stopper cut the canvas
    (`Eotp`). -1 in `step_map` marks positions left undecided because the row was done before.

    Attributes:
      text: the completion as text, up to the first end-of-text token; None without a tokenizer.
      tokens: [n] int32. Token ids up to and excluding the first end-of-text token.
      num_forwards: forwards of the model made for this request (NFE).
      tokens_per_forward: n / num_forwards: end-of-text padding does not count as work done.
      finish_reason: "eos" if the model ended the text, "length" if the canvas did.
      canvas: [gen_len] int32. All completion positions.
      step_map: [gen_len] int32. The 0-based step at which each was decided.
      confidence: [gen_len] float32 in [0, 1]. Confidence at that step.
      log_prob: [gen_len] float32. Log-probability of the token at that step.
      draft_forwards: forwards of a draft model made for this request.
      acceptance_histogram: [J + 1] int32. Of `decode.complete`: how many forwards accepted 0, 1, ..
        J drafts; None elsewhere.
    """

    text: str | None
    tokens: np.ndarray
    num_forwards: int
    tokens_per_forward: float
    finish_reason: str
    canvas: np.ndarray
    step_map: np.ndarray
    confidence: np.ndarray
    log_prob: np.ndarray
    draft_forwards: int = 0
    acceptance_histogram: np.ndarray | None = None

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per forward of the target that were accepted, the one behind the drafts included.

        Not cut at the end of the text. nan without forwards, or where nothing is drafted.
        """
        if self.acceptance_histogram is None or not self.acceptance_histogram.sum():
            return float("nan")
        lengths = np.arange(1, len(self.acceptance_histogram) + 1)
        return float((self.acceptance_histogram * lengths).sum() / self.acceptance_histogram.sum())


Prompt = str | Sequence[int]


def generate(
    lm: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    rule: CommitRule = Threshold(0.9),  # noqa: B008  components are immutable
    cache: str | CachePolicy = "none",
    confidence: str | Confidence = "probability",
    stopper: str | Stopper = "eos",
    scheduler: Scheduler | None = None,
    reviser: Reviser = Keep(),  # noqa: B008
    constraint: Constraint = TokenBan(),  # noqa: B008
    inputs: Inputs = MaskInputs(),  # noqa: B008
    gen_len: int | Sequence[int] = 256,
    block_len: int | None = 32,
    temperature: float = 0.0,
    guidance: float = 0.0,
    lookahead: int = 0,
    seed: int | Sequence[int] = 0,
) -> Any:
    """Decodes completions with a masked-diffusion model, many tokens per forward.

    The first call with a method and shapes compiles; thresholds, seeds, and prompt lengths within a
    bucket of 32 do not compile again.

    Example:
      >>> lm = dlm.load("path/to/checkpoint")
      >>> answer = generate(lm, "Reverse the list: a b c", rule=Threshold(0.9), cache="dual")
      >>> answer.text, answer.num_forwards

    Args:
      lm: from `dlm.load`.
      prompts: a string or a list of token ids, or a list of these. Strings are encoded as they are;
        for chat models render them with `lm.tokenizer.apply_chat_template` first.
      rule: which proposals to commit, e.g. `Threshold(0.9)`, `Quota(32)`.
      cache: "none", "prefix", "dual", or a cache policy. The latter two are approximations.
      confidence: "probability", "margin", "neg_entropy", "random", or a component.
      stopper: "eos" (stop at the first end-of-text; the text is the same), "filled", or a
        component.
      scheduler: which positions are eligible; default: `FixedBlocks(block_len)`.
      reviser: whether decided tokens may change.
      constraint: which tokens are allowed; default: all but MASK.
      inputs: what the model sees at undecided positions; default: MASK.
      gen_len: completion length in tokens, for all or per prompt.
      block_len: positions per block; None: one block. Unused with a `scheduler`.
      temperature: 0: arg-max; > 0: proposals are sampled.
      guidance: classifier-free guidance scale; 0: off.
      lookahead: guess so many rounds ahead and check them with one forward: the same answer with
        fewer forwards, each of them larger. Only without cache.
      seed: one number (prompt i then uses seed + i) or one per prompt.

    Returns:
      A `Completion`, or a list of them if `prompts` is a list of prompts.

    Raises:
      ValueError: on prompts, lengths or options that make no sense, in one sentence.
      TypeError: if `prompts` is neither text nor token ids.
    """
    single = is_single(prompts)
    requests: Any = [prompts] if single else prompts
    encoded = [encode(lm, prompt) for prompt in requests]
    method = DiffusionMethod(
        scheduler=FixedBlocks(block_len) if scheduler is None else scheduler,
        cache=named_component("cache", cache, CACHES),
        confidence=named_component("confidence", confidence, CONFIDENCES),
        rule=rule,
        reviser=reviser,
        stopper=named_component("stopper", stopper, STOPPERS),
        constraint=constraint,
        temperature=None if temperature == 0 else temperature,
        inputs=inputs,
        guidance=None if guidance == 0 else guidance,
        lookahead=lookahead,
    )
    with contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh):
        state = prepare(lm.cfg, method, encoded, gen_len=gen_len, seed=seed)
        state = decode(lm.params, lm.cfg, method, state)
    completions = collect(state, lm, num=len(encoded))
    return completions[0] if single else completions


def prepare(
    cfg: ModelConfig,
    method: DiffusionMethod,
    prompts: Sequence[Sequence[int]],
    *,
    gen_len: int | Sequence[int],
    seed: int | Sequence[int] = 0,
) -> DiffusionState:
    """`init_state` with shapes rounded up, so that similar requests share a compilation.

    Prompt lengths go up to a multiple of 32 (never beyond the model's limit), batches as
    `round_batch` says. Rounding changes no result.
    """
    longest = max(map(len, prompts), default=0)
    lengths = [gen_len] if isinstance(gen_len, int) else list(gen_len)
    limit = cfg.max_seq_len - max(lengths, default=0)
    bucket = -(-max(longest, 1) // PROMPT_BUCKET) * PROMPT_BUCKET
    return init_state(
        cfg,
        method,
        prompts,
        gen_len=gen_len,
        seeds=seed,
        prompt_len=max(longest, min(bucket, limit)),
        batch_size=round_batch(len(prompts)),
    )


def collect(state: DiffusionState, lm: LanguageModel, num: int | None = None) -> list[Completion]:
    """Completions of the first `num` rows of a state, fetched from the device in one go.

    Args:
      state: a finished state, or one that is under way.
      lm: for its end-of-text id and tokenizer.
      num: how many rows; None: all.
    """
    P = state.prompt_len
    reported = (
        state.tokens,
        state.end,
        state.step_map,
        state.confidence,
        state.log_prob,
        state.num_forwards,
    )
    tokens, end, step_map, confidence, log_prob, num_forwards = jax.device_get(reported)
    completions = []
    for b in range(tokens.shape[0] if num is None else num):
        length = end[b] - P
        canvas = tokens[b, P : P + length]
        is_eos = (canvas == lm.cfg.eos_token_id) & (step_map[b, :length] >= 0)
        n = int(is_eos.argmax()) if is_eos.any() else int(length)
        text = None
        if lm.tokenizer is not None:
            text = lm.tokenizer.decode([int(t) for t in canvas[:n]])
        completions.append(
            Completion(
                text=text,
                tokens=canvas[:n],
                num_forwards=int(num_forwards[b]),
                tokens_per_forward=n / max(int(num_forwards[b]), 1),
                finish_reason="eos" if is_eos.any() else "length",
                canvas=canvas,
                step_map=step_map[b, :length],
                confidence=confidence[b, :length],
                log_prob=log_prob[b, :length],
            )
        )
    return completions


def is_single(prompts: Any) -> bool:
    """Whether `prompts` is one prompt: a string, or a non-empty sequence of integers."""
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, (Sequence, np.ndarray)):
        raise TypeError(
            f"prompts is a {type(prompts).__name__}; it must be a string, a list of token ids, or "
            "a list of these"
        )
    return len(prompts) > 0 and isinstance(prompts[0], (int, np.integer))


def encode(lm: LanguageModel, prompt: Prompt) -> list[int]:
    """A prompt as token ids."""
    if isinstance(prompt, str):
        if lm.tokenizer is None:
            raise ValueError(
                "prompts are strings but the checkpoint has no tokenizer: give token ids, or load "
                "a directory that has a tokenizer.json"
            )
        return lm.tokenizer.encode(prompt)
    return [int(token) for token in prompt]


def named_component(axis: str, value: Any, table: dict[str, Any]) -> Any:
    """A component as given, or the default one of a short name."""
    if not isinstance(value, str):
        return value
    if value not in table:
        raise ValueError(f"{axis}={value!r} must be one of {sorted(table)} or a component")
    return table[value]()
