"""Hidden-state optimisation: cached keys and values take steps that make a window more probable.

References: Yoshida and Gimpel, "Reconsidering the Past: Optimizing Hidden States in Language
Models", arXiv:2112.08653; Yoshida, "Making the Most of your Model", arXiv:2408.16241. Of a window W
of a text and the states C of what stands before it,

    L(C) = - sum_t log p(W_t | C, W_<t)        the loss, recorded before the states move
    C   <- C - eta Adam(dL/dC)                 n steps; the model stays as it is

and then the window's own states are read behind the new C. Moments belong to states, as the number
of steps that each has taken does, by which the moments are corrected: they start at 0 with the
state and go with it where it moves. The gradient of a state, which is the key of a position in a
layer, or its value, is cut to a length of `clip`. States are float32 here; keys are moved as they
are stored, rotated.

Letters: B rows, S slots, w window, L layers, K key/value heads, H head width, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.component import Part
from dlm import vocab
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.models.decoder import ForwardOutput
from dlm.params import Params
from dlm.window import Slots, Window

Loss = Callable[[vocab.Head, jax.Array, jax.Array], jax.Array]


def surprise(head: vocab.Head, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """[B, w] float32: -log p of targets [B, w], of final states [B, w, D] before them."""
    return -vocab.score(head, hidden, targets).log_prob


class Moments(struct.PyTreeNode):
    """What Adam knows of states.

    Attributes:
      first: of keys and of values, as they are: means of gradients, float32.
      second: likewise, of their squares.
      age: [B, S] int32. Steps that the states of a slot have taken.
    """

    first: Any
    second: Any
    age: jax.Array

    @classmethod
    def of(cls, cache: KVCache) -> Moments:
        """Of states that have not moved yet."""
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (cache.k, cache.v))
        B, S = cache.k.shape[1], cache.num_slots
        return cls(zeros, zeros, jnp.zeros((B, S), jnp.int32))


class Observed(struct.PyTreeNode):
    """A window of a text.

    Attributes:
      tokens: [B, w] int32. What is read.
      targets: [B, w] int32. The tokens behind each.
      is_scored: [B, w] bool. Which of these count.
      start: [B] int32. Slots of the past, behind which the window's states go.
      position: [B] int32. Of the first token, in its text.
      length: [B] int32. The most positions that texts will have, see `Slots.length`.
    """

    tokens: jax.Array
    targets: jax.Array
    is_scored: jax.Array
    start: jax.Array
    position: jax.Array
    length: jax.Array

    def read(
        self, params: Params, cfg: ModelConfig, cache: KVCache, *, writes: bool
    ) -> ForwardOutput:
        """The forward pass behind a cache; whether the window's states are written into it."""
        k, v = jax.tree.map(lambda x: x.astype(cfg.jnp_dtype), (cache.k, cache.v))
        past = cache.replace(k=k, v=v)
        slots = Slots.append(past, self.start) if writes else Slots.below(past, self.start)
        window = Window.at(self.tokens, self.position, is_causal=True)
        return decoder.forward(params, cfg, window, slots.replace(length=self.length))


