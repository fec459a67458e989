"""How likely an autoregressive model finds long texts, window by window, behind a cache.

A window's tokens are judged behind those before them, as far as the cache reaches; with
`decode.core.hso.HSO` its states move after every window, to the good of what was just judged. What
is reported of a window is what the model said before it had seen it.

Letters: B rows, S slots, w window.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from tqdm import tqdm

from decode.core.component import check_numbers
from decode.core.hso import HSO, Moments, Observed, surprise
from decode.core.requests import Prompt, check_tokens, encode
from decode.likelihood import chunks
from dlm import vocab
from dlm.cache import KVCache, init_cache
from dlm.config import ModelConfig
from dlm.lm import LanguageModel
from dlm.params import Params


@dataclasses.dataclass(frozen=True)
class LongLikelihood:
    """What a model says about one text.

    Attributes:
      log_prob: [n - 1] float32. Of every token but the first, in nats.
    """

    log_prob: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean surprise."""
        return math.exp(-float(self.log_prob.mean()))


class Past(struct.PyTreeNode):
    """What was read.

    Attributes:
      cache: of B rows, float32.
      moments: of its states.
      num_slots: scalar int32. Slots that hold something, the first ones.
    """

    cache: KVCache
    moments: Moments
    num_slots: jax.Array


def long_log_likelihood(
    lm: LanguageModel,
    texts: Sequence[Prompt],
    *,
    hso: HSO | None = None,
    window: int = 64,
    context: int = 1024,
    batch_size: int = 1,
) -> list[LongLikelihood]:
    """Log-likelihoods of all tokens of texts, however long.

    A text's result depends on no other text. Compiles once per `context`, window and batch size.

    Example:
      >>> lm = dlm.load("path/to/checkpoint")
      >>> plain, moved = (long_log_likelihood(lm, [book], hso=x)[0] for x in (None, HSO()))
      >>> plain.perplexity, moved.perplexity

    Args:
      lm: from `dlm.load`.
      texts: each a string, or token ids.
      hso: how states move; None: they do not.
      window: w >= 1, tokens that are judged at once.
      context: most tokens that are remembered, in [window, max_seq_len], up to a multiple of 8. The
        oldest are forgotten a window at a time.
      batch_size: texts at once.

    Returns:
      One `LongLikelihood` per text.

    Raises:
      ValueError: the model does not read from left to right, a text has fewer than two tokens or,
        where its positions are learned or stretched, more than the model can hold, or a number
        makes no sense.
      TypeError: if a text is neither text nor token ids.
    """
    cfg = lm.cfg
    if cfg.never_causal:
        raise ValueError(
            "this is a diffusion model, which never learned to read from left to right: use "
            "decode.likelihood"
        )
    if isinstance(texts, str):
        raise TypeError("texts is a str; it must be a list of texts: give [text]")
    if hso is not None:
        check_numbers(hso)
        hso.validate(cfg)
    if window < 1:
        raise ValueError(f"window={window} must be at least 1")
    if not window <= context <= cfg.max_seq_len:
        raise ValueError(
            f"context={context} must be in [{window}, {cfg.max_seq_len}]: a window, and what the "
            "model can hold"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    encoded = [encode(lm, text) for text in texts]
    for i, tokens in enumerate(encoded):
        _check_text(cfg, i, tokens)
    found: dict[int, np.ndarray] = {}
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    progress = tqdm(total=sum(map(len, encoded)), desc="likelihood", unit="token", delay=5)
    with progress, contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh):
        for chunk in chunks(order, batch_size):
            some = [encoded[i] for i in chunk]
            rows = _judge(lm, some + [[]] * (batch_size - len(some)), hso, window, context)
            for i, row in zip(chunk, rows, strict=False):
                found[i] = row[: len(encoded[i]) - 1]
                progress.update(len(encoded[i]))
    return [LongLikelihood(found[i]) for i in range(len(encoded))]


def _check_text(cfg: ModelConfig, i: int, tokens: Sequence[int]) -> None:
    if len(tokens) < 2:
        raise ValueError(f"text {i} has {len(tokens)} tokens; it must have at least 2")
    check_tokens(cfg, f"text {i}", tokens)
    is_bound = cfg.learned_positions or cfg.rope_scaling is not None
    if is_bound and len(tokens) - 1 > cfg.max_seq_len:
        raise ValueError(
            f"text {i} has {len(tokens)} tokens, of which all but the last must be at most the "
            f"model's max_seq_len={cfg.max_seq_len}: its positions are learned or stretched"
        )


