"""Search under a constraint that only the host knows; see `decode.constraints.hosted`.

Every hypothesis has a state, which follows from its text: children of one share nothing that
changes. Before a round the host makes the masks of all hypotheses; those that rule anything out go
to the device, as a constraint like any other (`decode.search.constrained`), and where nothing is
asked of any hypothesis nothing goes there. Log-probabilities are not normalised again.

Letters: B prompts, K hypotheses, n masks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.constraints.hosted import Follower, HostConstraint, Masks, follow, pack
from decode.core import loop
from decode.core.component import as_kind
from decode.core.loop import FOREVER
from decode.diffusion.contracts import Constraint
from decode.diffusion.round import Frame
from decode.search.contracts import NEVER
from decode.search.loop import begin, step
from decode.search.method import SearchMethod
from decode.search.state import SearchState
from dlm.config import ModelConfig
from dlm.params import Params


class HostedSearch(SearchMethod):
    """A search under a constraint; `host` makes one.

    Attributes:
      follower: knows the constraint, and the states of texts. Static.
    """

    follower: Follower | None = struct.field(pytree_node=False, default=None)

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        if self.follower is None:
            raise ValueError("follower=None must be one: decode.search.hosted.host makes it")
        if self.constraint is not None:
            raise ValueError(
                f"constraint={self.constraint.name} must be None beside one on the host"
            )
        name = type(self.strategy).__name__
        if self.strategy.takes_back:
            raise ValueError(
                f"constraint must be None with {name}, whose rounds may read one hypothesis only"
            )
        if self.strategy.looks_ahead:
            raise ValueError(
                f"constraint must be None with {name}, which reads what follows tokens that are "
                "not written yet"
            )

    def at_device(self, masks: Masks | None) -> SearchMethod:
        """What the device needs to know for a round."""
        method = as_kind(SearchMethod, self)
        if masks is None:
            return method
        return method.replace(constraint=Masked(masks, self.strategy.width, ban_mask=False))


@struct.dataclass
class Masked(Constraint):
    """Masks for the hypotheses of one round.

    Attributes:
      masks: of some of them.
      num_hypotheses: K >= 1. Static.
      ids, ban_mask: as every constraint has them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    masks: Masks
    num_hypotheses: int = struct.field(pytree_node=False)

    def mask_logits(self, frame: Frame, logits: jax.Array, state: Any) -> jax.Array:
        allowed = self.masks.spread(len(logits) // self.num_hypotheses, self.num_hypotheses)
        return jnp.where(allowed.reshape(logits.shape), logits, -jnp.inf)


def host(method: SearchMethod, constraint: HostConstraint) -> HostedSearch:
    """A search whose texts obey a constraint."""
    return as_kind(HostedSearch, method, follower=follow(constraint, method.sampling))


class HostedSearchState(SearchState):
    """What is carried from round to round; states of the constraint follow from the tokens.

    Attributes:
      num_masked: [B] int32. Rounds in which a mask was sent.
      num_released: [B] int32. How often nothing was allowed behind a hypothesis, so that the
        constraint was released.
    """

    num_masked: jax.Array
    num_released: jax.Array


def prepare(
    params: Params, cfg: ModelConfig, method: HostedSearch, prompts: Sequence[Sequence[int]],
    **asked: Any,
) -> HostedSearchState:  # fmt: skip
    """The state before the first round.

    The arguments, and errors, are those of `decode.search.loop.begin`.
    """
    method.validate(cfg)
    state = begin(params, cfg, method.at_device(None), prompts, **asked)
    none = jnp.zeros_like(state.length)
    return as_kind(HostedSearchState, state, num_masked=none, num_released=jnp.copy(none))


_step = loop.compile_step(step)


def decode(
    params: Params,
    cfg: ModelConfig,
    method: HostedSearch,
    state: HostedSearchState,
    max_rounds: int = FOREVER,
    max_done: int = FOREVER,
) -> HostedSearchState:
    """Rounds until every prompt is done.

    The arguments are those of `decode.core.loop.compile_decode`; the state is given away.
    """
    follower = method.follower
    assert follower is not None
    num_masked, num_released = (np.zeros(state.length.shape, np.int32) for _ in range(2))
    for _ in range(max_rounds):
        done, tokens, length, start, score = jax.device_get(
            (state.has_stopped, state.tokens, state.length, state.prompt_len, state.score)
        )
        if done.sum() >= min(max_done, done.size):
            break
        masks = []
        for b in np.flatnonzero(~done).tolist():
            for k in np.flatnonzero(score[b] > NEVER / 2).tolist():
                known = follower.state_of(tokens[b, k, : length[b]], int(start[b]))
                opened, mask = follower.open(known)
                num_released[b] += opened is not known
                if not mask.all():
                    masks.append((b, k, mask))
        num_masked[list({b for b, _, _ in masks})] += 1
        state = _step(params, cfg, method.at_device(pack(masks)), state)
    return state.replace(
        num_masked=state.num_masked + num_masked, num_released=state.num_released + num_released
    )
