"""Which entropy tells tokens that a model gets right from those that it does not.

Reference: He et al., "Towards Better Code Generation: Adaptive Decoding with Uncertainty Guidance"
(AdaDec), arXiv:2506.08980: right answers are read, and of every token it is known how sure the
model is before it, and whether its best guess is right. With as many right ones as wrong ones

    P(right | H) = sigmoid(a H + b)

is fitted to four fifths, and of probabilities c that one may cut at that is taken which is right
most often of the last fifth, as it is: theta = (ln(c / (1 - c)) - b) / a.

Letters: B rows, T positions, N tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from decode.likelihood import Pair, chunks, encode_pair, pad_left, prompt_slots
from dlm import vocab
from dlm.config import ModelConfig
from dlm.lm import LanguageModel
from dlm.models import decoder
from dlm.params import Params
from dlm.sharding import constrain
from dlm.window import Window

CUTS = np.arange(1, 100) / 100
SEED = 42


@dataclasses.dataclass(frozen=True)
class Threshold:
    """What was learned.

    Attributes:
      theta: the entropy, in nats.
      slope, offset: a and b.
      cut: c.
      accuracy: how often it is right of tokens that it was not fitted to.
    """

    theta: float
    slope: float
    offset: float
    cut: float
    accuracy: float


def observe(
    lm: LanguageModel, pairs: Sequence[Pair], batch_size: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Of every token of answers: the entropy before it [N], and whether the best guess is right.

    Compiles once per bucket of lengths; logits are not stored.

    Args:
      lm: an autoregressive model.
      pairs: (prompt, right answer), as `decode.causal_likelihood` takes them.
      batch_size: pairs per forward.

    Raises:
      ValueError: the model never learned to read from left to right, or a pair is empty or longer
        than it allows.
    """
    if lm.cfg.never_causal:
        raise ValueError("this is a diffusion model, which never learned to read left to right")
    encoded = [encode_pair(lm, i, pair) for i, pair in enumerate(pairs)]
    buckets: dict[int, list[int]] = {}
    for i, (prompt, answer) in enumerate(encoded):
        num = len(prompt) + len(answer) - 1
        if not prompt or not answer or num > lm.cfg.max_seq_len:
            raise ValueError(
                f"pair {i} has {len(prompt)} and {len(answer)} tokens, which must be at least 1 "
                f"each, and together fit max_seq_len={lm.cfg.max_seq_len}"
            )
        buckets.setdefault(min(prompt_slots(num), lm.cfg.max_seq_len), []).append(i)
    entropies, rights = [], []
    with contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh):
        for T, members in buckets.items():
            for chunk in chunks(members, batch_size):
                index = np.resize(np.asarray(chunk, np.int32), batch_size)  # full: one program
                tokens, start, answer_len = pad_left(lm.cfg, encoded, index, T + 1)
                found = jax.device_get(_read(lm.params, lm.cfg, tokens, start))
                is_answer = np.arange(T)[None] >= T - answer_len[:, None]
                is_answer[len(chunk) :] = False
                entropies.append(found[0][is_answer])
                rights.append(found[1][is_answer])
    return np.concatenate(entropies), np.concatenate(rights)


@functools.partial(jax.jit, static_argnames="cfg")
def _read(
    params: Params, cfg: ModelConfig, tokens: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Entropies [B, T] float32 before tokens 1 to T of T + 1, and whether the best guess is right.

    Args:
      params: the model's.
      cfg: the model.
      tokens: [B, T + 1] int32. Padded on the left.
      start: [B] int32. First real position.
    """
    window = Window.left_padded(constrain(tokens[:, :-1], "batch", None), start, is_causal=True)
    stats = vocab.read(vocab.head(params), decoder.forward(params, cfg, window).hidden)
    return stats.entropy, stats.token == jnp.asarray(tokens)[:, 1:]


def learn(entropy: np.ndarray, is_right: np.ndarray) -> Threshold:
    """The threshold of entropies [N] and whether the best guess was right [N] bool.

    Of cuts that are equally good the one in the middle is taken.

    Raises:
      ValueError: nearly all guesses are right, or wrong, or they do not depend on the entropy.
    """
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(entropy))
    fitted, held_out = np.split(order, [len(order) * 4 // 5])
    kinds = [fitted[is_right[fitted] == kind] for kind in (True, False)]
    few = min(map(len, kinds))
    if few < 2:
        raise ValueError(
            f"of {len(fitted)} tokens {len(kinds[0])} are right and {len(kinds[1])} are not: there "
            "must be at least 2 of each to learn from"
        )
    some = np.concatenate([rng.choice(kind, few, replace=False) for kind in kinds])
    slope, offset = _logistic(entropy[some].astype(np.float64), is_right[some])
    if not slope < 0:
        raise ValueError(f"slope={slope:g} must be negative: sure guesses are no better here")
    probability = 1 / (1 + np.exp(-(slope * entropy[held_out] + offset)))
    is_told = (probability[None] >= CUTS[:, None]) == is_right[held_out][None]
    accuracy = is_told.mean(axis=1)
    best = np.flatnonzero(accuracy == accuracy.max())
    cut = float(CUTS[best[len(best) // 2]])
    theta = (np.log(cut / (1 - cut)) - offset) / slope
    return Threshold(float(theta), slope, offset, cut, float(accuracy.max()))


def _logistic(x: np.ndarray, is_one: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the most likely logistic curve, by Newton's method.

    A little weight on small numbers keeps them finite where a threshold tells all apart.
    """
    inputs, weights = np.stack([x, np.ones_like(x)], axis=1), np.zeros(2)
    ridge = 1e-6 * len(x) * np.eye(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-inputs @ weights))
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs + ridge
        change = np.linalg.solve(curvature, inputs.T @ (is_one - p) - ridge @ weights)
        weights = weights + change
        if np.abs(change).max() < 1e-10:
            break
    return float(weights[0]), float(weights[1])
