"""Re-masking that leaves the diffusion's marginals as they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.streams import Stream, draw_uniform
from decode.diffusion.contracts import Points, Reviser, check_range
from decode.diffusion.round import Revision, Round
from dlm.config import ModelConfig


@struct.dataclass
class ReMDM(Reviser):
    """Samples a block in `steps` rounds, in which tokens may also turn back into MASK.

    The share of decided positions grows linearly, alpha = i / steps before round i and
    alpha' = (i + 1) / steps after it. In round i each decided position is undecided again with
    probability sigma, and each undecided one is decided with probability

        (alpha' - (1 - sigma) alpha) / (1 - alpha),

    so that a position is decided with probability alpha whatever sigma is. sigma is limited by
    sigma_max = min(1, (1 - alpha') / alpha), and it is

        "cap"       min(eta, sigma_max)
        "rescale"   eta sigma_max.

    eta = 0 is ancestral sampling of a masked diffusion model. The last round decides everything.

    It decides by itself: what the rule would commit, and confidences, make no difference. Each
    block takes exactly `steps` forwards, full or not. Pair it with temperature 1 and one block to
    sample as the paper does. (A scheduler that offers part of a block at a time may need a few
    rounds more, which then decide all that is eligible.)

    Reference: Wang et al., "Remasking Discrete Diffusion Models with Inference-Time Scaling",
    arXiv:2503.00307, sections 3 and 4. There time is continuous and stops at eps, and what is still
    MASK is decided at the end; here the last step reaches alpha = 1. Left out: the "conf" and
    "loop" schedules, nucleus sampling, and reusing the forward of a round that changed nothing.

    Attributes:
      steps: >= 1, rounds per block.
      eta: in [0, 1].
      schedule: "cap" or "rescale". Static.
    """

    steps: jax.Array | int = 32
    eta: jax.Array | float = 0.02
    schedule: str = struct.field(pytree_node=False, default="cap")

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {"remdm": {"reviser": cls(block_len)}}

    def validate(self, cfg: ModelConfig) -> None:
        check_range("steps", self.steps, 1, float("inf"))
        check_range("eta", self.eta, 0, 1)
        if self.schedule not in ("cap", "rescale"):
            raise ValueError(f"schedule={self.schedule!r} must be 'cap' or 'rescale'")

    def revise(self, round: Round, commit: jax.Array, state: tuple) -> tuple[Revision, tuple]:
        steps = jnp.asarray(self.steps, jnp.int32)
        i = jnp.minimum(round.block_step, steps - 1)
        # In units of 1 / steps: alpha = i, 1 - alpha' = after; exact at both ends.
        i, after = i.astype(jnp.float32), (steps - 1 - i).astype(jnp.float32)
        sigma_max = jnp.minimum(after / jnp.maximum(i, 1), 1)
        sigma = (
            self.eta * sigma_max if self.schedule == "rescale" else jnp.minimum(self.eta, sigma_max)
        )
        decide = (1 + sigma * i) / (after + 1)

        uniform = draw_uniform(round.noise_key, Stream.REMDM)
        take_back = round.in_block & ~round.undecided & (uniform < sigma[:, None])
        hold = round.block_step + 1 < steps
        return Revision(round.eligible & (uniform < decide[:, None]), take_back, hold), state
