"""Semi-autoregressive decoding in blocks of a fixed length.

Reference: Nie et al., "Large Language Diffusion Models", arXiv:2502.09992, §2.4: blocks are decoded
left to right, the positions of a block in any order. One block as long as the completion is pure
diffusion.
"""

from __future__ import annotations

from flax import struct

from decode.diffusion.schedulers.blocks import BlocksOfOneLength


@struct.dataclass
class FixedBlocks(BlocksOfOneLength):
    """Blocks of `block_len` positions; the last one may be shorter.

    Attributes:
      block_len: >= 1, positions per block; None: one block, the whole completion.
      aligned: whether blocks are counted from the start of the prompt, as block-diffusion models
        need, so that the first one may be shorter too.
    """
