"""`block_diffusion_attention` on TPU: JAX's splash attention kernel with a mask of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.block_diffusion_attention.masks import block_diffusion_allowed


def refusal(q: jax.Array) -> str | None:
    """Why splash attention cannot serve this call; None if it can."""
    if q.shape[3] % 64:
        return f"head width {q.shape[3]} is not a multiple of 64"
    if q.shape[1] % 128:
        return f"T={q.shape[1]} is not a multiple of 128"
    return None


def attend_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    block_len: int,
    context_len: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention. Args: as `block_diffusion_attention`; `interpret` runs it on CPU."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N = q.shape[1:3]
    L = segment_ids.shape[1]
    about = (L, block_len, context_len or block_len, T // L - 1)

    class BlockDiffusionMask(splash.Mask):
        """Evaluated tile by tile, while the kernel is built."""

        @property
        def shape(self) -> tuple[int, int]:
            return (T, T)

        def __getitem__(self, index: Any) -> np.ndarray:
            rows, columns = (np.arange(T)[i] for i in index)
            return block_diffusion_allowed(rows[:, None], columns[None], *about)

        def __eq__(self, other: object) -> bool:
            return type(other) is type(self)

        def __hash__(self) -> int:
            return hash(about)

    tile = next(size for size in (512, 256, 128) if T % size == 0)
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
    segments = jnp.concatenate([segment_ids] * (T // L), axis=1)
    by_head = lambda x: x.swapaxes(1, 2)  # noqa: E731
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    out = jax.vmap(kernel)(
        by_head(scaled), by_head(k), by_head(v), splash.SegmentIds(q=segments, kv=segments)
    )
    return by_head(out).astype(q.dtype)