def _judge(
    lm: LanguageModel, texts: Sequence[Sequence[int]], hso: HSO | None, window: int, context: int
) -> np.ndarray:
    """[B, n] float32: log-probabilities of what follows each token."""
    num = -(-(max(map(len, texts)) - 1) // window)
    tokens = np.full((len(texts), num * window + 1), lm.cfg.pad_token_id, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    length = np.array([len(text) for text in texts], np.int32)
    past, found = begin(lm.cfg, len(texts), context), []
    for i in range(num):
        some = tokens[:, i * window : (i + 1) * window + 1]
        past, log_prob = advance(lm.params, lm.cfg, hso, past, some, i * window, length)
        found.append(log_prob)
    return np.concatenate(jax.device_get(found), axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def begin(cfg: ModelConfig, batch_size: int, num_slots: int) -> Past:
    """Nothing was read yet."""
    cache = init_cache(cfg, batch_size, num_slots)
    k, v = jax.tree.map(lambda x: x.astype(jnp.float32), (cache.k, cache.v))
    return Past(cache.replace(k=k, v=v), Moments.of(cache), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="past")
def advance(
    params: Params,
    cfg: ModelConfig,
    hso: HSO | None,
    past: Past,
    tokens: jax.Array,
    position: jax.Array,
    length: jax.Array,
) -> tuple[Past, jax.Array]:
    """A window: it is judged, states move, and its own are read behind them.

    Args:
      params, cfg: the model.
      hso: how states move; None: they do not.
      past: given away.
      tokens: [B, w + 1] int32. The window, and what follows it.
      position: scalar int32. Where it is in the texts.
      length: [B] int32. Tokens of the texts.

    Returns:
      The past with the window, and log-probabilities [B, w] float32 of what follows its tokens; 0
      behind the ends of texts.
    """
    B, w = tokens.shape[0], tokens.shape[1] - 1
    past = jax.lax.cond(
        past.num_slots + w > past.cache.num_slots, functools.partial(forget, num=w), lambda x: x,
        past,
    )  # fmt: skip
    of_rows = lambda x: jnp.broadcast_to(x, B)  # noqa: E731
    seen = Observed(
        tokens[:, :-1],
        tokens[:, 1:],
        position + 1 + jnp.arange(w)[None] < length[:, None],
        of_rows(past.num_slots),
        of_rows(position),
        length,
    )
    cache, moments = past.cache, past.moments
    judged = None
    if hso is not None:
        cache, moments, judged = hso.fit(params, cfg, cache, moments, seen)
    output = seen.read(params, cfg, cache, writes=True)
    judged = output.hidden if judged is None else judged  # before states have moved to its good
    log_prob = -surprise(vocab.head(params), judged, seen.targets)
    assert output.cache is not None
    slot = jnp.arange(cache.num_slots)
    is_new = (slot >= past.num_slots) & (slot < past.num_slots + w)

    def with_new(old: jax.Array, new: jax.Array) -> jax.Array:  # others keep all their digits
        at = is_new.reshape((1,) * (old.ndim - 2) + (-1, 1))
        return jnp.where(at, new.astype(old.dtype), old)

    k, v = jax.tree.map(with_new, (cache.k, cache.v), (output.cache.k, output.cache.v))
    past = Past(output.cache.replace(k=k, v=v), moments, past.num_slots + w)
    return past, jnp.where(seen.is_scored, log_prob, 0.0)


def forget(past: Past, num: int) -> Past:
    """Without the oldest states; those that stay keep their moments."""
    of_slots = lambda x: jnp.roll(x, -num, axis=-2)  # noqa: E731
    first, second = jax.tree.map(of_slots, (past.moments.first, past.moments.second))
    age = jnp.roll(past.moments.age, -num, axis=1).at[:, -num:].set(0)
    slot = jnp.arange(past.cache.num_slots)
    is_old = slot < past.cache.num_slots - num
    kept = lambda x: jnp.where(is_old.reshape((1,) * (x.ndim - 2) + (-1, 1)), x, 0.0)  # noqa: E731
    first, second = jax.tree.map(kept, (first, second))
    cache = jax.tree.map(of_slots, past.cache)
    return Past(cache, Moments(first, second, age), past.num_slots - num)
