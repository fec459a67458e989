"""Fast-dLLM v2's `generate` and `batch_sample`."""

from __future__ import annotations

from decode.diffusion.caches.block_causal import BlockCausal
from decode.diffusion.caches.canvas import CachePolicy
from decode.diffusion.caches.in_block_cache import InBlockCache
from decode.diffusion.method import DiffusionMethod
from decode.diffusion.public.sampling import filtered
from decode.diffusion.rules.threshold import Threshold
from decode.diffusion.schedulers.sub_blocks import SubBlocks
from decode.diffusion.stoppers.end_of_text import Eos


def fast_dllm_v2(
    *,
    block_size: int = 32,
    small_block_size: int = 8,
    threshold: float = 1.0,
    temperature: float = 0.0,
    top_p: float = 0.95,
    use_block_cache: bool = False,
    stop_token: int = 151645,
) -> DiffusionMethod:
    """Fast-dLLM v2 (threshold 0.9 in its demos), and SGLang's HierarchyBlock.

    The first token of a block is the one that the block before it predicts, as there; deciding it
    costs no forward, since it is read off the forward that stores that block. Prompts of exactly a
    block are decoded like others, which the published function does not.

    Reference: Wu et al., "Fast-dLLM v2: Efficient Block-Diffusion LLM", arXiv:2509.26328.

    Args:
      block_size: `SubBlocks(block_len, aligned=True, first_alone=True)`, `BlockCausal(block_len)`.
      small_block_size: `SubBlocks.sub_len`.
      threshold: `Threshold(threshold)`; 1: one position per step.
      temperature: `temperature`; confidences are `Tempered`, after the nucleus.
      top_p: `Filters`, if there is a temperature.
      use_block_cache: `InBlockCache` instead of `BlockCausal`.
      stop_token: `stop_ids`, with `Eos`.
    """
    cache: CachePolicy = BlockCausal(block_size)
    if use_block_cache:
        cache = InBlockCache(block_size, sub_len=small_block_size)
    return DiffusionMethod(
        SubBlocks(block_size, small_block_size, aligned=True, first_alone=True),
        cache,
        rule=Threshold(threshold),
        stopper=Eos(),
        stop_ids=(stop_token,),
        **filtered(temperature, None, top_p),
    )
