"""The most probable token, one after the other."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import struct

from decode.search.contracts import Choice, Round, Strategy


@struct.dataclass
class Greedy(Strategy):
    """One hypothesis; what search is compared with, and what penalties and bans are tried with."""

    @classmethod
    def points(cls) -> Mapping[str, Strategy]:
        return {"greedy": cls()}

    def choose(self, seen: Round, state: tuple[()]) -> Choice:
        token, log_prob = (x[:, :, 0, 0] for x in seen.best(1))
        return Choice(
            source=jnp.zeros_like(token),
            token=token,
            log_prob=log_prob,
            score=seen.score + log_prob,
            candidates=token[:, :, None],
            node=jnp.zeros_like(token),
            is_done=seen.is_end(token[:, 0]),
            state=state,
        )
