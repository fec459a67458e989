"""Attention of drafts in training: groups of queries, each with keys of its own beside the text's.

EAGLE-3's groups are positions, whose own keys are those of the steps before; DFlash's are blocks,
whose own keys are those of the block. Plain JAX: a group at a time would waste an accelerator, and
all at once would fill its memory, so it goes by chunks of groups, recomputed backwards.

Letters: B batch, G groups, n queries of a group, m own keys of a group, T positions of the text, N
query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

QUERIES = 128  # per row, whose scores with the whole text are in memory at a time


def draft_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    own_k: jax.Array,
    own_v: jax.Array,
    limits: jax.Array,
    *,
    is_causal: bool = False,
) -> jax.Array:
    """Queries see the text from one position up to another, and their group's own keys.

    Args:
      q: [B, G, n, N, H].
      k, v: [B, T, K, H]. Keys and values of the text.
      own_k, own_v: [B, G, m, K, H]; m may be 0.
      limits: [B, G, n, 2] int32, or [B, G, 1, 2]. The first position that a query sees, and one
        behind the last.
      is_causal: whether a query sees only as many keys of its group as it has queries up to it.

    Returns:
      [B, G, n, N, H] in the dtype of `q`; the softmax is float32. Anything finite where a group
      sees nothing.
    """
    B, G, n, N, H = q.shape
    T, K = k.shape[1:3]
    size = max(1, min(QUERIES // n, G))
    num = -(-G // size)
    own_seen = jnp.tri(n, own_k.shape[2], dtype=bool)[None, None, :, None, None]

    def chunked(x: jax.Array) -> jax.Array:
        """[num, B, size, ...] of [B, G, ...]."""
        x = jnp.pad(x, ((0, 0), (0, num * size - G), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(B, num, size, *x.shape[2:]).swapaxes(0, 1)

    def one_chunk(chunk: tuple[jax.Array, ...]) -> jax.Array:
        q, own_k, own_v, limits = chunk
        q = q.reshape(B, size, n, K, N // K, H) * H**-0.5
        of_text = jnp.einsum("bgnkxh,btkh->bgnkxt", q, k, preferred_element_type=jnp.float32)
        index = jnp.arange(T)[None, None, None]
        is_seen = (index >= limits[..., :1]) & (index < limits[..., 1:])
        of_text = jnp.where(is_seen[:, :, :, None, None], of_text, -1e30)
        of_own = jnp.einsum("bgnkxh,bgmkh->bgnkxm", q, own_k, preferred_element_type=jnp.float32)
        if is_causal:
            of_own = jnp.where(own_seen, of_own, -1e30)
        w = jax.nn.softmax(jnp.concatenate([of_text, of_own], axis=-1), axis=-1).astype(q.dtype)
        out = jnp.einsum("bgnkxt,btkh->bgnkxh", w[..., :T], v)
        out += jnp.einsum("bgnkxm,bgmkh->bgnkxh", w[..., T:], own_v)
        return out.reshape(B, size, n, N, H)

    out = jax.lax.map(
        jax.checkpoint(one_chunk), tuple(chunked(x) for x in (q, own_k, own_v, limits))
    )
    return out.swapaxes(0, 1).reshape(B, num * size, n, N, H)[:, :G]
