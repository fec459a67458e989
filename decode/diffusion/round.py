"""What components of masked diffusion see of a round, and what they make of it.

Confidences live on a log scale, in (-inf, 0]: the log of a number in (0, 1]. Probabilities of
trained models crowd so close to 1 that float32 cannot tell them apart, while their logarithms keep
full resolution, and decoding depends on their order. `log_confidence` turns a threshold in [0, 1]
into that scale.

Letters: B rows, W window positions judged per round, V vocabulary, G completion positions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.unembed_stats import VocabStats


class Frame(struct.PyTreeNode):
    """What is known of a round before its forward: W positions of each row.

    The window starts at the row's open block, or at its first completion position if a component
    needs the whole "canvas".

    Attributes:
      tokens: [B, W] int32. What stands there now (MASK where undecided).
      eligible: [B, W] bool. Undecided positions that may be committed now.
      undecided: [B, W] bool. Positions that hold no token yet; also those beyond the block.
      in_block: [B, W] bool. Positions of the open block, decided or not, but for tokens that the
        prompt gives behind a gap.
      noise_key: [B, W, 2] uint32. A random stream per row, step and position.
      temperature: scalar float32, or None if proposals are arg-maxes.
      index: [B, W] int32. Completion position, from 0; at or past the row's end: not there.
      block_start: [B] int32. First completion position of the open block.
      block_end: [B] int32. Past its last.
      block_step: [B] int32. Rounds since the row's block was opened, from 0.
      row_step: [B] int32. The row's rounds so far, from 0.
      num_open: [B] int32. Undecided positions of the block when it was opened.
      gen_len: [B] int32. Completion positions of the row.
      prompt_len: [B] int32. Tokens of the row's prompt.
      occurred: [B, V] bool; None unless a component needs "occurred". Tokens that the prompt or a
        decided position holds.
    """

    tokens: jax.Array
    eligible: jax.Array
    undecided: jax.Array
    in_block: jax.Array
    noise_key: jax.Array
    temperature: jax.Array | None
    index: jax.Array
    block_start: jax.Array
    block_end: jax.Array
    block_step: jax.Array
    row_step: jax.Array
    num_open: jax.Array
    gen_len: jax.Array
    prompt_len: jax.Array
    occurred: jax.Array | None = struct.field(default=None, kw_only=True)


class Round(Frame):
    """A round after its forward: a frame, and what the model says.

    Attributes:
      proposal: [B, W] int32. What the model proposes: its arg-max, or a sample.
      log_prob: [B, W] float32. Log-probability of the proposal, without temperature.
      confidence: [B, W] float32 on the log scale; set by the confidence component (before it
        ran: `log_prob`).
      stats: the model's statistics, each [B, W, ...]. Positions that hold a token have them too.
      logits: [B, W, V] float32; None unless a component needs "logits".
      expected: [B, W, D] float32; None unless a component needs "expected". The embedding of the
        token to come, averaged over the model's probabilities.
      standing_log_prob: [B, W] float32; None unless a component needs "standing". Log-probability
        of the token that stands at a position, by a forward that sees it there.
      shadow_log_prob: [B, W] float32; None unless a component needs a "shadow". Log-probability of
        the token that stands at a position as MASK would predict it there, from everything else.
    """

    proposal: jax.Array
    log_prob: jax.Array
    confidence: jax.Array
    stats: VocabStats
    logits: jax.Array | None = None
    expected: jax.Array | None = None
    standing_log_prob: jax.Array | None = None
    shadow_log_prob: jax.Array | None = None


class Progress(struct.PyTreeNode):
    """How far rows are, after a round. Positions are completion positions, from 0.

    Attributes:
      completion: [B, G] int32. What stands there.
      decided: [B, G] bool.
      block_start: [B] int32. First position of the open block.
      block_end: [B] int32. Past its last.
      end: [B] int32. Past the row's last.
      is_full: [B] bool. The open block is done: nothing in it is undecided, a forward has seen it,
        and no reviser holds it.
      prompt_len: [B] int32. Tokens of the prompt.
    """

    completion: jax.Array
    decided: jax.Array
    block_start: jax.Array
    block_end: jax.Array
    end: jax.Array
    is_full: jax.Array
    prompt_len: jax.Array


class Revision(struct.PyTreeNode):
    """What a reviser makes of a round.

    Attributes:
      commit: [B, W] bool. Positions that get their proposal, also where a token stands.
      take_back: [B, W] bool. Positions that become undecided again; None: none.
      hold: [B] bool. Rows whose block stays open though it is full; None: none.
      proposal: [B, W] int32. What committed positions get; None: the round's proposals.
    """

    commit: jax.Array
    take_back: jax.Array | None = None
    hold: jax.Array | None = None
    proposal: jax.Array | None = None


def is_any(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """[...] bool: whether tokens [...] are among ids [n]."""
    return (tokens[..., None] == ids.reshape((1,) * tokens.ndim + (-1,))).any(axis=-1)


def log_confidence(threshold: jax.Array | float) -> jax.Array:
    """log(threshold), computed as confidences are, so that equal values compare equal."""
    threshold = jnp.asarray(threshold, jnp.float32)
    return -jnp.log1p((1 - threshold) / threshold)


def rank(confidence: jax.Array, eligible: jax.Array) -> jax.Array:
    """[B, W] int32: 0 for a row's surest eligible position, then 1, ...; ties go to the left.

    Positions that are not eligible come last.
    """
    order = jnp.argsort(_sortable(confidence, eligible), axis=-1, stable=True)
    return jnp.argsort(order, axis=-1)


def sort_confidence(confidence: jax.Array, eligible: jax.Array) -> jax.Array:
    """[B, W] float32: eligible confidences from surest down, then -inf."""
    return -jnp.sort(_sortable(confidence, eligible), axis=-1)


def surest(confidence: jax.Array, eligible: jax.Array) -> jax.Array:
    """[B, W] bool: each row's surest eligible position (the leftmost on ties), if it has one."""
    best = jnp.argmin(_sortable(confidence, eligible), axis=-1)
    return (jnp.arange(confidence.shape[-1])[None] == best[:, None]) & eligible


def within_budget(entropy: jax.Array, where: jax.Array, budget: jax.Array | float) -> jax.Array:
    """[B, W] bool: from the lowest up, as long as those *before* add up to at most `budget`.

    Args:
      entropy: [B, W] float32, in nats.
      where: [B, W] bool. Positions that count; others are not admitted.
      budget: in nats.
    """
    entropy = jnp.where(where, entropy, jnp.inf)
    order = jnp.argsort(entropy, axis=-1, stable=True)
    ascending = jnp.take_along_axis(entropy, order, axis=-1)
    before = jnp.cumsum(jnp.where(ascending < jnp.inf, ascending, 0.0), axis=-1)
    before = jnp.pad(before, ((0, 0), (1, 0)))[:, :-1]
    place = jnp.argsort(order, axis=-1)
    return where & jnp.take_along_axis(before <= budget, place, axis=-1)


def _sortable(confidence: jax.Array, eligible: jax.Array) -> jax.Array:
    """Smallest first; an eligible position with confidence -inf still precedes the others."""
    floor = jnp.finfo(jnp.float32).min
    return jnp.where(eligible, -jnp.maximum(confidence, floor), jnp.inf)
