"""AdaDec: greedy where the model is sure; else the best candidates, by a look ahead of each.

Reference: He et al., "Towards Better Code Generation: Adaptive Decoding with Uncertainty Guidance"
(AdaDec), arXiv:2506.08980, the fixed-length variant with a greedy backbone, and the public code.
Where the entropy of the next token reaches theta, each of the most probable tokens c is followed by
up to L greedy ones, and that is written for which

    S_c = (log p(c) + log-probabilities of what was rolled out) / (1 + its number of tokens)

is highest. A rollout ends before a token that ends a text, and with the longest text there may be;
a candidate that ends a text has none. theta is for one model, in nats: learn it with
`python -m scripts.adadec_threshold`. Published: deepseek-1.3b 0.985, deepseek-6.7b 1.134, stable-3b
1.100, qwen3-0.6b 1.321, qwen3-1.7b 0.615, qwen3-4b 0.713, qwen3-8b 0.706.

Of the best rollout stays what would be written anyway: as far as every token in it came where the
model was sure. So a pause costs no more rounds than it must, and the text is the same.

Letters: B prompts, K hypotheses, w of them that were read, S slots, G completion positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.search.contracts import NEVER, Choice, Results, Round, Strategy, Texts
from decode.search.strategies.trials import Trials, check_mask, go_on, of_read
from dlm.config import ModelConfig


class AdaDecState(struct.PyTreeNode):
    """What is rolled out, and what it took.

    Attributes:
      trials: candidates with their rollouts.
      num_sure: [B, K] int32. Tokens of each that would be written anyway, the candidate included.
      is_sure: [B, K] bool. Whether the next one would.
      num_pauses: [B] int32. Tokens that were chosen by a look ahead.
      num_rolled: [B] int32. Tokens of all rollouts.
      num_read: [B] int32. Tokens that were read, each of every rollout.
    """

    trials: Trials
    num_sure: jax.Array
    is_sure: jax.Array
    num_pauses: jax.Array
    num_rolled: jax.Array
    num_read: jax.Array


@struct.dataclass
class AdaDec(Strategy):
    """Pauses where the model is unsure, and takes the candidate that goes on best.

    Attributes:
      theta: any number, the entropy in nats from which on it pauses; infinite: never.
      num_tried: >= 1, candidates. Static.
      look_ahead: L >= 0, most tokens of a rollout.
      min_rollout: >= 0, a candidate with a shorter one is only taken if all are shorter.
      stops: [V] bool. Tokens before which a rollout ends, besides those that end a text; None:
        none.
    """

    takes_back: ClassVar[bool] = True

    theta: jax.Array | float = 1.0
    num_tried: int = struct.field(pytree_node=False, default=3)
    look_ahead: jax.Array | int = 5
    min_rollout: jax.Array | int = 0
    stops: jax.Array | None = None

    @classmethod
    def points(cls) -> Mapping[str, Strategy]:
        return {"adadec": cls()}

    def validate(self, cfg: ModelConfig) -> None:
        if math.isnan(float(self.theta)):
            raise ValueError(f"theta={float(self.theta):g} must be a number")
        if not 1 <= self.num_tried <= cfg.vocab_size:
            raise ValueError(
                f"num_tried={self.num_tried} must be in [1, vocab_size={cfg.vocab_size}]"
            )
        for name in ("look_ahead", "min_rollout"):
            if not int(getattr(self, name)) >= 0:
                raise ValueError(f"{name}={int(getattr(self, name))} must be at least 0")
        if self.stops is not None:
            check_mask("stops", self.stops, cfg)

    @property
    def width(self) -> int:
        return self.num_tried

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(sorted({1, self.num_tried}))

    @property
    def num_results(self) -> int:
        return 1

    def init(self, cfg: ModelConfig, B: int, S: int, G: int) -> AdaDecState:
        none = jnp.zeros(B, jnp.int32)
        lanes = jnp.zeros((B, self.width), jnp.int32)
        return AdaDecState(Trials.none(B, self.width), lanes, lanes > 0, none, none, none)

    def num_live(self, state: AdaDecState) -> jax.Array:
        return state.trials.num

    def counts(self, state: AdaDecState) -> Mapping[str, jax.Array]:
        """Pauses, tokens of rollouts (forwards beyond one per token are for these), tokens read."""
        names = ("num_pauses", "num_rolled", "num_read")
        return {name: getattr(state, name) for name in names}

    def choose(self, seen: Round, state: AdaDecState) -> Choice:
        K, before = self.width, state.trials
        is_new = before.are_none
        is_longest = seen.length + 1 >= seen.end  # then there is nothing to look at
        is_unsure = seen.stats(K).entropy[:, :, 0] >= self.theta  # [B, w], of the model itself
        is_unsure &= ~is_longest[:, None]
        pauses = is_new & is_unsure[:, 0]
        trials = before.opened(jnp.where(pauses, K, 1), seen.num_written)

        # The best tokens behind the first hypothesis; behind rollouts the best one each.
        tokens, log_probs = (
            jnp.where(is_new[:, None], x[:, 0, 0], of_read(x[:, :, 0, 0], K)) for x in seen.best(K)
        )
        stops = seen.is_end(tokens)
        if self.stops is not None:
            stops |= jnp.asarray(self.stops)[tokens]
        runs = ~trials.has_ended
        is_written = runs & (is_new[:, None] | ~stops)
        is_full = trials.num_tokens + is_written >= 1 + self.look_ahead
        trials = trials.grown(is_written, log_probs, stops | is_full | is_longest[:, None])

        is_sure = is_new[:, None] | (state.is_sure & ~of_read(is_unsure, K))
        stays = is_sure & is_written
        num_sure = jnp.where(is_new[:, None], 0, state.num_sure) + stays
        score = of_read(seen.score, K)
        score = jnp.where(is_new[:, None], score[:, :1], score)

        is_one = jnp.arange(K)[None] < trials.num[:, None]
        enough = is_one & (trials.num_tokens > self.min_rollout)
        enough |= is_one & ~enough.any(axis=1, keepdims=True)
        winner = jnp.argmax(jnp.where(enough, trials.mean, NEVER), axis=1)
        return go_on(
            seen, before, trials,
            is_written=is_written,
            token=tokens,
            log_prob=log_probs,
            score=score + jnp.where(stays, log_probs, 0.0),
            winner=winner,
            num_kept=num_sure[jnp.arange(len(winner)), winner],
            state=AdaDecState(
                trials=trials,
                num_sure=num_sure,
                is_sure=is_sure,
                num_pauses=state.num_pauses + pauses,
                num_rolled=state.num_rolled + jnp.where(is_new, 0, is_written.sum(axis=1)),
                num_read=state.num_read + before.num,
            ),
        )  # fmt: skip

    def finish(self, texts: Texts, state: AdaDecState) -> Results:
        return state.trials.first_of(texts)
