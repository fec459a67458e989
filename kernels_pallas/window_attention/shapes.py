"""Shapes of real models, by name: what tests lower and benchmarks time.

Letters: B batch, T window positions, S cache slots, N query heads, K key/value heads, H head
width.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """One call of `window_attention`: B rows, T queries over S cache slots and over themselves.

    Attributes:
      mask: "full", "causal" or "bits".
      num_ranges: ranges of the cache per row: 1 for a prefix, 2 for the dual cache.
    """

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    mask: str = "full"
    num_ranges: int = 1


ATTENTION = {
    "llada_8b block": AttentionShape(1, 32, 4096, 32, 32, 128, num_ranges=2),
    "llada_8b block, batch 8": AttentionShape(8, 32, 4096, 32, 32, 128, num_ranges=2),
    "llada_8b canvas": AttentionShape(1, 4096, 0, 32, 32, 128),
    "dream_7b block": AttentionShape(1, 32, 4096, 28, 4, 128, num_ranges=2),
    "llama3_8b token": AttentionShape(1, 1, 8192, 32, 8, 128, "causal"),
    "llama3_8b tree": AttentionShape(1, 64, 8192, 32, 8, 128, "bits"),
    "llama3_8b prefill": AttentionShape(1, 4096, 0, 32, 8, 128, "causal"),
    "qwen2_5_0_5b token, batch 8": AttentionShape(8, 1, 8192, 14, 2, 64, "causal"),
}

TOY_ATTENTION = {
    "toy block": AttentionShape(1, 8, 192, 4, 2, 64, num_ranges=2),
    "toy tree": AttentionShape(2, 16, 128, 4, 4, 64, "bits"),
}
