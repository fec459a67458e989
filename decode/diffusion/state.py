"""What masked-diffusion decoding is told, a method, and what it carries, a state.

Letters: B rows, P padded prompt length, G completion positions, S = P + G, W window positions.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

from decode.constraints.token_ban import TokenBan
from decode.diffusion.caches.canvas import CachePolicy
from decode.diffusion.caches.no_cache import NoCache
from decode.diffusion.confidences.probability import Probability
from decode.diffusion.contracts import (
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
      lookahead: d >= 1 runs the same rounds with fewer forwards, by guessing d of them ahead; see
        `decode.diffusion.lookahead`. 0: off. Static.
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

    @property
    def components(self) -> tuple[Component, ...]:
        return (
            self.scheduler,
            self.cache,
            self.confidence,
            self.rule,
            self.reviser,
            self.stopper,
            self.constraint,
            self.inputs,
        )

    def validate(self, cfg: ModelConfig) -> None:
        """Raises ValueError, in one sentence, if the method makes no sense for the model."""
        for component in self.components:
            component.validate(cfg)
            if WIDTHS.index(component.width) > WIDTHS.index(self.cache.covers):
                raise ValueError(
                    f"{type(component).__name__} must see the whole {component.width}, but "
                    f"{type(self.cache).__name__} recomputes only the {self.cache.covers}: "
                    "use another cache"
                )
        for component in self.components:
            if reason := component.refuse(self):
                raise ValueError(reason)
        if self.temperature is not None and not float(self.temperature) > 0:
            raise ValueError(
                f"temperature={float(self.temperature):g} must be positive, or None for greedy"
            )
        if self.guidance is not None and not float(self.guidance) >= 0:
            raise ValueError(f"guidance={float(self.guidance):g} must be at least 0, or None")
        if self.lookahead < 0:
            raise ValueError(f"lookahead={self.lookahead} must be at least 0")
        blockers = [
            self.cache if self.cache.covers != "canvas" else None,
            self.reviser if self.needs_shadow else None,
            self.inputs if not isinstance(self.inputs, MaskInputs) else None,
        ]
        for blocker in blockers if self.lookahead else []:
            if blocker is not None:
                raise ValueError(
                    f"lookahead={self.lookahead} judges several canvases at once, which "
                    f"{type(blocker).__name__} does not allow: leave it out"
                )

    @property
    def width(self) -> str:
        """What the window shows: the most that any component asks for."""
        if self.lookahead:
            return "canvas"
        return max((component.width for component in self.components), key=WIDTHS.index)

    @property
    def needs_logits(self) -> bool:
        return any(component.needs_logits for component in self.components)

    @property
    def needs_shadow(self) -> bool:
        return any(component.needs_shadow for component in self.components)

    def window_len(self, gen_len: int) -> int:
        """W, for rows of up to `gen_len` completion positions."""
        return self.scheduler.window_len(gen_len) if self.width == "block" else gen_len


class DiffusionState(struct.PyTreeNode):
    """Everything the loop carries, and everything that is reported afterwards.

    Attributes:
      tokens: [B, S] int32. Prompts, left-padded to P, and completions; MASK where undecided.
      start: [B] int32. First real prompt position.
      end: [B] int32. Past the row's last completion position.
      block_start: [B] int32. The open block.
      block_end: [B] int32. Its end.
      block_step: [B] int32. Rounds since it was opened; 0: no forward has seen it.
      num_open: [B] int32. Undecided positions when it was opened.
      step_map: [B, G] int32. The row's 0-based round that decided a position; -1: undecided.
      log_prob: [B, G] float32. Log-probability of the token when it was committed.
      confidence: [B, G] float32 in [0, 1]. Confidence when it was committed.
      row_step: [B] int32. Rounds the row took part in.
      num_forwards: [B] int32. Forwards made for the row: its rounds, twice that with guidance.
      has_stopped: [B] bool.
      stopped_early: [B] bool. Ended by the stopper rather than by being full.
      key: [B, 2] uint32. One random stream per row.
      cache: the cache policy's state.
      components: the states of scheduler, confidence, rule, reviser, stopper and inputs.
      num_steps: scalar int32. Rounds of the loop, for the whole batch.
      drafts: [B, d, S] int32 and [B, d] int32: canvases guessed ahead and their ends; or None.
      prompt_len: P. Static.
    """

    tokens: jax.Array
    start: jax.Array
    end: jax.Array
    block_start: jax.Array
    block_end: jax.Array
    block_step: jax.Array
    num_open: jax.Array
    step_map: jax.Array
    log_prob: jax.Array
    confidence: jax.Array
    row_step: jax.Array
    num_forwards: jax.Array
    has_stopped: jax.Array
    stopped_early: jax.Array
    key: jax.Array
    cache: Any
    components: tuple[Any, ...]
    num_steps: jax.Array
    drafts: tuple[jax.Array, jax.Array] | None
    prompt_len: int = struct.field(pytree_node=False)
