"""SDAR's two loops: `generate.py` and that of its evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decode.diffusion.caches.block_causal import BlockCausal
from decode.diffusion.confidences.left_to_right import LeftToRight
from decode.diffusion.contracts import CommitRule
from decode.diffusion.method import DiffusionMethod
from decode.diffusion.public.sampling import check_choice, filtered
from decode.diffusion.rules.block_quota import BlockQuota
from decode.diffusion.rules.entropy_budget import EntropyBudget
from decode.diffusion.schedulers.fixed_blocks import FixedBlocks
from decode.diffusion.stoppers.end_of_text import EosBlock, Filled


def sdar(
    *,
    block_length: int = 4,
    denoising_steps: int = 4,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    remasking_strategy: str = "low_confidence_dynamic",
    confidence_threshold: float = 0.85,
    eb_threshold: float | None = None,
    stopping_criteria_idx: Sequence[int] | None = None,
) -> DiffusionMethod:
    """SDAR, TraDo, by `generate.py`.

    There the completion is as long as makes whole blocks; say so with `gen_len`. With top_k=1 every
    confidence is 1: `sdar_evaluation` is the greedy loop. Forwards that only store a block are made
    with the next block's first.

    Reference: Cheng et al., "SDAR", arXiv:2510.06303.

    Args:
      block_length: `FixedBlocks(block_len, aligned=True)` with `BlockCausal(block_len)`.
      denoising_steps: `BlockQuota(block_length, denoising_steps)`.
      temperature: `temperature`; confidences are `Tempered`, after the filters.
      top_k: `Filters`; 0: off.
      top_p: `Filters`; 1: off.
      remasking_strategy: "low_confidence_static" is `BlockQuota` without a threshold,
        "low_confidence_dynamic" with it, "sequential" is `LeftToRight`, "entropy_bounded" is
        `EntropyBudget(counts_last=True)`, JetEngine's: in `generate.py` it does not run.
      confidence_threshold: `BlockQuota.threshold`.
      eb_threshold: `EntropyBudget.budget`, in nats without temperature.
      stopping_criteria_idx: `stop_ids` with `EosBlock`; None: `Filled`.
    """
    strategies = ("low_confidence_dynamic", "low_confidence_static", "sequential")
    check_choice("remasking_strategy", remasking_strategy, (*strategies, "entropy_bounded"))
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive: greedy is sdar_evaluation")
    fields = filtered(temperature, top_k, top_p)
    if remasking_strategy == "sequential":
        fields["confidence"] = LeftToRight()
    rule: CommitRule = BlockQuota(block_length, denoising_steps)
    if remasking_strategy == "low_confidence_dynamic":
        rule = BlockQuota(block_length, denoising_steps, confidence_threshold)
    elif remasking_strategy == "entropy_bounded":
        if eb_threshold is None:
            raise ValueError("remasking_strategy='entropy_bounded' needs an eb_threshold, in nats")
        rule = EntropyBudget(eb_threshold, counts_last=True)
    return _in_blocks(block_length, rule, stopping_criteria_idx, fields)


def sdar_evaluation(
    *,
    block_length: int = 4,
    denoising_steps: int = 4,
    threshold: float = 0.95,
    stopping_criteria_idx: Sequence[int] | None = None,
) -> DiffusionMethod:
    """SDAR, TraDo, by the loop of the evaluation, JetEngine and LMDeploy, greedy (top_k 1).

    There a confidence is the probability before the filters, so it says something of an arg-max.

    Reference: Cheng et al., "SDAR", arXiv:2510.06303.

    Args:
      block_length: as for `sdar`.
      denoising_steps: as for `sdar`.
      threshold: `BlockQuota.threshold`; 1: the schedule alone.
      stopping_criteria_idx: as for `sdar`.
    """
    rule = BlockQuota(block_length, denoising_steps, threshold if threshold < 1 else None)
    return _in_blocks(block_length, rule, stopping_criteria_idx, {})


def _in_blocks(
    block_length: int, rule: CommitRule, stops: Sequence[int] | None, fields: dict[str, Any]
) -> DiffusionMethod:
    return DiffusionMethod(
        FixedBlocks(block_length, aligned=True),
        BlockCausal(block_length),
        rule=rule,
        stopper=EosBlock() if stops else Filled(),
        stop_ids=tuple(stops or ()),
        **fields,
    )
