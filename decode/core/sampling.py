"""From logits to what tokens are drawn from: bias, penalty, temperature, and filters.

They come in the order of Hugging Face's `generate`, and mean what they mean there; each filter is
about the distribution that those before it have left, of which it leaves one token at least:

    logit bias b            z + b, per token
    repetition penalty r    logits of tokens that came up before: z / r if z > 0, else z r
                            (Keskar et al., CTRL, arXiv:1909.05858)
    temperature T           z / T
    top-k                   the k largest logits, and all that equal the smallest of them
    top-p                   the fewest most probable tokens whose probabilities sum to at least p
                            (Holtzman et al., nucleus sampling, arXiv:1904.09751)
    min-p                   tokens at least m times as probable as the most probable one
                            (Nguyen et al., arXiv:2407.01082)
    typical p               the fewest tokens whose probabilities sum to at least p, those first
                            whose -log p is nearest to the entropy H
                            (Meister et al., locally typical sampling, arXiv:2202.00666)
    epsilon                 tokens of a probability of at least e
    eta                     tokens of a probability of at least min(e, sqrt(e) exp(-H))
                            (both Hewitt et al., arXiv:2210.15191)

Of tokens that are equal, top-p and typical p keep the first ones, as far as they are needed;
Hugging Face's typical p keeps all of them.

Letters: V vocabulary; `...` any leading axes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.component import check_numbers
from decode.core.streams import wrap
from dlm.config import ModelConfig

FILTERS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


class Sampling(struct.PyTreeNode):
    """How logits become probabilities. What is None is left out; numbers are traced.

    Attributes:
      temperature: > 0; None: the arg-max, with probability 1.
      top_k: at least 1.
      top_p: in (0, 1].
      min_p: in [0, 1].
      typical_p: in (0, 1].
      epsilon_cutoff: in [0, 1).
      eta_cutoff: in [0, 1).
      repetition_penalty: > 0; above 1 it makes tokens of prompt and completion less likely.
      logit_bias: [V] float32.
    """

    temperature: jax.Array | float | None = 1.0
    top_k: jax.Array | int | None = None
    top_p: jax.Array | float | None = None
    min_p: jax.Array | float | None = None
    typical_p: jax.Array | float | None = None
    epsilon_cutoff: jax.Array | float | None = None
    eta_cutoff: jax.Array | float | None = None
    repetition_penalty: jax.Array | float | None = None
    logit_bias: jax.Array | None = None

    def validate(self, cfg: ModelConfig) -> None:
        """Raises ValueError, in one sentence, on numbers that make no sense."""
        checks = {
            "temperature": ("positive, or None for the arg-max", lambda x: x > 0),
            "top_k": (f"in [1, vocab_size={cfg.vocab_size}]", lambda x: 1 <= x <= cfg.vocab_size),
            "top_p": ("in (0, 1]", lambda x: 0 < x <= 1),
            "min_p": ("in [0, 1]", lambda x: 0 <= x <= 1),
            "typical_p": ("in (0, 1]", lambda x: 0 < x <= 1),
            "epsilon_cutoff": ("in [0, 1)", lambda x: 0 <= x < 1),
            "eta_cutoff": ("in [0, 1)", lambda x: 0 <= x < 1),
            "repetition_penalty": ("positive", lambda x: x > 0),
        }
        check_numbers(self)
        for name, (wanted, is_right) in checks.items():
            value = getattr(self, name)
            if value is not None and not is_right(float(value)):
                raise ValueError(f"{name}={float(value):g} must be {wanted}")
        if self.logit_bias is not None and self.logit_bias.shape != (cfg.vocab_size,):
            raise ValueError(
                f"logit_bias has shape {self.logit_bias.shape}, not [vocab_size={cfg.vocab_size}]"
            )

    @property
    def is_cut(self) -> bool:
        """Whether tokens are drawn, and from some of them only."""
        return self.temperature is not None and any(getattr(self, x) is not None for x in FILTERS)

    @property
    def has_filters(self) -> bool:
        """Whether more than the temperature shapes the distribution."""
        names = (*FILTERS, "repetition_penalty", "logit_bias")
        return any(getattr(self, name) is not None for name in names)

    def probs(self, logits: jax.Array, occurred: jax.Array | None = None) -> jax.Array:
        """[..., V] float32 probabilities.

        Args:
          logits: [..., V] float32.
          occurred: [..., V] bool. Tokens that came up before; needed with a repetition penalty.
        """
        return self.law(self.shift(logits, occurred))

    def law(self, z: jax.Array) -> jax.Array:
        """[..., V] float32 probabilities of logits that bias and penalty have shifted."""
        if self.temperature is None:
            return jax.nn.one_hot(jnp.argmax(z, axis=-1), z.shape[-1], dtype=z.dtype)
        z = z / self.temperature
        return jax.nn.softmax(jnp.where(self.keeps(z), z, -jnp.inf), axis=-1)

    def shift(self, logits: jax.Array, occurred: jax.Array | None) -> jax.Array:
        """Logits [..., V] after bias and repetition penalty."""
        z = logits if self.logit_bias is None else logits + _last(self.logit_bias, logits.ndim)
        if self.repetition_penalty is None:
            return z
        assert occurred is not None
        penalised = jnp.where(z > 0, z / self.repetition_penalty, z * self.repetition_penalty)
        return jnp.where(occurred, penalised, z)

    def keeps(self, z: jax.Array) -> jax.Array:
        """[..., V] bool: what the filters leave of logits [..., V], over the temperature."""
        keep = jnp.ones(z.shape, bool)

        def left() -> jax.Array:
            return jax.nn.softmax(jnp.where(keep, z, -jnp.inf), axis=-1)

        if self.top_k is not None:
            keep = z >= lowest_before(z, jnp.ones_like(z), jnp.asarray(self.top_k, z.dtype))
        if self.top_p is not None:
            keep &= _fewest(z, left(), self.top_p)
        if self.min_p is not None:
            p = left()
            keep &= p >= self.min_p * p.max(axis=-1, keepdims=True)
        if self.typical_p is not None:
            p = left()
            surprise = -jnp.log(p)  # infinite where nothing is left
            keep &= _fewest(-jnp.abs(surprise - _entropy(p)), p, self.typical_p)
        if self.epsilon_cutoff is not None:
            keep &= _at_least(left(), self.epsilon_cutoff)
        if self.eta_cutoff is not None:
            p, least = left(), jnp.asarray(self.eta_cutoff, z.dtype)
            keep &= _at_least(p, jnp.minimum(least, jnp.sqrt(least) * jnp.exp(-_entropy(p))))
        return keep


def _fewest(score: jax.Array, p: jax.Array, mass: jax.Array | float) -> jax.Array:
    """[..., V] bool: the fewest tokens of highest scores that have the mass; at 1 all of them.

    Args:
      score: [..., V] float32.
      p: [..., V] float32. Probabilities.
      mass: in (0, 1].
    """
    # Rounded sums may reach 1 before the last token.
    limit = jnp.where(jnp.asarray(mass, p.dtype) < 1, mass, jnp.inf).astype(p.dtype)
    last = lowest_before(score, p, limit)
    is_last, above = score == last, jnp.where(score > last, p, 0).sum(axis=-1, keepdims=True)
    # Of equals the first ones, as far as they are needed.
    before = above + jnp.cumsum(jnp.where(is_last, p, 0), axis=-1) - p
    return (score > last) | (is_last & (before < limit))


def _entropy(p: jax.Array) -> jax.Array:
    """[..., 1] float32, in nats, of probabilities [..., V]."""
    of_each = jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0)
    return -of_each.sum(axis=-1, keepdims=True)


def _at_least(p: jax.Array, least: jax.Array | float) -> jax.Array:
    """[..., V] bool: probabilities of at least so much; the highest in any case."""
    return p >= jnp.minimum(least, p.max(axis=-1, keepdims=True))


def lowest_before(z: jax.Array, weight: jax.Array, limit: jax.Array) -> jax.Array:
    """The lowest entry above which the others weigh less than `limit`, without sorting them.

    The order of floats is that of their bits, so 32 halvings find it.

    Args:
      z: [..., V] float32.
      weight: [..., V] float32, >= 0. Of each.
      limit: scalar float32, > 0.

    Returns:
      [..., 1] float32.
    """
    bits = jax.lax.bitcast_convert_type(z + 0.0, jnp.int32)  # of zeros there is one
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)

    def halve(_: jax.Array, between: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = between
        middle = (low & high) + ((low ^ high) >> 1)
        above = jnp.where(order > middle, weight, 0).sum(axis=-1, keepdims=True)
        is_less = above < limit
        return jnp.where(is_less, low, middle + 1), jnp.where(is_less, middle, high)

    first = order.min(axis=-1, keepdims=True), order.max(axis=-1, keepdims=True)
    found = jax.lax.fori_loop(0, 32, halve, first)[1]
    return jax.lax.bitcast_convert_type(found ^ ((found >> 31) & 0x7FFFFFFF), z.dtype)


def _last(bias: jax.Array, ndim: int) -> jax.Array:
    """[V] as the last of `ndim` axes."""
    return jnp.asarray(bias).reshape((1,) * (ndim - 1) + (-1,))


def draw(key: jax.Array, probs: jax.Array) -> jax.Array:
    """One token per row.

    Args:
      key: [B, 2] uint32. A random stream per row.
      probs: [B, ..., V] float32. Probabilities, or anything proportional to them.

    Returns:
      [B, ...] int32.
    """

    def one(key: jax.Array, probs: jax.Array) -> jax.Array:
        return jax.random.categorical(wrap(key), jnp.log(probs))

    return jax.vmap(one)(key, probs).astype(jnp.int32)
