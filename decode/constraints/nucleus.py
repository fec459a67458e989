"""Only likely tokens may be proposed: nucleus (top-p) and top-k filters, in Dream's order.

Letters: B rows, W window positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

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
        ordered = jnp.sort(z, axis=-1, descending=True)
        size = jnp.full((*z.shape[:-1], 1), z.shape[-1])  # [B, W, 1], how many tokens stay
        if self.top_p is not None:
            total = jnp.cumsum(jax.nn.softmax(ordered), axis=-1)
            nucleus = 1 + (total[..., :-1] <= self.top_p).sum(axis=-1, keepdims=True)
            # Rounded sums may exceed 1, but nothing is beyond all of it.
            size = jnp.where(jnp.asarray(self.top_p) < 1, nucleus, size)
        if self.top_k is not None:
            size = jnp.minimum(size, self.top_k)
        last = jnp.take_along_axis(ordered, size - 1, axis=-1)
        above, tied = z > last, z == last
        room = size - above.sum(axis=-1, keepdims=True)
        stays = above | (tied & (jnp.cumsum(tied, axis=-1) <= room))
        return jnp.where(stays, logits, -jnp.inf)
