"""From logits to the law that tokens are drawn from: penalty, temperature, top-k, top-p, min-p.

The filters come in the order of Hugging Face's `generate`, and mean what they mean there:

    repetition penalty r    logits of tokens that came up before: z / r if z > 0, else z r
                            (Keskar et al., CTRL, arXiv:1909.05858)
    temperature T           z / T
    top-k                   the k largest logits, and all that equal the smallest of them
    top-p                   the fewest most probable tokens whose probabilities sum to at least p
                            (Holtzman et al., nucleus sampling, arXiv:1904.09751)
    min-p                   tokens at least m times as probable as the most probable one
                            (Nguyen et al., arXiv:2407.01082)

Letters: V vocabulary; `...` any leading axes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from dlm.config import ModelConfig


class Sampling(struct.PyTreeNode):
    """How logits become a law. What is None is left out; numbers are traced.

    Attributes:
      temperature: > 0; None: the arg-max, with probability 1.
      top_k: at least 1.
      top_p: in (0, 1].
      min_p: in [0, 1].
      repetition_penalty: > 0; above 1 it makes tokens of prompt and completion less likely.
    """

    temperature: jax.Array | float | None = 1.0
    top_k: jax.Array | int | None = None
    top_p: jax.Array | float | None = None
    min_p: jax.Array | float | None = None
    repetition_penalty: jax.Array | float | None = None

    def validate(self, cfg: ModelConfig) -> None:
        """Raises ValueError, in one sentence, on numbers that make no sense."""
        checks = {
            "temperature": ("positive, or None for the arg-max", lambda x: x > 0),
            "top_k": (f"in [1, vocab_size={cfg.vocab_size}]", lambda x: 1 <= x <= cfg.vocab_size),
            "top_p": ("in (0, 1]", lambda x: 0 < x <= 1),
            "min_p": ("in [0, 1]", lambda x: 0 <= x <= 1),
            "repetition_penalty": ("positive", lambda x: x > 0),
        }
        for name, (wanted, is_right) in checks.items():
            value = getattr(self, name)
            if value is not None and not is_right(float(value)):
                raise ValueError(f"{name}={float(value):g} must be {wanted}")

    @property
    def has_filters(self) -> bool:
        """Whether more than the temperature shapes the law."""
        filters = (self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return any(number is not None for number in filters)

    def law(self, logits: jax.Array, seen: jax.Array | None = None) -> jax.Array:
        """[..., V] float32 probabilities.

        Args:
          logits: [..., V] float32.
          seen: [..., V] bool. Tokens that came up before; needed with a repetition penalty.
        """
        z = logits
        if self.repetition_penalty is not None:
            assert seen is not None
            penalised = jnp.where(z > 0, z / self.repetition_penalty, z * self.repetition_penalty)
            z = jnp.where(seen, penalised, z)
        if self.temperature is None:
            return jax.nn.one_hot(jnp.argmax(z, axis=-1), z.shape[-1], dtype=z.dtype)
        z = z / self.temperature
        if self.top_k is not None or self.top_p is not None:
            order = jnp.argsort(z, axis=-1, descending=True, stable=True)
            ranked = jnp.take_along_axis(z, order, axis=-1)
            if self.top_k is not None:
                last = jnp.broadcast_to(jnp.asarray(self.top_k) - 1, (*z.shape[:-1], 1))
                keep = ranked >= jnp.take_along_axis(ranked, last, axis=-1)
                ranked = jnp.where(keep, ranked, -jnp.inf)
            if self.top_p is not None:
                p = jax.nn.softmax(ranked, axis=-1)
                before = jnp.cumsum(p, axis=-1) - p  # of the more probable ones
                ranked = jnp.where(before < self.top_p, ranked, -jnp.inf)
            place = jnp.argsort(order, axis=-1)
            z = jnp.take_along_axis(ranked, place, axis=-1)
        p = jax.nn.softmax(z, axis=-1)
        if self.min_p is not None:
            p = jnp.where(p >= self.min_p * p.max(axis=-1, keepdims=True), p, 0)
            p = p / p.sum(axis=-1, keepdims=True)
        return p


def draw(key: jax.Array, law: jax.Array) -> jax.Array:
    """One token per row.

    Args:
      key: [B, 2] uint32. A random stream per row.
      law: [B, ..., V] float32. Probabilities, or anything proportional to them.

    Returns:
      [B, ...] int32.
    """

    def one(key: jax.Array, law: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.wrap_key_data(key), jnp.log(law))

    return jax.vmap(one)(key, law).astype(jnp.int32)


def uniforms(key: jax.Array, num: int) -> jax.Array:
    """[B, num] float32 in [0, 1), from a random stream [B, 2] uint32 per row."""
    one = lambda key: jax.random.uniform(jax.random.wrap_key_data(key), (num,))  # noqa: E731
    return jax.vmap(one)(key)


def fold_in(key: jax.Array, data: jax.Array | int) -> jax.Array:
    """A further random stream [B, 2] uint32 per row; `data` is a number, or one per row."""

    def one(key: jax.Array, data: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), data))

    return jax.vmap(one)(key, jnp.broadcast_to(jnp.asarray(data, jnp.uint32), key.shape[:1]))
