"""Tokens that may never be proposed, and nothing else."""

from __future__ import annotations

import jax
from flax import struct

from decode.diffusion.contracts import Constraint


@struct.dataclass
class TokenBan(Constraint):
    """Bans tokens; by default none but MASK.

    Attributes:
      ids, ban_mask: as every constraint has them.
    """

    ids: jax.Array | tuple[int, ...] = ()
    ban_mask: bool = struct.field(pytree_node=False, default=True)
