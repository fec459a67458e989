"""The reading half of a round of search: the model reads the candidates, and a strategy is told.

Letters: B prompts, K hypotheses, R rows of a prompt, n candidates, S slots, V vocabulary, D width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from decode.core.matches import match_lengths
from decode.core.streams import fold_in
from decode.diffusion.contracts import Constraint
from decode.search import constrained
from decode.search.contracts import NEVER, Round
from decode.search.method import SearchMethod
from decode.search.move import by_prompt, by_row
from decode.search.state import SearchState
from dlm import vocab
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import Params
from dlm.window import Slots, Window
from kernels_pallas.unembed_stats import VocabStats
from kernels_pallas.window_attention import pack_mask


def read(
    params: Params, cfg: ModelConfig, method: SearchMethod, state: SearchState
) -> tuple[jax.Array, KVCache]:
    """Final states of the candidates, which do not see each other, and the cache.

    States are [B, R, n, D]: R is K, or 1 where hypotheses share a row of the cache, which may have
    rows of further hypotheses.
    """
    B, K, n = state.candidates.shape
    R = 1 if method.strategy.shares_row else K
    of_rows = lambda x: by_row(jnp.broadcast_to(x[:, None], (B, R)))  # noqa: E731
    start, tokens = of_rows(state.num_cached), by_row(state.candidates[:, :R])
    mask = mix = None
    if n > 1:
        mask = pack_mask(jnp.broadcast_to(jnp.eye(n, dtype=bool)[None], (B * K, n, n)))
    if method.strategy.shares_row:
        each = embed(params, state.candidates[:, :, 0]).astype(jnp.float32)  # [B, K, D]
        weights = method.strategy.weights(state.score)
        mix = jnp.ones((B, 1)), (weights[:, :, None] * each).sum(axis=1, keepdims=True)
    positions = jnp.broadcast_to(start[:, None], tokens.shape)
    slots = Slots.append(state.cache, start, of_rows(~state.has_stopped))
    output = decoder.forward(
        params,
        cfg,
        Window(tokens, positions, mask, mix=mix, is_causal=n == 1),
        slots.replace(length=of_rows(state.end)),
    )
    assert output.cache is not None
    return by_prompt(output.hidden, R), output.cache


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """[..., D]: the model's embeddings of tokens [...]."""
    embedded: jax.Array = params["embed"].at[tokens].get(mode="clip")
    return embedded


def what_is_seen(
    params: Params, cfg: ModelConfig, method: SearchMethod, state: SearchState, hidden: jax.Array
) -> Round:
    """What the strategy is told of states [B, R, n, D], which are those of all K hypotheses."""
    head, length = vocab.head(params), state.length
    of_all = lambda x: jnp.broadcast_to(x, (*state.score.shape, *x.shape[2:]))  # noqa: E731
    ids = jnp.asarray(method.stop_ids, jnp.int32).reshape(-1)
    ids = jnp.append(ids, jnp.asarray(cfg.eos_ids, jnp.int32))

    def is_end(tokens: jax.Array) -> jax.Array:
        return (tokens[..., None] == ids.reshape((1,) * tokens.ndim + (-1,))).any(axis=-1)

    @functools.cache
    def logits() -> jax.Array:
        return of_all(vocab.logits(head, hidden))

    def allowed(scores: jax.Array) -> jax.Array:
        found = _shaped(method, state, scores)
        if method.constraint is None:
            return found
        return constrained.allow(cfg, method, state, found)

    @functools.cache
    def log_probs() -> jax.Array:
        return allowed(jax.nn.log_softmax(logits()))

    @functools.cache
    def stats(k: int) -> VocabStats:
        read: VocabStats = vocab.read(head, hidden, k=min(k, cfg.vocab_size))
        return jax.tree.map(of_all, read)

    def best(k: int) -> tuple[jax.Array, jax.Array]:
        k = min(k, cfg.vocab_size)
        if not method.is_plain:
            found, tokens = jax.lax.top_k(log_probs(), k)
            return _accepted(cfg, method, state, tokens.astype(jnp.int32), found)
        said = stats(k)
        assert said.top_tokens is not None and said.top_log_probs is not None
        return said.top_tokens, said.top_log_probs

    return Round(
        best=best,
        log_probs=lambda: _with_ends_accepted(cfg, method, state, ids, log_probs()),
        probs=lambda: method.sampling.law(allowed(logits())),
        stats=stats,
        hidden=of_all(hidden),
        candidates=state.candidates,
        tokens=state.tokens,
        log_prob=state.log_prob,
        length=length,
        prompt_len=state.prompt_len,
        end=state.end,
        is_first=state.num_cached < state.prompt_len,
        is_end=is_end,
        embed=functools.partial(embed, params),
        score=state.score,
        key=fold_in(state.key, state.num_forwards),
        active=~state.has_stopped,
    )


def _with_ends_accepted(
    cfg: ModelConfig, method: SearchMethod, state: SearchState, ids: jax.Array, log_probs: jax.Array
) -> jax.Array:
    """Log-probabilities [B, K, n, V], with `NEVER` for those of tokens [m] that are refused."""
    if method.constraint is None or type(method.constraint).accept is Constraint.accept:
        return log_probs
    every = jnp.broadcast_to(ids.reshape(1, 1, 1, -1), (*log_probs.shape[:3], len(ids)))
    most = jnp.where(constrained.accepts(cfg, method, state, every), jnp.inf, NEVER)
    return log_probs.at[..., ids].min(most)


def _accepted(
    cfg: ModelConfig,
    method: SearchMethod,
    state: SearchState,
    tokens: jax.Array,
    log_probs: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, K, n, k] and their log-probabilities, with those last that are refused."""
    if method.constraint is None or type(method.constraint).accept is Constraint.accept:
        return tokens, log_probs
    accepted = constrained.accepts(cfg, method, state, tokens)
    log_probs = jnp.where(accepted, log_probs, NEVER)
    order = jnp.argsort(-log_probs, axis=3, stable=True)
    return jnp.take_along_axis(tokens, order, 3), jnp.take_along_axis(log_probs, order, 3)


def _shaped(method: SearchMethod, state: SearchState, log_probs: jax.Array) -> jax.Array:
    """Log-probabilities [B, K, n, V], or logits, after bias, penalty and bans; not normalised.

    As Hugging Face's beams see them.
    """
    B, K, _, V = log_probs.shape
    occurred = None if state.occurred is None else state.occurred[:, :, None]
    log_probs = method.sampling.shift(log_probs, occurred)
    if not method.no_repeat_ngram:
        return log_probs
    most = method.no_repeat_ngram - 1
    rows, S = state.tokens.reshape(B * K, -1), state.tokens.shape[2]
    length = jnp.repeat(state.length, K)
    alike = match_lengths(rows, rows, length, most) >= most
    goes_on = alike & (jnp.arange(S)[None] + 1 < length[:, None])
    banned = jnp.where(goes_on, jnp.roll(rows, -1, axis=1), V)
    is_banned = jnp.zeros((B * K, V), bool)
    is_banned = is_banned.at[jnp.arange(B * K)[:, None], banned].set(True, mode="drop")
    return jnp.where(is_banned.reshape(B, K, 1, V), NEVER, log_probs)
