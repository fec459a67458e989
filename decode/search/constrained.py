"""Constraints in a search: each candidate is a row with a window of one position, that behind it.

What is allowed is said by the constraints of masked diffusion (`decode.diffusion.contracts`), here:

    init                      a state behind every candidate, which goes where its hypothesis goes
    banned_ids, mask_logits   what may come behind it; strategies never see the rest
    accept                    the state behind what is read next; a token that it refuses is out.
                              It sees tokens and places, and nothing that was measured

Nothing is normalised again: scores are those of the model, so what is found is the best of its
texts that is allowed. `propose` is about windows of several positions, and is not asked.

Letters: B prompts, K hypotheses, n candidates, k tokens behind each, R = B K n k rows, V
vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from decode.core.streams import fold_in
from decode.diffusion.contracts import Constraint
from decode.diffusion.round import Frame, Round
from decode.search.contracts import NEVER
from decode.search.method import SearchMethod
from decode.search.state import SearchState
from dlm.config import ModelConfig
from kernels_pallas.unembed_stats import VocabStats


def init(constraint: Constraint, cfg: ModelConfig, B: int, K: int, n: int) -> Any:
    """[B, K, n, ...]: the state behind every candidate, before anything was written."""
    return jax.tree.map(
        lambda x: x.reshape(B, K, n, *x.shape[1:]), constraint.init(cfg, B * K * n, 1)
    )


def allow(
    cfg: ModelConfig, method: SearchMethod, state: SearchState, log_probs: jax.Array
) -> jax.Array:
    """Log-probabilities [B, K, n, V] of what comes behind every candidate; `NEVER`: it may not."""
    constraint, (*lead, V) = method.constraint, log_probs.shape
    assert constraint is not None
    banned = constraint.banned_ids(cfg)
    if banned is not None:
        log_probs = log_probs.at[..., banned].set(-jnp.inf)
    if "logits" in constraint.needs:
        frame = _frame(cfg, method, state, state.num_cached + 1 - state.prompt_len, lead)
        if "occurred" in constraint.needs:
            frame = frame.replace(occurred=_occurred(state).reshape(-1, V))
        of_rows = log_probs.reshape(-1, 1, V)
        log_probs = constraint.mask_logits(frame, of_rows, _rows(state.constraint, 3))
    return jnp.where(log_probs > -jnp.inf, log_probs, NEVER).reshape(*lead, V)


def accepts(
    cfg: ModelConfig, method: SearchMethod, state: SearchState, tokens: jax.Array
) -> jax.Array:
    """[B, K, n, k] bool: whether such tokens [B, K, n, k] are accepted behind every candidate."""
    behind = jax.tree.map(
        lambda x: jnp.broadcast_to(x[:, :, :, None], (*tokens.shape, *x.shape[3:])),
        state.constraint,
    )
    index = state.num_cached + 1 - state.prompt_len
    return _accept(cfg, method, state, index, tokens, behind)[0]


def follow(
    cfg: ModelConfig,
    method: SearchMethod,
    state: SearchState,
    source: jax.Array,
    node: jax.Array,
    candidates: jax.Array,
    num_cached: jax.Array,
) -> tuple[jax.Array, Any]:
    """Which candidates of the next round are accepted [B, K, n], and the states behind them.

    Args:
      cfg, method, state: of this round.
      source, node: [B, K] int32. Which candidate of which hypothesis each hypothesis comes from.
      candidates: [B, K, n] int32. Of the next round.
      num_cached: [B] int32. Tokens before those.
    """
    rows = jnp.arange(len(source))[:, None]
    behind = jax.tree.map(
        lambda x: jnp.broadcast_to(x[rows, source, node][:, :, None], x.shape), state.constraint
    )
    return _accept(cfg, method, state, num_cached - state.prompt_len, candidates, behind)


def _accept(
    cfg: ModelConfig,
    method: SearchMethod,
    state: SearchState,
    index: jax.Array,
    tokens: jax.Array,
    behind: Any,
) -> tuple[jax.Array, Any]:
    """Whether tokens [B, K, n, ...] are accepted, and the states behind them.

    `behind` are the states [B, K, n, ...] before them, and `index` [B] is their place.
    """
    assert method.constraint is not None
    proposal = tokens.reshape(-1, 1)
    unknown = jnp.full(proposal.shape, jnp.nan)
    round = Round(
        **vars(_frame(cfg, method, state, index, tokens.shape)),
        proposal=proposal,
        log_prob=unknown,
        confidence=unknown,
        stats=VocabStats(proposal, unknown, unknown, unknown, unknown),
    )
    commit, known = method.constraint.accept(
        round, jnp.ones(proposal.shape, bool), _rows(behind, tokens.ndim)
    )
    back = lambda x: x.reshape(*tokens.shape, *x.shape[1:])  # noqa: E731
    return commit.reshape(tokens.shape), jax.tree.map(back, known)


def _occurred(state: SearchState) -> jax.Array:
    """[B, K, n, V] bool: tokens that came up before what stands behind every candidate."""
    assert state.occurred is not None
    V = state.occurred.shape[2]
    return state.occurred[:, :, None] | jax.nn.one_hot(state.candidates, V, dtype=bool)


def _rows(tree: Any, num_axes: int) -> Any:
    """Arrays [B, K, n, ...], of so many axes before their own, as rows [R, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[num_axes:]), tree)


def _frame(
    cfg: ModelConfig, method: SearchMethod, state: SearchState, index: jax.Array, lead: Any
) -> Frame:
    """R windows of one open position: `index` [B] of the completions.

    `lead` are the axes (B, K, n, ...) that rows come from.
    """

    def of_rows(x: jax.Array) -> jax.Array:  # [B, ...] as [R, ...]
        wide = x.reshape(len(x), *[1] * (len(lead) - 1), *x.shape[1:])
        return jnp.broadcast_to(wide, (*lead, *x.shape[1:])).reshape(-1, *x.shape[1:])

    at, temperature = of_rows(index), method.sampling.temperature
    here = jnp.ones((len(at), 1), bool)
    key, forwards = fold_in(state.key, state.num_forwards), of_rows(state.num_forwards)
    empty = cfg.pad_token_id if cfg.mask_token_id is None else cfg.mask_token_id
    return Frame(
        tokens=jnp.full((len(at), 1), empty, jnp.int32),
        eligible=here,
        undecided=here,
        in_block=here,
        noise_key=of_rows(key)[:, None],
        temperature=None if temperature is None else jnp.asarray(temperature, jnp.float32),
        index=at[:, None],
        block_start=at,
        block_end=at + 1,
        block_step=jnp.zeros_like(at),
        row_step=forwards,
        num_open=jnp.ones_like(at),
        gen_len=of_rows(state.end - state.prompt_len),
        prompt_len=of_rows(state.prompt_len),
    )
