"""What masked-diffusion decoding is told: a component per axis, and how tokens are drawn.

Letters: B rows, G completion positions, W window positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decode.constraints.token_ban import TokenBan
from decode.core.component import check_numbers
from decode.core.requests import check_stop_ids
from decode.core.results import check_top_logprobs
from decode.diffusion.caches.canvas import CachePolicy
from decode.diffusion.caches.no_cache import NoCache
from decode.diffusion.confidences.probability import Probability
from decode.diffusion.contracts import (
    IMPLIED,
    WIDTHS,
    CommitRule,
    Component,
    Confidence,
    Constraint,
    Inputs,
    Reviser,
    Scheduler,
    Stopper,
)
from decode.diffusion.inputs.mask import MaskInputs
from decode.diffusion.revisers.keep import Keep
from decode.diffusion.rules.threshold import Threshold
from decode.diffusion.schedulers.fixed_blocks import FixedBlocks
from decode.diffusion.stoppers.end_of_text import Filled
from dlm.config import ModelConfig

AXES: dict[str, type[Component]] = {
    "scheduler": Scheduler,
    "cache": CachePolicy,
    "confidence": Confidence,
    "rule": CommitRule,
    "reviser": Reviser,
    "stopper": Stopper,
    "constraint": Constraint,
    "inputs": Inputs,
}


def check_axes(components: Mapping[str, Any]) -> None:
    """Raises ValueError unless every component, by axis, is one of that axis."""
    for axis, component in components.items():
        if not isinstance(component, AXES[axis]):
            raise ValueError(f"{axis}={component!r} must be of class {AXES[axis].__name__}")


class DiffusionMethod(struct.PyTreeNode):
    """A decoding method: one component per axis, and how tokens are drawn.

    Attributes:
      scheduler: which positions are eligible now.
      cache: which positions are recomputed.
      confidence: how sure each proposal is.
      rule: which proposals are committed.
      reviser: whether decided tokens may change.
      stopper: when a row is done before it is full.
      constraint: which tokens are allowed.
      inputs: what the model sees at undecided positions.
      temperature: > 0; proposals are drawn from softmax(z / temperature), while confidences are
        those of softmax(z). None: the arg-max.
      guidance: classifier-free guidance scale w >= 0: z_u + (w + 1) (z_c - z_u), where z_u sees
        MASK in place of the prompt. Twice the forwards. None: off.
      lookahead: d >= 0; the same rounds run with fewer forwards, by guessing d of them ahead, see
        `decode.diffusion.lookahead`. 0: off. Static.
      stop_ids: [n] int32. Tokens that end a text, besides the model's end-of-text.
      top_logprobs: >= 0, how many of the most probable tokens are reported per position. Static.
    """

    scheduler: Scheduler = FixedBlocks()
    cache: CachePolicy = NoCache()
    confidence: Confidence = Probability()
    rule: CommitRule = Threshold()
    reviser: Reviser = Keep()
    stopper: Stopper = Filled()
    constraint: Constraint = TokenBan()
    inputs: Inputs = MaskInputs()
    temperature: jax.Array | float | None = None
    guidance: jax.Array | float | None = None
    lookahead: int = struct.field(pytree_node=False, default=0)
    stop_ids: jax.Array | tuple[int, ...] = ()
    top_logprobs: int = struct.field(pytree_node=False, default=0)

    def end_ids(self, cfg: ModelConfig) -> jax.Array:
        """[n] int32: tokens that end a text."""
        ids = jnp.asarray(self.stop_ids, jnp.int32).reshape(-1)
        return jnp.append(ids, jnp.asarray(cfg.eos_ids, jnp.int32))

    @property
    def components(self) -> dict[str, Component]:
        """By axis."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def needs(self) -> frozenset[str]:
        """What any component needs, and what follows from that; keys of `NEEDS`."""
        needs = frozenset[str]().union(*(c.needs for c in self.components.values()))
        needs |= {"canvas"} if self.lookahead else frozenset()
        return needs.union(*(IMPLIED.get(need, frozenset()) for need in needs))

    @property
    def width(self) -> str:
        """What the window shows: the most that any component needs; one of `WIDTHS`."""
        return max(self.needs & set(WIDTHS), key=WIDTHS.index, default="block")

    def who_needs(self, need: str) -> str:
        """Names of the components that need something, for messages."""
        return " and ".join(c.name for c in self.components.values() if need in c.needs)

    def window_len(self, gen_len: int) -> int:
        """W, for rows of up to `gen_len` completion positions."""
        return self.scheduler.window_len(gen_len) if self.width == "block" else gen_len

    def validate(self, cfg: ModelConfig) -> None:
        """Raises ValueError, in one sentence, if the method makes no sense for the model."""
        check_axes(self.components)
        for part in (self, *self.components.values()):
            check_numbers(part)
        for component in self.components.values():
            component.validate(cfg)
        check_top_logprobs(self.top_logprobs, cfg.vocab_size)
        if cfg.block_len is not None and self.cache.looks_ahead:
            raise ValueError(
                f"{self.cache.name} shows what stands behind a block, which the model never saw in "
                f"training: use BlockCausal({cfg.block_len}) with aligned blocks of {cfg.block_len}"
            )
        for width in WIDTHS[WIDTHS.index(self.cache.covers) + 1 :]:
            if who := self.who_needs(width):
                raise ValueError(
                    f"{who} must see the whole {width}, but {self.cache.name} recomputes only the "
                    f"{self.cache.covers}: use another cache"
                )
        if self.confidence.only_orders and (who := self.who_needs("values")):
            raise ValueError(
                f"{who} compares confidences with a number, but those of {self.confidence.name} "
                "only order positions: use a rule that ranks, such as Quota"
            )
        for component in self.components.values():
            if reason := component.refuse(self):
                raise ValueError(reason)
        if self.temperature is not None and not float(self.temperature) > 0:
            raise ValueError(
                f"temperature={float(self.temperature):g} must be positive, or None for greedy"
            )
        if self.guidance is not None and not float(self.guidance) >= 0:
            raise ValueError(f"guidance={float(self.guidance):g} must be at least 0, or None")
        if self.guidance is not None and cfg.logit_cap is not None:
            raise ValueError(
                f"guidance={float(self.guidance):g} mixes logits through hidden states, which "
                f"logits with logit_cap={cfg.logit_cap} do not allow: leave it out"
            )
        check_stop_ids(self.stop_ids, cfg)
        if self.lookahead < 0:
            raise ValueError(f"lookahead={self.lookahead} must be at least 0")
        if self.lookahead and (reason := self._refuse_lookahead()):
            raise ValueError(reason)

    def _refuse_lookahead(self) -> str | None:
        blockers = (
            self.cache.name if self.cache.covers != "canvas" else "",
            self.who_needs("shadow"),
            self.inputs.name if not self.inputs.shows_mask or self.inputs.remembers else "",
        )
        for blocker in blockers:
            if blocker:
                return (
                    f"lookahead={self.lookahead} judges several canvases at once, which {blocker} "
                    "does not allow: leave it out"
                )
        return None
