"""When a second look at a block pays: the routing of S2D2, as a rule on what was proposed.

S2D2 lets a block-diffusion model judge some of its proposals from left to right, in a forward of
its own, and commits the others as usual. Whether the forward is worth it, it says of the first run
of undecided positions, the span: a proposal whose distribution has entropy H over V tokens is
accepted with probability about

    alpha_i = exp(-t H_i / log V)        gain = sum_k prod_{i <= k} alpha_i    (tokens)

    score_threshold     judge if  score = gain - cost >= threshold
    score_hysteresis    from a score above `on` until one below `off`
    mask_span_length    judge if the span has `min_span` positions

`cost` is `penalty`, or, dynamic, `penalty` times the positions that are committed without it: those
more probable than `sure`.

What is written so is not the autoregressive text: the routed mode is **lossy**. Here is the rule
alone. The mode would need, within one round of the diffusion loop, a second forward that depends on
the first one's proposals, behind a cache that is read causally: no component of the loop runs the
model but the cache, once. What is lossless, a judged block in every round, is a drafter:
`decode.speculative.drafters.self_speculation`.

Reference: "S2D2", arXiv:2603.25702, and the public code (279500a).

Letters: B rows, W positions of a block.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

Policy = Literal["score_threshold", "score_hysteresis", "mask_span_length"]


class Route(struct.PyTreeNode):
    """What is made of a block.

    Attributes:
      judges: [B] bool. Whether the span is to be judged.
      span: [B, W] bool. The first run of undecided positions.
      gain: [B] float32. Tokens of it that are expected to be accepted.
    """

    judges: jax.Array
    span: jax.Array
    gain: jax.Array


@struct.dataclass
class Routing:
    """Which blocks are judged.

    Attributes:
      policy: see above. Static.
      is_dynamic: whether the cost depends on what is sure. Static.
      penalty: >= 0, tokens (published: 1; LLaDA2.1: 4).
      threshold: any number.
      on, off: any number each.
      min_span: >= 1.
      sure: in [0, 1].
      temperature: > 0, t.
    """

    policy: Policy = struct.field(pytree_node=False, default="score_threshold")
    is_dynamic: bool = struct.field(pytree_node=False, default=False)
    penalty: jax.Array | float = 1.0
    threshold: jax.Array | float = 0.0
    on: jax.Array | float = 1.0
    off: jax.Array | float = -5.0
    min_span: jax.Array | int = 1
    sure: jax.Array | float = 0.85
    temperature: jax.Array | float = 1.0

    def route(
        self,
        undecided: jax.Array,
        entropy: jax.Array,
        probability: jax.Array,
        vocab_size: int,
        judged: jax.Array,
    ) -> Route:
        """What is made of blocks.

        Args:
          undecided: [B, W] bool.
          entropy: [B, W] float32, in nats, of the distribution of every position.
          probability: [B, W] float32. Of what is proposed there.
          vocab_size: V.
          judged: [B] bool. Whether the block was judged in the round before; at first not.
        """
        is_behind = jnp.cumsum(undecided, axis=1) > 0
        span = jnp.cumprod(jnp.where(is_behind, undecided, True), axis=1).astype(bool) & undecided
        alpha = jnp.exp(-self.temperature * entropy / jnp.log(vocab_size))
        reach = jnp.cumprod(jnp.where(span, alpha, 1.0), axis=1)
        gain = jnp.where(span, reach, 0.0).sum(axis=1)
        cost = jnp.full_like(gain, self.penalty)
        if self.is_dynamic:
            cost = cost * (undecided & (probability > self.sure)).sum(axis=1)
        score = gain - cost
        if self.policy == "mask_span_length":
            judges = span.sum(axis=1) >= self.min_span
        elif self.policy == "score_hysteresis":
            judges = (score > self.on) | (judged & (score >= self.off))
        else:
            judges = score >= self.threshold
        return Route(judges, span, gain)
