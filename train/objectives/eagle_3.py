"""EAGLE-3's network learns from its own drafts: training-time test.

Reference: Li et al., arXiv:2503.01840, Sec. 3.2, and the public code; the network is
`dlm.heads.eagle_3`. All positions t are unrolled side by side for K steps. Step j (from 0) reads
the token x_{t+1+j} of the text beside the state that step j - 1 left at t, at position t + j, and
attends to what a draft would see there: step 0 at all positions up to t, and steps 1 to j at t
alone, in one softmax. With p the target's distribution of x_{t+2+j} and q the network's,

    loss = sum_j decay^j  mean over t of  -sum_x p(x) log q(x)

over tokens of completions up to their first EOS. Where the network drafts a part of the vocabulary,
p is restricted to it, and tokens count where p's arg-max is in it.

Letters: B batch, T positions, D model width, K steps, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from dlm import vocab
from dlm.config import ModelConfig
from dlm.heads.eagle import EagleNetwork
from dlm.heads.eagle_3 import Eagle3Heads
from dlm.params import Params
from dlm.trainable import Learned
from train.config import ConfigError
from train.draft_attention import draft_attention
from train.losses import draft_metrics, in_chunks
from train.objectives import Context, Objective
from train.reading import Text, read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle3Loss(Objective):
    """Goes with `dlm.heads.eagle_3:Eagle3Heads` as `train.trainable`.

    Attributes:
      num_steps: K >= 1 (published: 7).
      decay: > 0; of the weight from step to step.
      on_prompt: whether tokens of the prompt are learned too.
    """

    goes_with = Eagle3Heads

    num_steps: int = 7
    decay: float = 0.8
    on_prompt: bool = False

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1")
        if not self.decay > 0:
            raise ValueError(f"decay={self.decay} must be positive")

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch. Args: as `Objective`; `own` is a network.

        Returns:
          Scalar float32, and metrics: "loss", and those of `train.losses.draft_metrics`, of all
          tokens of the text, whether the network can draft them or not.

        Raises:
          ConfigError: rows are too short for so many steps.
        """
        network: EagleNetwork = learned.own
        target = learned.target
        text = read_text(target, cfg, batch, self.on_prompt, feature_layers=network.feature_layers)
        text = jax.lax.stop_gradient(text)
        T = text.tokens.shape[1]
        if self.num_steps > T - 2:
            raise ConfigError(
                f"num_steps={self.num_steps} must be at most {T - 2} with rows of {T} tokens"
            )
        teacher = vocab.head(target)
        is_learned = text.is_scored
        if network.ids is not None:
            can_draft = jnp.zeros(cfg.vocab_size, bool).at[network.ids].set(True)
            best = vocab.score(teacher, text.hidden, text.tokens).token
            is_learned = is_learned.at[:, 1:].set(is_learned[:, 1:] & can_draft[best[:, :-1]])
            teacher = teacher[network.ids]

        def one_chunk(ours: jax.Array, theirs: jax.Array) -> tuple[jax.Array, jax.Array]:
            z = vocab.logits(network.head(target), ours)
            p = jax.nn.softmax(vocab.logits(teacher, theirs))
            best = jnp.argmax(z, axis=-1).astype(jnp.int32)
            token = best if network.ids is None else network.ids[best]
            return jax.nn.logsumexp(z, axis=-1) - (p * z).sum(axis=-1), token

        total = jnp.float32(0)
        drafts = []
        for j, states in enumerate(unroll(network, target, text, self.num_steps)):
            ahead = j + 2
            each, token = in_chunks(
                one_chunk, network.normed(states[:, :-ahead]), text.hidden[:, ahead - 1 : -1]
            )
            is_of_text = jnp.arange(T - ahead)[None] >= text.start[:, None]
            learned_here = is_learned[:, ahead:] & is_of_text
            num = jnp.maximum(learned_here.sum(), 1)
            total += self.decay**j * jnp.where(learned_here, each, 0.0).sum() / num
            drafts.append((token == text.tokens[:, ahead:], text.is_scored[:, ahead:] & is_of_text))
        return total, {"loss": total, **draft_metrics(drafts)}


Pairs = tuple[tuple[jax.Array, jax.Array], ...]  # keys and values, of every layer


def unroll(
    network: EagleNetwork, target: Params, text: Text, num_steps: int
) -> Iterator[jax.Array]:
    """States [B, T, D] of step 0, 1, ..; the backward pass computes each step again."""
    assert text.features is not None
    cfg, T = network.cfg, text.tokens.shape[1]
    if any(reach is not None and reach <= num_steps for reach in network.reach):
        raise ConfigError(
            f"num_steps={num_steps} must be less than the network's sliding window, "
            f"{cfg.sliding_window} positions"
        )
    index = jnp.arange(T)[None]
    none = jnp.zeros((*text.tokens.shape, 0, cfg.n_kv_heads, cfg.head_dim), cfg.jnp_dtype)
    own: Pairs = ((none, none),) * cfg.n_layers  # of steps 1 to j
    first: Pairs = ()  # of step 0

    @functools.partial(jax.checkpoint, static_argnums=0)
    def step(j: int, states: jax.Array, first: Pairs, own: Pairs) -> tuple[jax.Array, Pairs, Pairs]:
        tokens = jnp.pad(text.tokens[:, 1 + j :], ((0, 0), (0, 1 + j)))
        firsts, owns = list(first), list(own)

        def attention(i: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            if j == 0:
                firsts.append((k, v))
            else:
                owns[i] = tuple(  # type: ignore[assignment]
                    jnp.concatenate([old, new[:, :, None]], axis=2)
                    for old, new in zip(owns[i], (k, v), strict=True)
                )
            start, reach = text.start[:, None], network.reach[i]
            if reach is not None:
                start = jnp.maximum(start, index + j + 1 - reach)
            limits = jnp.stack(jnp.broadcast_arrays(start, index + 1), axis=-1)[:, :, None]
            return draft_attention(q[:, :, None], *firsts[i], *owns[i], limits)[:, :, 0]

        embedded = network.embed(target, tokens)
        states = network.run(embedded, states, text.positions + j, attention)
        return states, tuple(firsts), tuple(owns)

    fed = network.begin(text.features)
    for j in range(num_steps):
        states, first, own = step(j, fed, first, own)
        yield states
        fed = network.feed(states)
