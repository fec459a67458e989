"""The exact caches of block-diffusion models, whose blocks never look ahead."""

from __future__ import annotations

from typing import ClassVar

import jax
from flax import struct

from decode.diffusion.caches.canvas import Canvas
from decode.diffusion.caches.exact_blocks import ExactBlocks, ExactBlocksState
from dlm.config import ModelConfig
from dlm.params import Params


@struct.dataclass
class BlockCausal(ExactBlocks):
    """Attention for block-diffusion models (BD3-LM, SDAR, LLaDA2, Fast-dLLM v2), cached exactly.

    A position sees its own block and all before it. Blocks are counted from the start of the prompt
    (SDAR, LLaDA2, Fast-dLLM v2), or from its end, so that the first of them may be shorter
    (Tiny-A2D, which pads prompts on the left to whole blocks).

    A finished block never changes, so what is cached of it is exact. Each forward runs over the
    open blocks and reads everything earlier; the first one behind a finished block runs over that
    block too, which settles it in the cache with its final tokens. The prompt is filled in before
    the first round, by a forward that `num_forwards` does not count.

    For models trained with this attention: others lose quality. Needs blocks of the same length,
    counted from the same place (`FixedBlocks(block_len, aligned)`), of which several may be open
    (`MultiBlock`): each sees those before it as far as they are decided.

    Reference: Arriola et al., "Block Diffusion", arXiv:2503.09573, section 3; Cheng et al., "SDAR",
    arXiv:2510.06303; Wu et al., "Fast-dLLM v2", arXiv:2509.26328.

    Attributes:
      block_len: >= 1, positions per block, as trained. Static.
      aligned: see `ExactBlocks`. Static.
    """

    def allocate(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> ExactBlocksState:
        return self.allocate_blocks(cfg, batch_size, num_slots)

    def judge(
        self,
        params: Params,
        cfg: ModelConfig,
        canvas: Canvas,
        window_len: int,
        state: ExactBlocksState,
    ) -> tuple[jax.Array, ExactBlocksState, jax.Array]:
        return self.judge_blocks(params, cfg, canvas, window_len, state)


@struct.dataclass
class CausalContext(BlockCausal):
    """As `BlockCausal`, but finished blocks and the prompt are cached as a causal model reads them.

    An open block still sees all of itself. The cache is that of autoregressive decoding, so the
    same weights may judge from left to right what they have drafted in blocks
    (`SelfSpeculation`).

    For models trained so: `train.objectives.block_diffusion` with `causal_context`.

    Reference: Liu et al., "TiDAR: Think in Diffusion, Talk in Autoregression", arXiv:2511.08923;
    Nemotron-Labs-Diffusion, arXiv:2607.05722 (its diffusion mode).

    Attributes:
      block_len: >= 1, positions per block, as trained. Static.
      aligned: see `ExactBlocks`. Static.
    """

    settles_causally: ClassVar[bool] = True
