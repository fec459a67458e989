"""What masked-diffusion decoding carries from round to round.

Letters: B rows, P padded prompt length, G completion positions, S = P + G, W window positions.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

from decode.core.results import TopTokens
from decode.diffusion.method import DiffusionMethod
from dlm.config import ModelConfig


class ComponentStates(struct.PyTreeNode):
    """What each component remembers, by its axis: pytrees with a leading batch axis.

    That of the cache policy is `DiffusionState.cache`: it also has rows for guidance.
    """

    scheduler: Any
    confidence: Any
    rule: Any
    reviser: Any
    stopper: Any
    constraint: Any
    inputs: Any


def init_components(
    cfg: ModelConfig, method: DiffusionMethod, batch_size: int, window_len: int
) -> ComponentStates:
    """The states before the first round."""
    axes = ComponentStates.__dataclass_fields__
    return ComponentStates(
        **{axis: getattr(method, axis).init(cfg, batch_size, window_len) for axis in axes}
    )


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
      step_map: [B, G] int32. The row's 0-based round that decided a position; -1: undecided; 0
        where the token was given.
      log_prob: [B, G] float32. Log-probability of the token when it was committed.
      confidence: [B, G] float32 in [0, 1]. Confidence when it was committed.
      row_step: [B] int32. Rounds the row took part in.
      num_forwards: [B] int32. Forwards made for the row: its rounds, twice that with guidance.
      has_stopped: [B] bool.
      stopped_early: [B] bool. Ended by the stopper rather than by being full.
      key: [B, 2] uint32. One random stream per row.
      cache: the cache policy's state.
      components: the states of the components.
      num_steps: scalar int32. Rounds of the loop, for the whole batch.
      top: the n most probable tokens when positions were committed; None: they are not kept.
      drafts: [B, d, S] int32 and [B, d] int32: canvases guessed ahead and their ends; or None.
      given: [B, G] bool. Completion positions that hold a token of the prompt, which stands behind
        a gap of it; None: prompts have no gaps.
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
    components: ComponentStates
    num_steps: jax.Array
    top: TopTokens | None
    drafts: tuple[jax.Array, jax.Array] | None
    given: jax.Array | None
    prompt_len: int = struct.field(pytree_node=False)
