"""The filters of autoregressive sampling, for proposals of masked diffusion.

Letters: B rows, W window positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.sampling import Sampling
from decode.diffusion.contracts import Constraint
from decode.diffusion.round import Frame
from dlm.config import ModelConfig


@struct.dataclass
class Filters(Constraint):
    """Bias, repetition penalty and filters, exactly as `decode.core.sampling` has them.

    They act on each position's distribution before anything is proposed, over the method's
    temperature if it has one; log-probabilities and confidences are of what they leave. Tokens
    count as repeated if the prompt or a decided position holds them, also one further right.

    Attributes:
      sampling: the filters; its temperature is not used.
      ids, ban_mask: tokens banned as well; as every constraint has them.
    """

    sampling: Sampling = Sampling(None)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        repeats = self.sampling.repetition_penalty is not None
        return frozenset({"logits"} | ({"occurred"} if repeats else set()))

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        self.sampling.validate(cfg)

    def mask_logits(self, frame: Frame, logits: jax.Array, state: Any) -> jax.Array:
        occurred = None if frame.occurred is None else frame.occurred[:, None]
        z = self.sampling.shift(logits, occurred)
        over = z if frame.temperature is None else z / frame.temperature
        return jnp.where(self.sampling.keeps(over), z, -jnp.inf)
