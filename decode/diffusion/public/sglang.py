"""SGLang's algorithms for block-diffusion models."""

from __future__ import annotations

from decode.diffusion.method import DiffusionMethod
from decode.diffusion.public.fast_dllm_v2 import fast_dllm_v2
from decode.diffusion.public.llada2 import llada2, llada2_1
from decode.diffusion.public.sampling import check_choice

_ALGORITHMS = ("LowConfidence", "JointThreshold", "HierarchyBlock")


def sglang(
    *,
    dllm_algorithm: str = "LowConfidence",
    block_size: int = 32,
    threshold: float | None = None,
    edit_threshold: float = 0.0,
    max_post_edit_steps: int = 16,
    penalty_lambda: float = 0.0,
    sub_block_size: int = 8,
) -> DiffusionMethod:
    """SGLang's `--dllm-algorithm` and the entries of its config file, greedy.

    Args:
      dllm_algorithm: "LowConfidence" is `llada2`, "JointThreshold" is `llada2_1`, "HierarchyBlock"
        is `fast_dllm_v2`.
      block_size: of the model; there it is not an entry but read from the checkpoint.
      threshold: None: 0.95, 0.5 and 0.9 for the three.
      edit_threshold: of "JointThreshold", `TokenEdit.threshold`.
      max_post_edit_steps: likewise, `TokenEdit.max_rounds`.
      penalty_lambda: likewise; 0, which is its default.
      sub_block_size: of "HierarchyBlock", `SubBlocks.sub_len`.
    """
    check_choice("dllm_algorithm", dllm_algorithm, _ALGORITHMS)
    check_choice("penalty_lambda", penalty_lambda, (0,))
    if dllm_algorithm == "LowConfidence":
        tau = 0.95 if threshold is None else threshold
        return llada2(block_length=block_size, steps=block_size, threshold=tau)
    if dllm_algorithm == "JointThreshold":
        return llada2_1(
            block_length=block_size,
            threshold=0.5 if threshold is None else threshold,
            editing_threshold=edit_threshold,
            max_post_steps=max_post_edit_steps,
        )
    return fast_dllm_v2(
        block_size=block_size,
        small_block_size=sub_block_size,
        threshold=0.9 if threshold is None else threshold,
    )
