"""MASK where nothing is decided."""

from __future__ import annotations

from flax import struct

from decode.diffusion.contracts import Inputs
from dlm.config import ModelConfig


@struct.dataclass
class MaskInputs(Inputs):
    """The model's MASK token."""

    def validate(self, cfg: ModelConfig) -> None:
        if cfg.mask_token_id is None:
            raise ValueError(
                "mask_token_id=None: masked diffusion needs a model with a MASK token; models "
                "trained on noise take inputs=UniformNoise()"
            )
