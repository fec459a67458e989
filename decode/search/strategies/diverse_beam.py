"""Diverse beam search: groups of beams, each kept from the words that others have just chosen.

Reference: Vijayakumar et al., "Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence
Models", arXiv:1610.02424, Alg. 1, with Hamming dissimilarity. The K beams are M groups, which
advance one after the other in every round, after one forward for all of them. Scores of a group are

    log p(w) - diversity n(w),    n(w): beams of groups before it that have chosen w in this round

summed up, so the first group is beam search by K / M. Texts of all groups are put together in the
end, by those scores (as in Hugging Face's `generate`).

Letters: B prompts, K beams, M groups, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.component import check_numbers
from decode.search.contracts import Choice, Results, Round, Strategy, Texts, Weighed, taken
from decode.search.strategies.beam import Beam, BeamState
from dlm.config import ModelConfig


@struct.dataclass
class DiverseBeam(Strategy):
    """Beams in groups that avoid each other's words.

    Attributes:
      group: what each group does: K / M beams, their norm and when they end.
      num_groups: M >= 1. Static.
      diversity: >= 0, in nats, for every beam before that has chosen a word.
    """

    group: Beam = Beam(num_beams=2)
    num_groups: int = struct.field(pytree_node=False, default=3)
    diversity: jax.Array | float = 0.5

    @classmethod
    def points(cls) -> Mapping[str, Strategy]:
        return {"diverse_beam_6": cls()}

    def validate(self, cfg: ModelConfig) -> None:
        if not isinstance(self.group, Beam):
            raise ValueError(f"group={self.group!r} must be of class Beam")
        check_numbers(self.group)
        self.group.validate(cfg)
        if self.num_groups < 1:
            raise ValueError(f"num_groups={self.num_groups} must be at least 1")
        if not 0 <= float(self.diversity) < float("inf"):
            raise ValueError(f"diversity={float(self.diversity):g} must be finite and at least 0")

    @property
    def width(self) -> int:
        return self.group.width * self.num_groups

    def init(self, cfg: ModelConfig, B: int, S: int, G: int) -> tuple[BeamState, ...]:
        """What was put aside, by group."""
        return tuple(self.group.init(cfg, B, S, G) for _ in range(self.num_groups))

    def choose(self, seen: Round, state: tuple[BeamState, ...]) -> Choice:
        choices = [choice for choice, _ in self._of_groups(seen, state)]
        state = tuple(choice.state for choice in choices)
        together: Choice = jax.tree.map(
            lambda *parts: jnp.concatenate(parts, axis=1),
            *(choice.replace(state=None, is_done=None) for choice in choices),
        )
        is_done = jnp.stack([choice.is_done for choice in choices]).all(axis=0)
        return together.replace(state=state, is_done=is_done)

    def weigh(self, seen: Round, state: tuple[BeamState, ...]) -> Weighed:
        every = [weighed for _, weighed in self._of_groups(seen, state)]
        together: Weighed = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *every)
        return together

    def _of_groups(
        self, seen: Round, state: tuple[BeamState, ...]
    ) -> Iterator[tuple[Choice, Weighed]]:
        """What each group chooses, and among what."""
        size = self.group.width
        # Those that groups before make less likely may be any of the best.
        tokens, log_probs = (x[:, :, 0] for x in seen.best(2 * size + self.width))
        chosen = jnp.full((len(seen.length), 0), -1, jnp.int32)
        for m, aside in enumerate(state):
            first, last = m * size, (m + 1) * size
            here, log_p = tokens[:, first:last], log_probs[:, first:last]
            times = (here[..., None] == chosen[:, None, None]).sum(axis=-1)
            score = seen.score[:, first:last, None] + log_p - self.diversity * times
            choice = self.group.advance(seen.part(first, last), aside, here, log_p, score)
            # Groups that are done choose nothing.
            chosen = jnp.concatenate(
                [chosen, jnp.where(aside.is_done[:, None], -1, choice.token)], axis=1
            )
            parts = {"said": times.astype(jnp.float32)}
            yield choice.replace(source=choice.source + first), Weighed(here, score, parts).best()

    def finish(self, texts: Texts, state: tuple[BeamState, ...]) -> Results:
        size, found = self.group.width, []
        for m, aside in enumerate(state):
            of = lambda x, m=m: x[:, m * size : (m + 1) * size]  # noqa: E731
            part = dataclasses.replace(
                texts, tokens=of(texts.tokens), log_prob=of(texts.log_prob), score=of(texts.score)
            )
            found.append(self.group.finish(part, aside))
        every = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *found)
        order = jnp.argsort(-every.score, axis=1, stable=True)
        best: Results = jax.tree.map(lambda x: taken(x, order), every)
        return best
