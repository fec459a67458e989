"""`block_diffusion_attention` in chunks of queries: runs anywhere."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

CHUNK = 512  # queries per chunk of the XLA implementation

_LOWEST = -1e30


def attend_xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    block_len: int,
    context_len: int | None = None,
) -> jax.Array:
    """One chunk of queries of all copies after the other, against its noisy and all clean keys.

    Keeps one chunk's [B, N, chunk, L + chunk] float32 scores at a time, in either pass. Computes
    (n + 1) L^2 scores per head: less than the dense mask's, twice of what it allows.
    """
    B, T, N, H = q.shape
    L = segment_ids.shape[1]
    num_noisy = T // L - 1
    num_blocks = L // block_len
    fitting = [
        n for n in range(1, num_blocks + 1) if num_blocks % n == 0 and n * block_len <= CHUNK
    ]
    chunk = block_len * max(fitting, default=1)
    block, context = (jnp.arange(L) // n for n in (block_len, context_len or block_len))
    copies = [tuple(x[:, i * L : (i + 1) * L] for x in (q, k, v)) for i in range(num_noisy + 1)]
    clean_q, clean_k, clean_v = copies.pop()

    @jax.checkpoint
    def attend(first: jax.Array) -> tuple[jax.Array, ...]:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=chunk)
        here, segment = cut(block)[None, :, None], cut(segment_ids, axis=1)
        same_segment = segment[:, :, None] == segment_ids[:, None]  # [B, chunk, L]
        own = (here == here.swapaxes(1, 2)) & (segment[:, :, None] == segment[:, None])
        earlier = (block[None, None] < here) & same_segment
        up_to = (context[None, None] <= cut(context)[None, :, None]) & same_segment
        noisy = (
            _dense(
                cut(q, axis=1),
                jnp.concatenate([cut(k, axis=1), clean_k], axis=1),
                jnp.concatenate([cut(v, axis=1), clean_v], axis=1),
                jnp.concatenate([own, earlier], axis=2),
            )
            for q, k, v in copies
        )
        return *noisy, _dense(cut(clean_q, axis=1), clean_k, clean_v, up_to)

    attended = jax.lax.map(attend, jnp.arange(0, L, chunk))  # [chunks, B, chunk, N, H] each
    whole = lambda x: x.swapaxes(0, 1).reshape(B, L, N, H)  # noqa: E731
    return jnp.concatenate(list(map(whole, attended)), axis=1)


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array) -> jax.Array:
    """Attention of T queries to S keys under allowed [B, T, S]."""
    B, T, N, H = q.shape
    rows = q.reshape(B, T, k.shape[2], N // k.shape[2], H)
    scores = jnp.einsum("btkgh,bskh->bkgts", rows, k, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed[:, None, None], scores * H**-0.5, _LOWEST)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(B, T, N, H).astype(q.dtype)
