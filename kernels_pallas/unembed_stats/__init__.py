"""Hidden states to vocabulary statistics, without ever storing the logits of all positions."""

from kernels_pallas.unembed_stats.noise import Noise, gumbel_noise, threefry2x32
from kernels_pallas.unembed_stats.op import logits_stats, unembed_logits, unembed_stats
from kernels_pallas.unembed_stats.reference import unembed_stats_reference
from kernels_pallas.unembed_stats.summary import VocabStats

__all__ = [
    "Noise",
    "VocabStats",
    "gumbel_noise",
    "logits_stats",
    "threefry2x32",
    "unembed_logits",
    "unembed_stats",
    "unembed_stats_reference",
]
