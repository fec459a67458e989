"""How texts are searched for: a pytree of choices, checked as a whole."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

from decode.core.component import check_numbers
from decode.core.hso import HSO
from decode.core.requests import check_stop_ids
from decode.core.sampling import FILTERS, Sampling
from decode.diffusion.contracts import Constraint
from decode.search.contracts import Strategy
from dlm.config import ModelConfig

SERVED = frozenset({"logits", "occurred"})  # what constraints may need


class SearchMethod(struct.PyTreeNode):
    """How texts are searched for.

    Attributes:
      strategy: which hypotheses go on.
      sampling: bias, repetition penalty and, for strategies that draw, temperature and filters.
      no_repeat_ngram: n >= 0: no n tokens come up twice in a text, its prompt included; 0: they
        may. Static.
      constraint: what is allowed, see `decode.search.constrained`; None: everything.
      stop_ids: [m] int32. Tokens that end a text, besides the model's end-of-text.
      num_return: R >= 1, completions per prompt. Static.
      adaptation: steps of the prompt's keys and values before anything is written; None: none.
    """

    strategy: Strategy
    sampling: Sampling = Sampling(temperature=None)
    no_repeat_ngram: int = struct.field(pytree_node=False, default=0)
    constraint: Constraint | None = None
    stop_ids: jax.Array | tuple[int, ...] = ()
    num_return: int = struct.field(pytree_node=False, default=1)
    adaptation: HSO | None = None

    def check_kinds(self) -> None:
        """Raises ValueError if a choice is of another kind than its field's."""
        kinds = {
            "strategy": (Strategy, "Strategy"),
            "sampling": (Sampling, "Sampling"),
            "constraint": (Constraint | None, "Constraint, or None"),
        }
        for name, (kind, said) in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name}={value!r} must be of class {said}")

    def validate(self, cfg: ModelConfig) -> None:
        """Raises ValueError, in one sentence, unless the choices make sense for the model."""
        self.check_kinds()
        check_numbers(self)
        check_numbers(self.strategy)
        self.strategy.validate(cfg)
        self.sampling.validate(cfg)
        if self.adaptation is not None:
            if not isinstance(self.adaptation, HSO):
                raise ValueError(f"adaptation={self.adaptation!r} must be of class HSO, or None")
            check_numbers(self.adaptation)
            self.adaptation.validate(cfg)
        if self.strategy.width > 1 and self.strategy.num_candidates > 1:
            raise ValueError(
                f"width={self.strategy.width} and num_candidates={self.strategy.num_candidates}: "
                "one of them must be 1"
            )
        if self.no_repeat_ngram < 0:
            raise ValueError(f"no_repeat_ngram={self.no_repeat_ngram} must be at least 0")
        drawn = ("temperature", *FILTERS)
        given = [name for name in drawn if getattr(self.sampling, name) is not None]
        if given and not self.strategy.draws:
            name = type(self.strategy).__name__
            raise ValueError(f"{name} draws nothing, so {given[0]} goes without it")
        if self.strategy.draws and self.sampling.temperature is None:
            name = type(self.strategy).__name__
            raise ValueError(
                f"temperature must be positive: {name} draws, by default from {name}.sampling"
            )
        if self.strategy.looks_ahead:
            shaped: dict[str, Any] = {
                "no_repeat_ngram": self.no_repeat_ngram or None,
                "repetition_penalty": self.sampling.repetition_penalty,
            }
            if wrong := [name for name, value in shaped.items() if value is not None]:
                name = type(self.strategy).__name__
                raise ValueError(
                    f"{wrong[0]}={shaped[wrong[0]]} goes without {name}, which reads what follows "
                    "tokens that are not written yet"
                )
        self._check_constraint(cfg)
        most = self.strategy.num_results
        if not 1 <= self.num_return <= most:
            raise ValueError(
                f"num_return={self.num_return} must be in [1, {most}], see num_results"
            )
        if cfg.writes_in_place:
            raise ValueError(
                f"shifted_logits=False with block_len={cfg.block_len}: search needs a model that "
                "predicts the next token"
            )
        check_stop_ids(self.stop_ids, cfg)

    def _check_constraint(self, cfg: ModelConfig) -> None:
        """As `validate`."""
        constraint = self.constraint
        if constraint is None:
            return
        if self.strategy.takes_back:
            raise ValueError(
                f"constraint={constraint!r} goes without {type(self.strategy).__name__}, which "
                "takes texts back: its state could not follow"
            )
        constraint.validate(cfg)
        if further := sorted(constraint.needs - SERVED):
            raise ValueError(
                f"{constraint.name} needs {further[0]!r}, which a search does not have, only "
                f"{' and '.join(sorted(SERVED))}"
            )
        proposes = type(constraint).propose is not Constraint.propose
        if proposes and "logits" not in constraint.needs:
            raise ValueError(
                f"{constraint.name} changes proposals of a window, which a search has not: it must "
                "say in mask_logits what is allowed at one position"
            )

    @property
    def num_rows(self) -> int:
        """R, rows of the cache per prompt."""
        return 1 if self.strategy.shares_row else self.strategy.width

    @property
    def is_plain(self) -> bool:
        """Whether the model's own log-probabilities are what strategies see."""
        is_free = self.constraint is None and not self.no_repeat_ngram
        return is_free and not self.sampling.has_filters

    @property
    def keeps_occurred(self) -> bool:
        """Whether anybody asks which tokens came up."""
        asks = self.constraint is not None and "occurred" in self.constraint.needs
        return asks or self.sampling.repetition_penalty is not None
