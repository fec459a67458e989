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
from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.block_diffusion_attention import tpu, xla
from kernels_pallas.block_diffusion_attention.reference import block_diffusion_attention_reference
from kernels_pallas.dispatch import choose

Implementation = Literal["xla", "tpu", "reference"]


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
        xla=functools.partial(xla.attend_xla, block_len=block_len),
        reference=functools.partial(block_diffusion_attention_reference, block_len=block_len),
        kernels={"tpu": (functools.partial(tpu.attend_tpu, block_len=block_len), tpu.refusal(q))},
    )
    return attend(q, k, v, segment_ids)
