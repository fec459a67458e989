"""The contract of `block_diffusion_attention`, spelled out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.block_diffusion_attention.masks import block_diffusion_mask

_LOWEST = -1e30


def block_diffusion_attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    block_len: int,
    context_len: int | None = None,
) -> jax.Array:
    """The contract in float32 with one dense mask. Args: as `block_diffusion_attention`."""
    L, group = segment_ids.shape[1], q.shape[2] // k.shape[2]
    copies = q.shape[1] // L
    segments = jnp.concatenate([segment_ids] * copies, axis=1)
    allowed = jnp.asarray(block_diffusion_mask(L, block_len, context_len, copies - 1))[None]
    allowed = allowed & (segments[:, :, None] == segments[:, None])  # [B, T, T]
    keys, values = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), keys) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, _LOWEST), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, values).astype(q.dtype)
