"""The masked-diffusion loop: propose at every undecided position, judge with one forward, commit.

A method is one pytree of components, one per axis:

    scheduler   which positions are eligible now?      decode/diffusion/schedulers/
    cache       which positions are recomputed?        decode/diffusion/caches/
    confidence  how sure is each proposal?             decode/diffusion/confidences/
    rule        which proposals stay?                  decode/diffusion/rules/
    reviser     may something be taken back?           decode/diffusion/revisers/
    stopper     when is a row done?                    decode/diffusion/stoppers/
    constraint  what is allowed at all?                decode/constraints/
    inputs      what is seen where nothing is decided? decode/diffusion/inputs/

Its structure picks the program; its leaves are data. `step` is one round, see
`decode.diffusion.round`. `decode` runs it in a `while_loop`; `stream` drives the same `step` from
Python.

Rows are left-padded to a common prompt length, so every completion starts at the same position, and
proceed on their own: each has its own block, its own counters, its own end. Row i of a batch gives
exactly what it gives alone.

Letters: B rows, P padded prompt length, G completion positions, S = P + G, W window positions, D
model width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from decode.core import loop
from decode.core.requests import check_tokens, read_requests
from decode.core.results import TopTokens
from decode.diffusion.lookahead import freedave_round, no_drafts
from decode.diffusion.method import DiffusionMethod
from decode.diffusion.state import DiffusionState, init_components
from decode.diffusion.step import apply, judge, mask_id
from dlm.config import ModelConfig
from dlm.params import Params

__all__ = [
    "DiffusionMethod",
    "DiffusionState",
    "check_tokens",
    "decode",
    "init_state",
    "step",
    "stream",
]


def init_state(
    cfg: ModelConfig,
    method: DiffusionMethod,
    prompts: Sequence[Sequence[int]],
    *,
    gen_len: int | Sequence[int],
    seeds: int | Sequence[int] = 0,
    prompt_len: int | None = None,
    canvas_len: int | None = None,
    batch_size: int | None = None,
    given: Sequence[Sequence[int]] | None = None,
) -> DiffusionState:
    """The state before the first round.

    Args:
      cfg: the model.
      method: how to decode; checked here.
      prompts: token ids per row, of any lengths.
      gen_len: completion length, one for all rows or one per row.
      seeds: random seed, one for all rows (row i then uses seed + i) or one per row.
      prompt_len: P >= the longest prompt; default: just that. Buckets of it save compilations.
      canvas_len: G >= the longest `gen_len`; default: just that.
      batch_size: B >= the number of prompts; the rows added are done from the start.
      given: per row, what stands at its first completion positions and stays: tokens, and MASK
        where one is to be decided, as `decode.core.requests.split_gaps` has it. None: nothing.

    Raises:
      ValueError: on an empty list, a prompt that holds MASK or ids the model does not have, lengths
        the model does not allow, or a method that makes no sense.
    """
    method.validate(cfg)
    asked = read_requests(
        cfg, prompts, gen_len, seeds, prompt_len, canvas_len, batch_size,
        may_be_empty=not cfg.shifted_logits,
    )  # fmt: skip
    P, G, B = asked.P, asked.G, asked.B
    tokens = np.full((B, P + G), cfg.pad_token_id, np.int32)
    start = np.full(B, P, np.int32)
    end = np.full(B, P, np.int32)
    for b, (prompt, length) in enumerate(zip(prompts, asked.gen_lens, strict=True)):
        start[b], end[b] = P - len(prompt), P + length
        tokens[b, start[b] : P] = prompt
        tokens[b, P : end[b]] = mask_id(cfg)
    stays = None if given is None else _lay_out(cfg, method, given, tokens[:, P:], end - P)

    return _first_state(cfg, method, tokens, start, end, asked.key, stays, P, G)


def _lay_out(
    cfg: ModelConfig, method: DiffusionMethod, given: Sequence[Sequence[int]],
    completion: np.ndarray, lengths: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Writes what is given into `completion` [B, G]; 1 where a token is, else 0: [B, G] int32."""
    if not method.cache.looks_ahead:
        raise ValueError(
            f"{method.cache.name} shows a block nothing of what stands behind it, so gaps cannot "
            "be filled with it: use another cache, with a model that was not trained in blocks"
        )
    stays = np.zeros(completion.shape, np.int32)
    for b, tokens in enumerate(given):
        if len(tokens) > lengths[b]:
            raise ValueError(
                f"given of row {b} has {len(tokens)} tokens, but its gen_len is {lengths[b]}"
            )
        check_tokens(cfg, f"given of row {b}", [t for t in tokens if t != cfg.mask_token_id])
        completion[b, : len(tokens)] = tokens
        stays[b, : len(tokens)] = np.asarray(tokens, np.int64) != cfg.mask_token_id
    return stays


@functools.partial(jax.jit, static_argnames=("cfg", "P", "G"))
def _first_state(
    cfg: ModelConfig, method: DiffusionMethod, tokens: jax.Array, start: jax.Array, end: jax.Array,
    key: jax.Array, stays: jax.Array | None, P: int, G: int,
) -> DiffusionState:  # fmt: skip
    """The state of rows of which nothing is decided but what `stays`; see `DiffusionState`.

    One program, as rows that are replaced while others go on wait for it.
    """
    B, W = len(start), method.window_len(G)
    rows = 2 * B if method.guidance is not None else B
    shadow = W if "shadow" in method.needs else 0
    zeros = functools.partial(jnp.zeros, B, jnp.int32)
    blank = functools.partial(jnp.zeros, (B, G), jnp.float32)
    first = method.scheduler.open_block(zeros(), end - P, P - start)
    return DiffusionState(
        tokens=jnp.copy(tokens),  # the state is given away, what the host holds is not
        start=jnp.copy(start),
        end=jnp.copy(end),
        block_start=jnp.full(B, P, jnp.int32),
        block_end=P + first,
        block_step=zeros(),
        num_open=zeros(),
        step_map=jnp.full((B, G), -1, jnp.int32) if stays is None else stays - 1,
        log_prob=blank(),
        confidence=blank(),
        row_step=zeros(),
        num_forwards=zeros(),
        has_stopped=end == P,
        stopped_early=jnp.zeros(B, bool),
        key=jnp.copy(key),
        cache=method.cache.allocate(cfg, rows, P + G + shadow),
        components=init_components(cfg, method, B, W),
        num_steps=jnp.zeros((), jnp.int32),
        top=TopTokens.empty((B, G, method.top_logprobs)) if method.top_logprobs else None,
        drafts=no_drafts(method.lookahead, B, P + G) if method.lookahead else None,
        given=None if stays is None else stays > 0,
        prompt_len=P,
    )


def step(
    params: Params, cfg: ModelConfig, method: DiffusionMethod, state: DiffusionState
) -> DiffusionState:
    """One round. Pure; rows that are done, or wait for their cache, stay as they are."""
    if method.lookahead:
        return freedave_round(params, cfg, method, state)
    with jax.named_scope("judge"):
        round, cache, served = judge(params, cfg, method, state)
    with jax.named_scope("commit"):
        return apply(cfg, method, state.replace(cache=cache), round, served)


decode = loop.compile_decode(step)  # its arguments are said there
_step_jitted = loop.compile_step(step)


def stream(
    params: Params, cfg: ModelConfig, method: DiffusionMethod, state: DiffusionState
) -> Iterator[DiffusionState]:
    """Yields the state after every round: the same rounds as `decode`, at Python's pace.

    A yielded state must be read before the next one is asked for: its buffers are donated.
    """
    return loop.stream(_step_jitted, params, cfg, method, state)
