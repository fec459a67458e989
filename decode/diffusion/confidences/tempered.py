"""Confidences of the distribution that proposals are drawn from, temperature included.

Letters: B rows, W window positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import struct

from decode.diffusion.contracts import Confidence
from decode.diffusion.round import Round
from dlm.config import ModelConfig
from kernels_pallas.unembed_stats import logits_stats


@struct.dataclass
class Tempered(Confidence):
    """Another measure, taken of softmax(z / temperature) instead of softmax(z).

    z are the logits that the constraint left, so with `Nucleus` these are Dream's confidences:

        Tempered()                p[y]                      maskgit_plus
        Tempered(Margin())        p_(1) - p_(2)             topk_margin
        Tempered(NegEntropy())    minus the entropy of p    entropy

    Only the confidence changes; `log_prob` stays that without temperature. In a greedy method
    this is the measure itself.

    Deviation: the entropy is exact; the public code's ln(p + 1e-10) makes it smaller by up to 1e-10
    nats per token of the vocabulary.

    Reference: Ye et al., "Dream 7B", arXiv:2508.15487, `sample_tokens` of the public code.

    Attributes:
      base: the measure, one that reads only `stats` and `log_prob` of a round; None: the proposal's
        probability.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    base: Confidence | None = None

    def validate(self, cfg: ModelConfig) -> None:
        if self.base is None:
            return
        self.base.validate(cfg)
        if self.base.needs or jax.tree.leaves(self.base.init(cfg, 1, 1)):
            raise ValueError(
                f"Tempered(base={self.base.name}) must be of a measure without logits "
                "or memory of its own"
            )

    def measure(self, round: Round, state: Any) -> tuple[Round, Any]:
        assert round.logits is not None
        B, W, V = round.logits.shape
        z = round.logits if round.temperature is None else round.logits / round.temperature
        stats = logits_stats(z.reshape(B * W, V), given_ids=round.proposal.reshape(B * W, 1))
        stats = jax.tree.map(lambda x: x.reshape(B, W, *x.shape[1:]), stats)
        assert stats.given_log_probs is not None
        confidence = stats.given_log_probs[..., 0]
        if self.base is not None:
            tempered = round.replace(stats=stats, log_prob=confidence)
            confidence = self.base.measure(tempered, ())[0].confidence
        return round.replace(confidence=confidence), state
