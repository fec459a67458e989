"""How an autoregressive text is made: a pytree of choices, checked as a whole."""

from __future__ import annotations

import jax
from flax import struct

from decode.core.component import check_numbers
from decode.core.requests import check_stop_ids
from decode.core.results import check_top_logprobs
from decode.core.sampling import Sampling
from decode.speculative.accept import AcceptanceRule, Match
from decode.speculative.contracts import Drafter
from decode.speculative.controller import Controller
from decode.speculative.drafters.no_draft import NoDraft
from dlm.config import ModelConfig

GREEDY = Sampling(temperature=None)


class SpeculativeMethod(struct.PyTreeNode):
    """How an autoregressive text is made.

    Attributes:
      drafter: who proposes.
      acceptance: which drafts are kept.
      sampling: the distribution of the text.
      stop_ids: [n] int32. Tokens that end a text, besides the model's end-of-text.
      top_logprobs: >= 0, how many of the most probable tokens are reported per position. Static.
      controller: how many drafts are judged in a round; None: always all. Rows of a batch share
        this choice, so with drawn drafts and `SpeculativeSampling` or `BlockVerification` a text
        follows the same law in any company, but is not the same text.
    """

    drafter: Drafter = NoDraft()
    acceptance: AcceptanceRule = Match()
    sampling: Sampling = GREEDY
    stop_ids: jax.Array | tuple[int, ...] = ()
    top_logprobs: int = struct.field(pytree_node=False, default=0)
    controller: Controller | None = None

    def validate(self, cfg: ModelConfig) -> None:
        """Raises ValueError, in one sentence, unless the choices make sense for the model."""
        self.check_kinds()
        for part in (self.drafter, self.acceptance, self.sampling, self.controller):
            if part is not None:
                part.validate(cfg)
        check_top_logprobs(self.top_logprobs, cfg.vocab_size)
        if cfg.writes_in_place and cfg.mask_token_id is None:
            raise ValueError(
                f"mask_token_id=None must be a token id: with block_len={cfg.block_len} and "
                "shifted_logits=False the model writes where MASK stands"
            )
        for choice in (self.drafter, self.acceptance, self.controller):
            if choice is not None and (reason := choice.refuse(self)):
                raise ValueError(reason)
        check_stop_ids(self.stop_ids, cfg)

    def check_kinds(self) -> None:
        """Raises ValueError unless every choice is of its class, and numbers are numbers."""
        kinds = {"drafter": Drafter, "acceptance": AcceptanceRule, "sampling": Sampling}
        if self.controller is not None:
            kinds["controller"] = Controller
        check_numbers(self)
        for name, kind in kinds.items():
            if not isinstance(part := getattr(self, name), kind):
                raise ValueError(f"{name}={part!r} must be of class {kind.__name__}")
            check_numbers(part)

    @property
    def needs_probs(self) -> bool:
        """Whether [B, W, V] probabilities are made."""
        wanted = self.acceptance.needs_probs or self.drafter.needs_probs
        return wanted or self.sampling.has_filters
