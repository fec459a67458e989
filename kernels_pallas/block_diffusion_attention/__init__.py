"""Training-side attention of block diffusion: a noisy copy and a clean copy in one sequence."""

from kernels_pallas.block_diffusion_attention.masks import block_diffusion_mask
from kernels_pallas.block_diffusion_attention.op import block_diffusion_attention
from kernels_pallas.block_diffusion_attention.reference import block_diffusion_attention_reference

__all__ = [
    "block_diffusion_attention",
    "block_diffusion_attention_reference",
    "block_diffusion_mask",
]
