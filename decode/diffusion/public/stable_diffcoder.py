"""Stable-DiffCoder's `generate_block`."""

from __future__ import annotations

from decode.diffusion.caches.block_causal import BlockCausal
from decode.diffusion.contracts import CommitRule
from decode.diffusion.method import DiffusionMethod
from decode.diffusion.public.sampling import check_choice, steps_per_block
from decode.diffusion.rules.block_quota import BlockQuota
from decode.diffusion.rules.threshold import Threshold
from decode.diffusion.schedulers.fixed_blocks import FixedBlocks
from decode.diffusion.stoppers.end_of_text import EosBlock


def stable_diffcoder(
    *,
    steps: int = 512,
    gen_length: int = 512,
    block_length: int = 4,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    threshold: float | None = None,
    shift: bool = False,
) -> DiffusionMethod:
    """Stable-DiffCoder.

    With a threshold and fewer steps than positions the published loop leaves a block before it is
    full; here it is filled.

    Reference: "Stable-DiffCoder", arXiv:2601.15892.

    Args:
      steps: in all; a block has its share of them, `BlockQuota(block_length, ...)`. Without effect
        under a threshold.
      gen_length: the `gen_len` of `generate`; needed here to count blocks.
      block_length: `FixedBlocks(block_len, aligned=True)` with `BlockCausal(block_len)`.
      temperature: `temperature`; confidences are those without it.
      remasking: "low_confidence".
      threshold: `Threshold(threshold)`; None: the schedule of `steps`.
      shift: False; whether logits are shifted is told by the checkpoint.
    """
    check_choice("remasking", remasking, ("low_confidence",))
    check_choice("shift", shift, (False,))
    rule: CommitRule
    if threshold is None:
        rule = BlockQuota(block_length, steps_per_block(steps, gen_length, block_length))
    else:
        rule = Threshold(threshold)
    return DiffusionMethod(
        FixedBlocks(block_length, aligned=True),
        BlockCausal(block_length),
        rule=rule,
        stopper=EosBlock(),
        temperature=temperature or None,
    )
