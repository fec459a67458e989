"""`unembed_stats` in tiles of plain matrix products: runs anywhere.

Letters: M rows, D model width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.few_rows import times_rows_of
from kernels_pallas.unembed_stats.noise import Noise
from kernels_pallas.unembed_stats.summary import Summary, ban, merge, tile_summary

# Of the XLA implementation. CPUs and GPUs copy a tile's weights out of the head first, which costs
# more than the product itself where there are few rows: then there are no tiles.
WHOLE_LOGITS = 2**23  # up to so many float32 logits are kept at once

VOCAB_TILE = 16384  # else, most vocabulary entries per pass,

TILE_LOGITS = 2**25  # and most logits that it keeps at a time, as long as a tile has 1,024 entries


def summarize_xla(
    hidden: jax.Array,
    head: jax.Array,
    first_id: jax.Array | int,
    banned_ids: jax.Array | None,
    noise: Noise | None,
    given_ids: jax.Array | None,
    *,
    k: int,
    cap: float | None = None,
) -> Summary:
    """Tiles of the vocabulary, merged one after the other; `first_id` is that of head's first row.

    Keeps [M, tile] float32 logits at a time, see `tile_len`.
    """
    V = head.shape[0]
    size = tile_len(hidden.shape[0], V)
    if size == V:
        ids = first_id + jnp.arange(V, dtype=jnp.int32)
        return tile_summary(
            ban(matmul(hidden, head, cap), ids, banned_ids), ids, noise, k, given_ids
        )

    num_tiles = -(-V // size)

    def tile(i: jax.Array | int) -> Summary:
        # The last tile starts early enough to be whole, and skips what was seen already.
        start = jnp.minimum(i * size, V - size).astype(jnp.int32)
        row = start + jnp.arange(size, dtype=jnp.int32)
        z = matmul(hidden, jax.lax.dynamic_slice_in_dim(head, start, size), cap)
        z = jnp.where((row >= i * size)[None], z, -jnp.inf)
        ids = first_id + row
        return tile_summary(ban(z, ids, banned_ids), ids, noise, k, given_ids)

    return jax.lax.fori_loop(1, num_tiles, lambda i, summary: merge(summary, tile(i)), tile(0))


def tile_len(M: int, V: int) -> int:
    """How many vocabulary entries the XLA passes over [M, V] logits take at a time."""
    if M * V <= WHOLE_LOGITS:
        return V
    return min(V, VOCAB_TILE, max(1024, TILE_LOGITS // M))


def matmul(hidden: jax.Array, head: jax.Array, cap: float | None = None) -> jax.Array:
    """[M, V] float32 of hidden [M, D] and head [V, D]; z becomes cap tanh(z / cap)."""
    wide = jnp.promote_types(head.dtype, jnp.float32)
    z = times_rows_of(hidden.astype(head.dtype), head, wide)
    return z if cap is None else cap * jnp.tanh(z / cap)
