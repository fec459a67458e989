"""Training-side attention of block diffusion: a noisy copy and a clean copy in one sequence.

Letters: B batch, L tokens, N query heads, K key/value heads, H head width.

The sequence is [noisy ; clean], 2L positions. Position i of either copy belongs to block
i // block_len.

    query        attends to noisy positions      attends to clean positions
    noisy        of its own block                of earlier blocks
    clean        none                            of its own and earlier blocks

so one pass trains every block to be denoised given clean predecessors, which is what block-wise
decoding with an exact cache does. Segments keep packed documents apart.

Reference: Arriola et al., "Block Diffusion: Interpolating Between Autoregressive and Diffusion
Language Models" (BD3-LM), arXiv:2503.09573, Sec. 3.1 and App. B.6.

On TPU this is JAX's splash attention kernel with a mask of its own; it skips the three quarters of
the tiles that are empty, forward and backward. Elsewhere chunks of queries are taken one after the
other, and recomputed in the backward pass.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.dispatch import choose

Implementation = Literal["xla", "tpu", "reference"]

CHUNK = 512  # queries per chunk of the XLA implementation
_LOWEST = -1e30


def block_diffusion_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    block_len: int,
    segment_ids: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Attends within [noisy ; clean]. Differentiable.

    Args:
      q: [B, 2L, N, H]. Queries, rotated; position i and position L + i have the same angle.
      k: [B, 2L, K, H]. Keys, rotated.
      v: [B, 2L, K, H]. Values.
      block_len: tokens per block; divides L. With packed documents each starts at a multiple of it.
      segment_ids: [B, L] int32. Tokens attend within their segment only; padding has an id of its
        own. None: one segment.
      implementation: "xla", "tpu" or "reference"; None: the best one where it is compiled.

    Returns:
      [B, 2L, N, H] in q's dtype.

    Raises:
      ValueError: on shapes that do not fit together.
      NotImplementedError: if the named implementation cannot run here.
    """
    B, two_L, N, H = q.shape
    if k.shape != v.shape or k.shape[:2] != (B, two_L) or k.shape[3] != H or N % k.shape[2]:
        raise ValueError(
            f"k {k.shape} and v {v.shape} must both be [B={B}, 2L={two_L}, K, H={H}] "
            f"with K dividing N={N}, as q is {q.shape}"
        )
    if two_L % 2 or block_len < 1 or (two_L // 2) % block_len:
        raise ValueError(
            f"block_len={block_len} must divide L, half of the sequence of {two_L} positions"
        )
    if segment_ids is None:
        segment_ids = jnp.zeros((B, two_L // 2), jnp.int32)
    if segment_ids.shape != (B, two_L // 2):
        raise ValueError(f"segment_ids {segment_ids.shape} must be [B={B}, L={two_L // 2}]")
    attend = choose(
        "block_diffusion_attention",
        implementation,
        xla=functools.partial(_attend_xla, block_len=block_len),
        reference=functools.partial(block_diffusion_attention_reference, block_len=block_len),
        kernels={"tpu": (functools.partial(attend_tpu, block_len=block_len), _refusal(q))},
    )
    return attend(q, k, v, segment_ids)


def block_diffusion_mask(L: int, block_len: int) -> np.ndarray:
    """[2L, 2L] bool: which positions of [noisy ; clean] each of them attends to."""
    return _allowed(np.arange(2 * L)[:, None], np.arange(2 * L)[None], L, block_len)


def _allowed(query: Any, key: Any, L: int, block_len: int) -> Any:
    """The mask as a function of positions in [noisy ; clean]."""
    query_is_clean, key_is_clean = query >= L, key >= L
    query_block = (query - L * query_is_clean) // block_len
    key_block = (key - L * key_is_clean) // block_len
    same, earlier = key_block == query_block, key_block < query_block
    noisy = ~query_is_clean & ((~key_is_clean & same) | (key_is_clean & earlier))
    return noisy | (query_is_clean & key_is_clean & (same | earlier))


def block_diffusion_attention_reference(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, block_len: int
) -> jax.Array:
    """The contract in float32 with one dense mask. Args: as `block_diffusion_attention`."""
    L, group = q.shape[1] // 2, q.shape[2] // k.shape[2]
    segments = jnp.concatenate([segment_ids] * 2, axis=1)
    allowed = jnp.asarray(block_diffusion_mask(L, block_len))[None]
    allowed = allowed & (segments[:, :, None] == segments[:, None])  # [B, 2L, 2L]
    keys, values = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), keys) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, _LOWEST), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, values).astype(q.dtype)


