"""LLaDA2's `generate`: 2.0, and 2.1 with its edits."""

from __future__ import annotations

from decode.diffusion.caches.block_causal import BlockCausal
from decode.diffusion.method import DiffusionMethod
from decode.diffusion.public.sampling import filtered
from decode.diffusion.revisers.token_edit import TokenEdit
from decode.diffusion.rules.block_quota import BlockQuota
from decode.diffusion.schedulers.fixed_blocks import FixedBlocks
from decode.diffusion.stoppers.end_of_text import Eos, EosBlock


def llada2(
    *,
    gen_length: int = 2048,
    block_length: int = 32,
    steps: int = 32,
    threshold: float = 0.95,
    minimal_topk: int = 1,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    eos_early_stop: bool = False,
) -> DiffusionMethod:
    """LLaDA2.0-mini and -flash.

    Reference: Bie et al., "LLaDA2.0", arXiv:2512.15745.

    Args:
      gen_length: the `gen_len` of `generate`.
      block_length: `FixedBlocks(block_len, aligned=True)` with `BlockCausal(block_len)`.
      steps: of a block, `BlockQuota(block_length, steps)`.
      threshold: `BlockQuota.threshold`.
      minimal_topk: no more steps than `gen_length // minimal_topk`.
      temperature: `temperature`; confidences are `Tempered`, after the filters.
      top_p: `Filters`, if there is a temperature.
      top_k: likewise.
      eos_early_stop: `Eos` instead of `EosBlock`.
    """
    rule = BlockQuota(block_length, min(steps, gen_length // minimal_topk), threshold)
    return DiffusionMethod(
        FixedBlocks(block_length, aligned=True),
        BlockCausal(block_length),
        rule=rule,
        stopper=Eos() if eos_early_stop else EosBlock(),
        **filtered(temperature, top_k, top_p),
    )


def llada2_1(
    *,
    block_length: int = 32,
    threshold: float = 0.95,
    editing_threshold: float = 0.9,
    max_post_steps: int = 16,
    num_to_transfer: int = 1,
    eos_early_stop: bool = False,
) -> DiffusionMethod:
    """LLaDA2.1-mini and -flash, and SGLang's JointThreshold; greedy.

    In use are (threshold, editing_threshold) = (0.5, 0) for speed, SGLang's default, and (0.7, 0.5)
    for quality.

    Reference: Bie et al., "LLaDA2.1", arXiv:2602.08676.

    Args:
      block_length: as for `llada2`.
      threshold: `BlockQuota(num_to_transfer, 1, threshold)`.
      editing_threshold: `TokenEdit.threshold`.
      max_post_steps: `TokenEdit.max_rounds`.
      num_to_transfer: the least commits of a round.
      eos_early_stop: `Eos` instead of `EosBlock`, which waits for a block's edits.
    """
    return DiffusionMethod(
        FixedBlocks(block_length, aligned=True),
        BlockCausal(block_length),
        rule=BlockQuota(num_to_transfer, 1, threshold),
        reviser=TokenEdit(editing_threshold, max_post_steps),
        stopper=Eos() if eos_early_stop else EosBlock(),
    )
