"""MASK where nothing is decided."""

from __future__ import annotations

from flax import struct

from decode.diffusion.contracts import Inputs


@struct.dataclass
class MaskInputs(Inputs):
    """The model's MASK token."""
