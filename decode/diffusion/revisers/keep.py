"""Whether decided tokens may change."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import struct

from decode.diffusion.contracts import Reviser
from decode.diffusion.round import Revision, Round


@struct.dataclass
class Keep(Reviser):
    """A decided token stays."""

    changes: ClassVar[bool] = False

    def revise(self, round: Round, commit: jax.Array, state: Any) -> tuple[Revision, Any]:
        return Revision(commit), state
