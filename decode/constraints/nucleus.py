"""Only likely tokens may be proposed: nucleus (top-p) and top-k filters, in Dream's order.

Letters: B rows, W window positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.sampling import lowest_before
from decode.diffusion.contracts import Constraint, check_range
from decode.diffusion.step import Frame
from dlm.config import ModelConfig


@struct.dataclass
class Nucleus(Constraint):
    """Cuts the tail of each position's distribution off, before anything is proposed.

    The distribution is that of logits divided by the method's temperature, if it has one. Its
    nucleus is the shortest run of tokens, from the most probable down, whose probability together
    exceeds `top_p`, or all of it; of these at most `top_k` stay. The surest token always stays.
    Probabilities are renormalised without the rest, as without banned tokens, so log-probabilities
    and all confidences are of the filtered distribution; `Tempered` ones are Dream's.

    Deviation: equally probable tokens stay in the order of their ids, so at most `top_k` do; the
    public code keeps all that are as probable as the last of them.

    Reference: Ye et al., "Dream 7B", arXiv:2508.15487, `sample_tokens` of the public code. Holtzman
    et al., "The Curious Case of Neural Text Degeneration", arXiv:1904.09751 (nucleus).

    Attributes:
      top_p: in (0, 1]; 1 keeps everything. None: off.
      top_k: >= 1. None: off.
      ids, ban_mask: tokens banned as well, before the filters; as every constraint has them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    top_p: jax.Array | float | None = None
    top_k: jax.Array | int | None = None

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        if self.top_p is not None and not 0 < float(self.top_p) <= 1:
            raise ValueError(f"top_p={float(self.top_p):g} must be in (0, 1], or None")
        if self.top_k is not None:
            check_range("top_k", self.top_k, 1, float("inf"), ", or None")

    def mask_logits(self, frame: Frame, logits: jax.Array, state: Any) -> jax.Array:
        """[B, W, V] logits, not divided by the temperature, with -inf where they are cut off."""
        z = logits if frame.temperature is None else logits / frame.temperature
        p = jax.nn.softmax(z)
        # Rounded sums may exceed 1, but nothing is beyond all of it.
        mass = (
            None
            if self.top_p is None
            else jnp.where(jnp.asarray(self.top_p) < 1, self.top_p, jnp.inf)
        )
        last = jnp.full((*z.shape[:-1], 1), -jnp.inf, z.dtype)  # [B, W, 1], the last that stays
        if mass is not None:
            last = lowest_before(z, p, jnp.nextafter(mass, jnp.inf))
        if self.top_k is not None:
            last = jnp.maximum(last, lowest_before(z, jnp.ones_like(z), jnp.float32(self.top_k)))
        above, tied = z > last, z == last
        place = jnp.cumsum(tied, axis=-1)  # of equals, from 1
        if mass is not None:
            before = jnp.where(above, p, 0).sum(axis=-1, keepdims=True)
            tied &= before + p * (place - 1) <= mass
        if self.top_k is not None:
            tied &= place <= self.top_k - above.sum(axis=-1, keepdims=True)
        return jnp.where(above | tied, logits, -jnp.inf)
