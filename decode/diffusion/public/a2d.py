"""dllm's BD3LM sampler."""

from __future__ import annotations

from decode.diffusion.caches.block_causal import BlockCausal
from decode.diffusion.method import DiffusionMethod
from decode.diffusion.public.llada import llada


def bd3lm(
    *,
    steps: int = 128,
    max_new_tokens: int = 128,
    block_size: int = 32,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
) -> DiffusionMethod:
    """Tiny-A2D models that were trained in blocks, and other models of ZHZisZZ/dllm.

    The prompt is padded on the left to whole blocks there: blocks are counted from its end.

    Reference: Arriola et al., "Block Diffusion", arXiv:2503.09573.

    Args:
      steps: as for `llada`.
      max_new_tokens: the `gen_len` of `generate`; needed here to count blocks.
      block_size: `FixedBlocks(block_len)` with `BlockCausal(block_len, aligned=False)`.
      temperature: as for `llada`.
      remasking: as for `llada`.
    """
    method = llada(
        steps=steps,
        gen_length=max_new_tokens,
        block_length=block_size,
        temperature=temperature,
        remasking=remasking,
    )
    return method.replace(cache=BlockCausal(block_size, aligned=False))
