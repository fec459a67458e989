"""The same rounds with fewer forwards: guess some rounds ahead, check all guesses with one forward.

A forward depends on nothing but the canvas it is given. So the rounds that would come next are
drafted by deciding d times over from the statistics at hand; one forward then judges the present
canvas and the d drafts, as rows of one batch. As long as a draft is the canvas that the true round
before it produced, its statistics are those of the true next round. What comes out, tokens,
`step_map` and all, is what decoding without lookahead gives, whatever the method: only
`num_forwards` shrinks, and each forward has d + 1 rows per request.

Reference: Wu et al., "Free Draft-and-Verification: Toward Lossless Parallel Decoding for Diffusion
Large Language Models" (FreeDave), arXiv:2510.00294.

Letters: B rows, d drafts, S canvas positions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from decode.diffusion.method import DiffusionMethod
from decode.diffusion.round import Round
from decode.diffusion.state import DiffusionState
from decode.diffusion.step import apply, judge, make_frame, reframe, select_rows
from dlm.config import ModelConfig
from dlm.params import Params


def no_drafts(num_drafts: int, batch_size: int, num_slots: int) -> tuple[jax.Array, jax.Array]:
    """Drafts before anything was judged; they match no canvas."""
    tokens = jnp.full((batch_size, num_drafts, num_slots), -1, jnp.int32)
    return tokens, jnp.full((batch_size, num_drafts), -1, jnp.int32)


def freedave_round(
    params: Params, cfg: ModelConfig, method: DiffusionMethod, state: DiffusionState
) -> DiffusionState:
    """One forward, and as many rounds as it vouches for: at least one, at most d + 1."""
    assert state.drafts is not None
    active = ~state.has_stopped
    tokens, ends = state.drafts
    tokens = jnp.concatenate([state.tokens[:, None], tokens], axis=1)  # [B, d + 1, S]
    ends = jnp.concatenate([state.end[:, None], ends], axis=1)
    with jax.named_scope("judge"):
        rounds = _judge_lanes(params, cfg, method, state, tokens, ends)

    def verify(carry: tuple[DiffusionState, jax.Array, Round], lane: tuple) -> tuple:
        state, vouched, latest = carry
        round, canvas, end = lane
        vouched &= (canvas == state.tokens).all(axis=-1) & (end == state.end)
        vouched &= ~state.has_stopped
        state = apply(cfg, method, state, reframe(round, make_frame(cfg, method, state)), vouched)
        return (state, vouched, select_rows(vouched, round, latest)), None

    lanes = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (rounds, tokens, ends))
    first = jax.tree.map(lambda x: x[0], lanes[0])
    before = state
    with jax.named_scope("verify"):
        (state, _, latest), _ = jax.lax.scan(verify, (state, active, first), lanes)

    def draft(guess: DiffusionState, _: None) -> tuple[DiffusionState, tuple]:
        round = reframe(latest, make_frame(cfg, method, guess))
        guess = apply(cfg, method, guess, round, ~guess.has_stopped)
        return guess, (guess.tokens, guess.end)

    with jax.named_scope("draft"):
        _, drafts = jax.lax.scan(draft, state, length=method.lookahead)
    cost = 1 if method.guidance is None else 2
    return state.replace(
        num_forwards=before.num_forwards + cost * active.astype(jnp.int32),
        num_steps=before.num_steps + 1,
        drafts=jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), drafts),
    )


def _judge_lanes(
    params: Params,
    cfg: ModelConfig,
    method: DiffusionMethod,
    state: DiffusionState,
    tokens: jax.Array,
    ends: jax.Array,
) -> Round:
    """The rounds of d + 1 canvases per row, their arrays [B, d + 1, ...]."""
    B, lanes, S = tokens.shape
    wide = jax.tree.map(
        lambda x: jnp.repeat(x, lanes, axis=0) if x.ndim else x, state.replace(drafts=None)
    )
    # The random stream of a lane is that of the round it stands for.
    ahead = jnp.tile(jnp.arange(lanes, dtype=jnp.int32), B)
    wide = wide.replace(
        tokens=jnp.maximum(tokens, 0).reshape(B * lanes, S),
        end=ends.reshape(-1),
        row_step=wide.row_step + ahead,
    )
    round, _, _ = judge(params, cfg, method, wide)
    return jax.tree.map(
        lambda x: x.reshape(B, lanes, *x.shape[1:]) if x.ndim else jnp.broadcast_to(x, (B, lanes)),
        round,
    )
