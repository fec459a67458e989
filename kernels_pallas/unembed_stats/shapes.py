"""Shapes of real models, by name: what tests lower and benchmarks time.

Letters: M rows, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class StatsShape:
    """One call of `unembed_stats`: M rows of width D, V ids."""

    M: int
    D: int
    V: int
    has_noise: bool = False


STATS = {
    "llada_8b block": StatsShape(32, 4096, 126464),
    "llada_8b block, sampled": StatsShape(32, 4096, 126464, has_noise=True),
    "llada_8b block, batch 8": StatsShape(256, 4096, 126464),
    "dream_7b block": StatsShape(32, 3584, 152064),
    "llama3_8b tree": StatsShape(64, 4096, 128256),
    "llama3_8b tree, batch 2": StatsShape(128, 4096, 128256),
}

TOY_STATS = {
    "toy block": StatsShape(8, 128, 1000),
    "toy block, sampled": StatsShape(8, 128, 1000, has_noise=True),
}
