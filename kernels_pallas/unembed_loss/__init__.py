"""Differentiable statistics of the vocabulary: what losses are made of."""

from kernels_pallas.unembed_loss.op import TargetStats, unembed_loss

__all__ = ["TargetStats", "unembed_loss"]