def _attend_xla(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, block_len: int
) -> jax.Array:
    """One chunk of queries of both copies after the other, against its noisy and all clean keys.

    Keeps one chunk's [B, N, chunk, L + chunk] float32 scores at a time, in either pass. Computes
    2 L^2 scores per head: half of the dense mask's, twice of what it allows.
    """
    B, two_L, N, H = q.shape
    L = two_L // 2
    num_blocks = L // block_len
    fitting = [
        n for n in range(1, num_blocks + 1) if num_blocks % n == 0 and n * block_len <= CHUNK
    ]
    chunk = block_len * max(fitting, default=1)
    block = jnp.arange(L) // block_len
    clean_k, clean_v = k[:, L:], v[:, L:]

    @jax.checkpoint
    def attend(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=chunk)
        here, segment = cut(block)[None, :, None], cut(segment_ids, axis=1)
        same_segment = segment[:, :, None] == segment_ids[:, None]  # [B, chunk, L]
        own = (here == here.swapaxes(1, 2)) & (segment[:, :, None] == segment[:, None])
        earlier = (block[None, None] < here) & same_segment
        up_to = (block[None, None] <= here) & same_segment
        noisy = _dense(
            cut(q, axis=1),
            jnp.concatenate([cut(k, axis=1), clean_k], axis=1),
            jnp.concatenate([cut(v, axis=1), clean_v], axis=1),
            jnp.concatenate([own, earlier], axis=2),
        )
        return noisy, _dense(cut(q[:, L:], axis=1), clean_k, clean_v, up_to)

    noisy, clean = jax.lax.map(attend, jnp.arange(0, L, chunk))  # [chunks, B, chunk, N, H] each
    whole = lambda x: x.swapaxes(0, 1).reshape(B, L, N, H)  # noqa: E731
    return jnp.concatenate([whole(noisy), whole(clean)], axis=1)


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array) -> jax.Array:
    """Attention of T queries to S keys under allowed [B, T, S]."""
    B, T, N, H = q.shape
    rows = q.reshape(B, T, k.shape[2], N // k.shape[2], H)
    scores = jnp.einsum("btkgh,bskh->bkgts", rows, k, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed[:, None, None], scores * H**-0.5, _LOWEST)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(B, T, N, H).astype(q.dtype)


def _refusal(q: jax.Array) -> str | None:
    """Why splash attention cannot serve this call; None if it can."""
    if q.shape[3] % 64:
        return f"head width {q.shape[3]} is not a multiple of 64"
    if q.shape[1] % 128:
        return f"2L={q.shape[1]} is not a multiple of 128"
    return None


def attend_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    block_len: int,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention. Args: as `block_diffusion_attention`; `interpret` runs it on CPU."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    class BlockDiffusionMask(splash.Mask):
        """Evaluated tile by tile, while the kernel is built."""

        @property
        def shape(self) -> tuple[int, int]:
            return (q.shape[1], q.shape[1])

        def __getitem__(self, index: Any) -> np.ndarray:
            rows, columns = (np.arange(q.shape[1])[i] for i in index)
            return _allowed(rows[:, None], columns[None], q.shape[1] // 2, block_len)

        def __eq__(self, other: object) -> bool:
            return type(other) is type(self)

        def __hash__(self) -> int:
            return hash((q.shape[1], block_len))

    two_L, N = q.shape[1:3]
    tile = next(size for size in (512, 256, 128) if two_L % size == 0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([BlockDiffusionMask()] * N),
        block_sizes=splash.BlockSizes(
            block_q=tile,
            block_kv=tile,
            block_kv_compute=tile,
            block_q_dkv=tile,
            block_kv_dkv=tile,
            block_kv_dkv_compute=tile,
            block_q_dq=tile,
            block_kv_dq=tile,
        ),
        interpret=interpret,
    )
    segments = jnp.concatenate([segment_ids] * 2, axis=1)
    by_head = lambda x: x.swapaxes(1, 2)  # noqa: E731
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    out = jax.vmap(kernel)(
        by_head(scaled), by_head(k), by_head(v), splash.SegmentIds(q=segments, kv=segments)
    )
    return by_head(out).astype(q.dtype)
