"""Evidence for a token, gathered over the steps of a block.

Reference: Wang et al., "CreditDecoding: Accelerating Parallel Decoding in Diffusion LLMs with Trace
Credit", arXiv:2510.06133, Eq. 5-7, with the constants of the public decoder (dInfer).

Letters: B rows, W window positions, V vocabulary, K slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Confidence, Points, check_range
from decode.diffusion.round import Round
from dlm.config import ModelConfig
from kernels_pallas.unembed_stats import Noise, logits_stats

if TYPE_CHECKING:
    from decode.diffusion.method import DiffusionMethod


@struct.dataclass
class Credit(Confidence):
    """Probability under logits that were raised for tokens which kept being the favourite.

    Each step, credits decay; then the arg-max of every undecided position gains p^gamma. Logits
    become z + alpha log(1 + credit), credit of this step included: the proposal may change, too.
    Credits start from zero in every block.

    Attributes:
      alpha: >= 0, strength of the fusion (0.7). 0: plain probability.
      gamma: >= 0, exponent on the favourite's probability; below 1 it lifts small ones (0.2).
      beta: in [0, 1], what a credit keeps from step to step (0.8).
    """

    short_name: ClassVar[str] = "credit"

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    alpha: jax.Array | float = 0.7
    gamma: jax.Array | float = 0.2
    beta: jax.Array | float = 0.8

    def validate(self, cfg: ModelConfig) -> None:
        check_range("alpha", self.alpha, 0, float("inf"))
        check_range("gamma", self.gamma, 0, float("inf"))
        check_range("beta", self.beta, 0, 1)

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> jax.Array:
        """[B, W, V] float32 credits."""
        return jnp.zeros((batch_size, window_len, cfg.vocab_size), jnp.float32)

    def measure(self, round: Round, state: jax.Array) -> tuple[Round, jax.Array]:
        assert round.logits is not None
        B, W, V = round.logits.shape
        credit = jnp.where(_is_first(round), 0.0, self.beta * state)
        favourite = jnp.arange(V)[None, None] == round.stats.token[..., None]
        gains = round.undecided & round.in_block
        gain = jnp.where(gains, jnp.exp(self.gamma * round.stats.log_prob), 0.0)
        credit = credit + jnp.where(favourite, gain[..., None], 0.0)
        fused = round.logits + self.alpha * jnp.log1p(credit)
        noise = None
        if round.temperature is not None:
            noise = Noise(round.noise_key.reshape(B * W, 2), round.temperature)
        stats = logits_stats(fused.reshape(B * W, V), noise=noise)
        token, sure = stats.token, stats.log_prob
        if stats.sample is not None and stats.sample_log_prob is not None:
            token, sure = stats.sample, stats.sample_log_prob
        token, sure = token.reshape(B, W), sure.reshape(B, W)
        logit = jnp.take_along_axis(round.logits, token[..., None], axis=-1)[..., 0]
        log_prob = logit - round.stats.logsumexp
        return round.replace(proposal=token, log_prob=log_prob, confidence=sure), credit


class Slots(struct.PyTreeNode):
    """Credits of the tokens that have any.

    Attributes:
      token: [B, W, K] int32; -1: the slot is free.
      credit: [B, W, K] float32.
    """

    token: jax.Array
    credit: jax.Array


@struct.dataclass
class SparseCredit(Confidence):
    """`Credit` in K slots per position instead of a table over the vocabulary; no logits needed.

    Equal to `Credit` as long as at most K different tokens have been a position's favourite in a
    block; then the smallest credit is given up. Greedy only: a sample would need all logits.

    Attributes:
      alpha, gamma: >= 0, as for `Credit`.
      beta: in [0, 1], as for `Credit`.
      num_slots: K in [1, vocab_size]. Static.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"given"})

    alpha: jax.Array | float = 0.7
    gamma: jax.Array | float = 0.2
    beta: jax.Array | float = 0.8
    num_slots: int = struct.field(pytree_node=False, default=8)

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {"sparse_credit": {"confidence": cls()}}

    def validate(self, cfg: ModelConfig) -> None:
        Credit(self.alpha, self.gamma, self.beta).validate(cfg)
        check_range("num_slots", self.num_slots, 1, cfg.vocab_size)

    def refuse(self, method: DiffusionMethod) -> str | None:
        if method.temperature is not None:
            return "SparseCredit is greedy: use Credit with a temperature"
        if method.lookahead:
            return "SparseCredit must know its slots before the forward: use Credit with lookahead"
        return None

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> Slots:
        shape = (batch_size, window_len, self.num_slots)
        return Slots(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))

    def given_ids(self, state: Slots) -> jax.Array:
        """[B, W, K]: tokens whose probabilities the round must know."""
        return jnp.maximum(state.token, 0)

    def measure(self, round: Round, state: Slots) -> tuple[Round, Slots]:
        stats = round.stats
        assert stats.given_log_probs is not None
        token = jnp.where(_is_first(round), -1, state.token)
        credit = jnp.where(token >= 0, self.beta * state.credit, 0.0)
        # The favourite goes to its slot, or to the one with least credit: free slots have none.
        is_favourite = token == stats.token[..., None]
        least = jnp.argmin(jnp.where(token >= 0, credit, -1.0), axis=-1)
        is_least = jnp.arange(self.num_slots)[None, None] == least[..., None]
        is_new = ~is_favourite.any(axis=-1, keepdims=True) & is_least
        takes = (round.undecided & round.in_block)[..., None] & (is_favourite | is_new)
        gain = jnp.exp(self.gamma * stats.log_prob)[..., None]
        credit = jnp.where(takes, jnp.where(is_new, 0.0, credit) + gain, credit)
        token = jnp.where(takes, stats.token[..., None], token)
        log_p = jnp.where(takes, stats.log_prob[..., None], stats.given_log_probs)
        log_p = jnp.where(token >= 0, log_p, -jnp.inf)

        # The best is in a slot: the favourite is, and what has no credit is below it.
        raised = log_p + self.alpha * jnp.log1p(credit)
        top = raised.max(axis=-1, keepdims=True)
        is_best = (raised == top) & (token >= 0)
        best = jnp.where(is_best, token, jnp.iinfo(jnp.int32).max).min(axis=-1)
        is_best = token == best[..., None]
        # 1 - sum p of the slots, without losing digits where the favourite is almost certain.
        others = jnp.where(token == stats.token[..., None], 0.0, jnp.exp(log_p)).sum(axis=-1)
        uncredited = jnp.maximum(-jnp.expm1(stats.log_prob) - others, 0.0)
        credited = jnp.where(is_best, 0.0, jnp.exp(raised - top)).sum(axis=-1)
        sure = -jnp.log1p(credited + uncredited * jnp.exp(-top[..., 0]))
        log_prob = jnp.where(is_best, log_p, -jnp.inf).max(axis=-1)
        # Decided positions have no slots and propose what they hold for the model.
        settled = ~round.undecided
        return round.replace(
            proposal=jnp.where(settled, round.proposal, best),
            log_prob=jnp.where(settled, round.log_prob, log_prob),
            confidence=jnp.where(settled, round.log_prob, sure),
        ), Slots(token, credit)


def _is_first(round: Round) -> jax.Array:
    """[B, 1, 1] bool: rows in the first round of their block."""
    return (round.block_step == 0)[:, None, None]
