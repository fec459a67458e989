"""What may be proposed at all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.diffusion.contracts import Constraint
from dlm.config import ModelConfig


@struct.dataclass
class TokenBan(Constraint):
    """Bans tokens: they are never proposed, and probabilities are renormalised without them.

    Attributes:
      ids: [n] int32 or a sequence of ints.
      ban_mask: whether the model's MASK token is banned too. Nothing in training stops a model from
        predicting MASK, so this is on by default; the published samplers leave it off, and then
        a committed MASK counts as decided.
    """

    ids: jax.Array | tuple[int, ...] = ()
    ban_mask: bool = struct.field(pytree_node=False, default=True)

    def validate(self, cfg: ModelConfig) -> None:
        for i in np.asarray(self.ids, np.int64):
            if not 0 <= i < cfg.vocab_size:
                raise ValueError(f"banned id {i} must be in [0, vocab_size={cfg.vocab_size})")

    def banned_ids(self, cfg: ModelConfig) -> jax.Array | None:
        ids = jnp.asarray(self.ids, jnp.int32).reshape(-1)
        if self.ban_mask and cfg.mask_token_id is not None:
            ids = jnp.append(ids, cfg.mask_token_id)
        return ids if ids.shape[0] else None
