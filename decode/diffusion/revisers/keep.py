"""Whether decided tokens may change."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

from decode.diffusion.contracts import Reviser, Revision, Round


@struct.dataclass
class Keep(Reviser):
    """A decided token stays."""

    def revise(self, view: Round, commit: jax.Array, state: Any) -> tuple[Revision, Any]:
        return Revision(commit), state