@struct.dataclass
class HSO(Part):
    """Steps of states of the past, each to the good of a window behind them.

    The sources do not say the sizes of windows and steps: tune them.

    Attributes:
      eta: >= 0, the learning rate; 0: states stay.
      num_steps: >= 1, n, steps per window.
      window: >= 1, w tokens of a prompt, its last ones; long texts are judged in windows of their
        own. Static.
      beta_1: in [0, 1], of the first moment; below 1.
      beta_2: in [0, 1], of the second moment; below 1.
      eps: > 0, of Adam.
      clip: > 0, most length of a state's gradient.
      loss: makes [B, w] float32, which is made smaller, of the model's head, final states
        [B, w, D] and the tokens [B, w] behind them. Static.
    """

    eta: jax.Array | float = 3e-3
    num_steps: jax.Array | int = 1
    window: int = struct.field(pytree_node=False, default=64)
    beta_1: jax.Array | float = 0.9
    beta_2: jax.Array | float = 0.999
    eps: jax.Array | float = 1e-8
    clip: jax.Array | float = 1.0
    loss: Loss = struct.field(pytree_node=False, default=surprise)

    def validate(self, cfg: ModelConfig) -> None:
        for name, low in (("window", 1), ("num_steps", 1), ("eta", 0)):
            value = float(getattr(self, name))
            if not value >= low:
                raise ValueError(f"{name}={value:g} must be at least {low}")
        for name in ("eps", "clip"):
            if not float(getattr(self, name)) > 0:
                raise ValueError(f"{name}={float(getattr(self, name)):g} must be positive")
        for name in ("beta_1", "beta_2"):
            if not 0 <= float(getattr(self, name)) < 1:
                raise ValueError(f"{name}={float(getattr(self, name)):g} must be in [0, 1)")

    def fit(
        self, params: Params, cfg: ModelConfig, cache: KVCache, moments: Moments, seen: Observed
    ) -> tuple[KVCache, Moments, jax.Array]:
        """The states after the steps of a window, and what the model says of it before the first.

        Rows in which nothing is scored stay as they are. Slots behind the past, too.

        Args:
          params, cfg: the model.
          cache: of float32.
          moments: of its states.
          seen: the window.

        Returns:
          The cache, the moments, and final states [B, w, D] of the window, behind the cache given.
        """
        head = vocab.head(params)

        def total(states: Any) -> tuple[jax.Array, jax.Array]:
            past = cache.replace(k=states[0], v=states[1])
            hidden = seen.read(params, cfg, past, writes=False).hidden
            each = self.loss(head, hidden, seen.targets)
            return jnp.where(seen.is_scored, each, 0.0).sum(), hidden  # rows do not see each other

        is_past = jnp.arange(cache.num_slots)[None] < seen.start[:, None]
        is_moved = is_past & seen.is_scored.any(axis=1)[:, None]

        def once(i: jax.Array, carry: Any) -> Any:
            states, moments, first = carry
            gradient, hidden = jax.grad(total, has_aux=True)(states)
            return *self.step(states, gradient, moments, is_moved), jnp.where(i == 0, hidden, first)

        hidden = jnp.zeros((*seen.tokens.shape, cfg.d_model), cfg.jnp_dtype)
        start = (cache.k, cache.v), moments, hidden
        (k, v), moments, hidden = jax.lax.fori_loop(0, self.num_steps, once, start)
        return cache.replace(k=k, v=v), moments, hidden

    def step(
        self, states: Any, gradient: Any, moments: Moments, is_moved: jax.Array
    ) -> tuple[Any, Moments]:
        """One of Adam.

        Args:
          states: keys and values, trees of [..., B, K, S, H] float32.
          gradient: likewise.
          moments: of them.
          is_moved: [B, S] bool. The slots that take it.
        """
        age = moments.age + is_moved
        beta_1, beta_2 = (jnp.asarray(x, jnp.float32) for x in (self.beta_1, self.beta_2))

        def of_slots(x: jax.Array, like: jax.Array) -> jax.Array:  # [..., B, 1, S, 1]
            return x.reshape((1,) * (like.ndim - 4) + (len(x), 1, -1, 1))

        def cut(g: jax.Array) -> jax.Array:
            length = jnp.sqrt(jnp.square(g).sum(axis=(-3, -1), keepdims=True))
            return g * jnp.minimum(1, self.clip / jnp.maximum(length, 1e-30))

        def towards(beta: jax.Array, mean: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(of_slots(is_moved, mean), beta * mean + (1 - beta) * new, mean)

        def moved(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
            n = of_slots(jnp.maximum(age, 1), x).astype(jnp.float32)
            mean, square = first / (1 - beta_1**n), second / (1 - beta_2**n)
            by = self.eta * mean / (jnp.sqrt(square) + self.eps)
            return jnp.where(of_slots(is_moved, x), x - by, x)

        gradient = jax.tree.map(cut, gradient)
        squares = jax.tree.map(jnp.square, gradient)
        first = jax.tree.map(functools.partial(towards, beta_1), moments.first, gradient)
        second = jax.tree.map(functools.partial(towards, beta_2), moments.second, squares)
        return jax.tree.map(moved, states, first, second), Moments(first, second, age)

    def of_prompts(
        self, params: Params, cfg: ModelConfig, cache: KVCache, tokens: jax.Array,
        length: jax.Array, end: jax.Array,
    ) -> tuple[KVCache, jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """Prompts' states of before their last w tokens, after steps to the good of these.

        A prompt of no more tokens than the window, but for the last one, is left as it is.

        Args:
          params, cfg: the model.
          cache: with the states of all tokens of prompts, but for the last ones.
          tokens: [B, S] int32. Prompts from slot 0.
          length: [B] int32. Their lengths.
          end: [B] int32. The most tokens of each text.

        Returns:
          The cache, in which the window is read anew, and of that final states [B, w, D], where
          the first one is, and how many of them there are, [B] int32 each.
        """
        w = min(self.window, tokens.shape[1])
        start = jnp.maximum(length - 1 - w, 0)
        count = length - 1 - start
        place = start[:, None] + jnp.arange(w + 1)[None]
        some = jnp.take_along_axis(tokens, jnp.minimum(place, tokens.shape[1] - 1), axis=1)
        is_scored = jnp.arange(w)[None] < count[:, None]
        seen = Observed(some[:, :-1], some[:, 1:], is_scored, start, start, end)
        k, v = jax.tree.map(lambda x: x.astype(jnp.float32), (cache.k, cache.v))
        states = cache.replace(k=k, v=v)
        states, _, _ = self.fit(params, cfg, states, Moments.of(cache), seen)
        output = seen.read(params, cfg, states, writes=True)
        assert output.cache is not None
        return output.cache, output.hidden, start, count
