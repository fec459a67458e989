"""The contract of `block_diffusion_attention`, spelled out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.block_diffusion_attention.masks import block_diffusion_mask

_LOWEST = -1e30


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
