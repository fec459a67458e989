"""Attention of a window of queries over a key/value cache and over the window itself."""

from kernels_pallas.window_attention.masks import Mask, Near, allowed_positions, pack_mask
from kernels_pallas.window_attention.op import window_attention
from kernels_pallas.window_attention.reference import window_attention_reference

__all__ = [
    "Mask",
    "Near",
    "allowed_positions",
    "pack_mask",
    "window_attention",
    "window_attention_reference",
]
