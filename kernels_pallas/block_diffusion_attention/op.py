"""Training-side attention of block diffusion: noisy copies and a clean copy in one sequence.

Letters: B batch, L tokens, n noisy copies, T = (n + 1) L, N query heads, K key/value heads, H head
width.

The sequence is [noisy_1 ; .. ; noisy_n ; clean]. Position i of any copy belongs to block
i // block_len.

    query        attends to noisy positions            attends to clean positions
    noisy        of its own block, in its own copy     of earlier blocks
    clean        none                                  up to its own context block, i // context_len

so one pass trains every block to be denoised given clean predecessors, which is what block-wise
decoding with an exact cache does. Segments keep packed documents apart. A clean copy with blocks of
one is read causally, as an autoregressive model reads it. Several noisy copies, masked
differently, share the work for the clean one.

References: Arriola et al., "Block Diffusion: Interpolating Between Autoregressive and Diffusion
Language Models" (BD3-LM), arXiv:2503.09573, Sec. 3.1 and App. B.6; the causal clean copy: Liu et
al., "TiDAR: Think in Diffusion, Talk in Autoregression", arXiv:2511.08923.

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
    context_len: int | None = None,
    segment_ids: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Attends within [noisy ; clean]. Differentiable.

    Args:
      q: [B, T, N, H]. Queries, rotated; position i of all copies has the same angle.
      k: [B, T, K, H]. Keys, rotated.
      v: [B, T, K, H]. Values.
      block_len: tokens per block; divides L. With packed documents each starts at a multiple of it.
      context_len: tokens per block of the clean copy, at least 1; 1: it is causal. None: block_len.
      segment_ids: [B, L] int32. Tokens attend within their segment only; padding has an id of its
        own. None: one segment, and one noisy copy.
      implementation: "xla", "tpu" or "reference"; None: the best one where it is compiled.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ValueError: on shapes that do not fit together.
      NotImplementedError: if the named implementation cannot run here.
    """
    B, T, N, H = q.shape
    if k.shape != v.shape or k.shape[:2] != (B, T) or k.shape[3] != H or N % k.shape[2]:
        raise ValueError(
            f"k {k.shape} and v {v.shape} must both be [B={B}, T={T}, K, H={H}] "
            f"with K dividing N={N}, as q is {q.shape}"
        )
    if segment_ids is None:
        segment_ids = jnp.zeros((B, T // 2), jnp.int32)
    L = segment_ids.shape[1]
    if segment_ids.shape[0] != B or L == 0 or T % L or T == L:
        raise ValueError(
            f"segment_ids {segment_ids.shape} must be [B={B}, L], with two copies of L or more in "
            f"the sequence of {T} positions"
        )
    if block_len < 1 or L % block_len:
        raise ValueError(f"block_len={block_len} must divide L={L}, the length of a copy")
    if context_len is not None and context_len < 1:
        raise ValueError(f"context_len={context_len} must be at least 1")
    chunks, dense, splash = (
        functools.partial(attend, block_len=block_len, context_len=context_len)
        for attend in (xla.attend_xla, block_diffusion_attention_reference, tpu.attend_tpu)
    )
    attend = choose(
        "block_diffusion_attention",
        implementation,
        xla=chunks,
        reference=dense,
        kernels={"tpu": (splash, tpu.refusal(q))},
    )
    return attend(q, k, v, segment_ids)
