"""The search loop: read the candidates of all hypotheses, choose, move what has to be moved.

A method is a pytree of choices, whose structure picks the program and whose leaves are data:

    strategy         which hypotheses go on?                         decode/search/strategies/
    sampling         bias, penalties, filters                        decode/core/sampling.py
    no_repeat_ngram  sequences that may not come up twice

The rows of the cache are hypotheses: row k B + b is the k-th of prompt b. A prompt is read once and
its keys and values are then laid under all of its hypotheses; where a hypothesis gets a second
child, only what stands behind the prompt is copied, from row to row. The candidates of a round are
the last tokens of the texts, where there is one, else what may come behind them; the cache covers
what stands before.

Letters: B prompts, K hypotheses, n candidates, P longest prompt, G completion positions, S slots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core import loop
from decode.core.component import check_numbers
from decode.core.matches import match_lengths
from decode.core.requests import PREFILL, lay_out, read_requests
from decode.core.sampling import Sampling
from decode.core.streams import fold_in
from decode.search.contracts import (
    Choice,
    Results,
    Round,
    Strategy,
    Texts,
    completions_of,
    staying,
    taken,
)
from dlm import vocab
from dlm.cache import KVCache, compact, init_cache
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import Apart, Params, is_apart
from dlm.window import Slots, Window
from kernels_pallas.window_attention import pack_mask

BANNED = -1e9  # a log-probability, finite as it may be multiplied


class SearchMethod(struct.PyTreeNode):
    """How texts are searched for.

    Attributes:
      strategy: which hypotheses go on.
      sampling: bias, repetition penalty and, for strategies that draw, temperature and filters.
      no_repeat_ngram: n >= 0: no n tokens come up twice in a text, its prompt included; 0: they
        may. Static.
      stop_ids: [m] int32. Tokens that end a text, besides the model's end-of-text.
      num_return: R >= 1, completions per prompt. Static.
    """

    strategy: Strategy
    sampling: Sampling = Sampling(temperature=None)
    no_repeat_ngram: int = struct.field(pytree_node=False, default=0)
    stop_ids: jax.Array | tuple[int, ...] = ()
    num_return: int = struct.field(pytree_node=False, default=1)

    def validate(self, cfg: ModelConfig) -> None:
        """Raises ValueError, in one sentence, unless the choices make sense for the model."""
        if not isinstance(self.strategy, Strategy):
            raise ValueError(f"strategy={self.strategy!r} must be of class Strategy")
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling={self.sampling!r} must be of class Sampling")
        check_numbers(self)
        check_numbers(self.strategy)
        self.strategy.validate(cfg)
        self.sampling.validate(cfg)
        if self.strategy.width > 1 and self.strategy.num_candidates > 1:
            raise ValueError(
                f"width={self.strategy.width} and num_candidates={self.strategy.num_candidates}: "
                "one of them must be 1"
            )
        if self.no_repeat_ngram < 0:
            raise ValueError(f"no_repeat_ngram={self.no_repeat_ngram} must be at least 0")
        drawn = ("temperature", "top_k", "top_p", "min_p")
        given = [name for name in drawn if getattr(self.sampling, name) is not None]
        if given and not self.strategy.draws:
            name = type(self.strategy).__name__
            raise ValueError(f"{name} draws nothing, so {given[0]} goes without it")
        if self.strategy.looks_ahead:
            shaped: dict[str, Any] = {
                "no_repeat_ngram": self.no_repeat_ngram or None,
                "repetition_penalty": self.sampling.repetition_penalty,
            }
            if wrong := [name for name, value in shaped.items() if value is not None]:
                name = type(self.strategy).__name__
                raise ValueError(
                    f"{wrong[0]}={shaped[wrong[0]]} goes without {name}, which reads what follows "
                    "tokens that are not written yet"
                )
        most = self.strategy.num_results
        if not 1 <= self.num_return <= most:
            raise ValueError(
                f"num_return={self.num_return} must be in [1, {most}], see num_results"
            )
        if cfg.writes_in_place:
            raise ValueError(
                f"shifted_logits=False with block_len={cfg.block_len}: search needs a model that "
                "predicts the next token"
            )
        for token in np.asarray(self.stop_ids, np.int64):
            if not 0 <= token < cfg.vocab_size:
                raise ValueError(f"stop_ids has {token}, not in [0, vocab_size={cfg.vocab_size})")

    @property
    def is_plain(self) -> bool:
        """Whether the model's own log-probabilities are what strategies see."""
        return not self.sampling.has_filters and not self.no_repeat_ngram


class SearchState(struct.PyTreeNode):
    """Everything the loop carries, and everything that is reported afterwards.

    Attributes:
      score: [B, K] float32. Of the hypotheses.
      candidates: [B, K, n] int32. Read next.
      tokens: [B, K, S] int32. Prompts and completions from slot 0.
      log_prob: [B, K, G] float32. Of completions, token by token, by the target itself.
      occurred: [B, K, V] bool. Tokens that came up; None without a repetition penalty.
      length: [B] int32. Of all hypotheses of a prompt.
      num_cached: [B] int32. Tokens that the cache covers.
      num_moves: [B] int32. Hypotheses whose keys and values were copied to another row.
      num_forwards: [B] int32. Of a prompt's hypotheses together, that of its prompt aside.
      prompt_len: [B] int32. Lengths before the first token.
      end: [B] int32. Largest lengths.
      strategy: its state.
      cache: of K B rows.
      key: [B, 2] uint32. One random stream per prompt.
      has_stopped: [B] bool.
      num_steps: scalar int32. Rounds of the loop, for the whole batch.
    """

    score: jax.Array
    candidates: jax.Array
    tokens: jax.Array
    log_prob: jax.Array
    occurred: jax.Array | None
    length: jax.Array
    num_cached: jax.Array
    num_moves: jax.Array
    num_forwards: jax.Array
    prompt_len: jax.Array
    end: jax.Array
    strategy: Any
    cache: KVCache
    key: jax.Array
    has_stopped: jax.Array
    num_steps: jax.Array


def begin(
    params: Params, cfg: ModelConfig, method: SearchMethod, prompts: Sequence[Sequence[int]], *,
    gen_len: int | Sequence[int], seeds: int | Sequence[int] = 0, prompt_len: int | None = None,
    canvas_len: int | None = None, batch_size: int | None = None, chunk: int = PREFILL,
) -> SearchState:  # fmt: skip
    """The state before the first round: prompts are read, but for their last tokens.

    Args:
      params, cfg: the model.
      method: how to search; checked here.
      prompts: token ids, at least one each.
      gen_len, seeds, prompt_len, canvas_len, batch_size, chunk: as in
        `decode.speculative.loop.init_state`, which raises the same errors.

    Raises:
      ValueError: see there.
    """
    method.validate(cfg)
    asked = read_requests(
        cfg, prompts, gen_len, seeds, prompt_len, canvas_len, batch_size, may_be_empty=False
    )
    chunk = min(asked.P, chunk)
    S = max(asked.P + asked.G + method.strategy.num_candidates, -(-asked.P // chunk) * chunk)
    tokens, length, end = lay_out(cfg, prompts, asked.gen_lens, asked.B, S)
    return _begin(params, cfg, method, tokens, length, end, asked.key, asked.G, chunk)


@functools.partial(jax.jit, static_argnames=("cfg", "G", "chunk"))
def _begin(
    params: Params, cfg: ModelConfig, method: SearchMethod, tokens: jax.Array, length: jax.Array,
    end: jax.Array, key: jax.Array, G: int, chunk: int,
) -> SearchState:  # fmt: skip
    """As `begin`, of rows that are laid out."""
    (B, S), strategy = tokens.shape, method.strategy
    K, n = strategy.width, strategy.num_candidates
    cache, known = init_cache(cfg, B, S), strategy.init(cfg, B, S, G)

    def read(i: jax.Array, carry: tuple[KVCache, Any]) -> tuple[KVCache, Any]:
        cache, known = carry
        start = jnp.broadcast_to(jnp.minimum(i * chunk, S - chunk), B)
        some = jax.lax.dynamic_slice_in_dim(tokens, start[0], chunk, axis=1)
        slots = Slots.append(cache, start).replace(length=end)
        output = decoder.forward(params, cfg, Window.at(some, start, is_causal=True), slots)
        assert output.cache is not None
        count = jnp.clip(length - 1 - start, 0, chunk)
        return output.cache, strategy.prefill(output.hidden, start, count, known)

    num_chunks = (length.max() - 1 + chunk - 1) // chunk
    cache, known = jax.lax.fori_loop(0, num_chunks, read, (cache, known))
    last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)
    occurred = None
    if method.sampling.repetition_penalty is not None:
        in_prompt = jnp.where(jnp.arange(S)[None] < length[:, None], tokens, cfg.vocab_size)
        occurred = jnp.zeros((B, cfg.vocab_size), bool)
        occurred = occurred.at[jnp.arange(B)[:, None], in_prompt].set(True, mode="drop")
        occurred = jnp.repeat(occurred[:, None], K, axis=1)
    zeros = functools.partial(jnp.zeros, B, jnp.int32)
    return SearchState(
        tokens=jnp.repeat(tokens[:, None], K, axis=1),
        length=jnp.copy(length),  # the state is given away, what the host holds is not
        prompt_len=jnp.copy(length),
        end=jnp.copy(end),
        num_cached=length - 1,
        candidates=jnp.broadcast_to(last[:, None], (B, K, n)),
        score=jnp.zeros((B, K)),
        log_prob=jnp.zeros((B, K, G)),
        num_forwards=zeros(),
        num_moves=zeros(),
        has_stopped=end == length,
        occurred=occurred,
        key=jnp.copy(key),
        cache=_under_all(cache, K),
        strategy=known,
        num_steps=jnp.zeros((), jnp.int32),
    )


def step(params: Params, cfg: ModelConfig, method: SearchMethod, state: SearchState) -> SearchState:
    """One round. Pure; prompts that are done stay as they are."""
    _, K, n = state.candidates.shape
    active = ~state.has_stopped
    with jax.named_scope("judge"):
        hidden, cache = _read(params, cfg, state)
    with jax.named_scope("choose"):
        seen = _seen(params, cfg, method, state, hidden)
        choice = method.strategy.choose(seen, state.strategy)
        order = staying(choice.source)
        choice = choice.replace(
            **{
                name: taken(getattr(choice, name), order)
                for name in ("source", "token", "log_prob", "score", "candidates", "node")
            }
        )
    with jax.named_scope("move"):
        if n > 1:
            node = jnp.where(active[:, None], choice.node, 0)
            cache = compact(cache, jnp.tile(state.num_cached, K), _by_row(node)[:, None])
        source = jnp.where(active[:, None], choice.source, jnp.arange(K)[None])
        cache, num_moves = _move(cache, source, state.prompt_len, state.log_prob.shape[2] + n)
    with jax.named_scope("write"):
        return _write(method, state, choice, source, active).replace(
            cache=cache, num_moves=state.num_moves + num_moves
        )


decode = loop.compile_decode(step)  # its arguments are said there


@jax.jit
def results(method: SearchMethod, state: SearchState) -> Results:
    """The best completions of every prompt; the state needs no cache."""
    tokens = completions_of(state.tokens, state.prompt_len, state.log_prob.shape[2])
    texts = Texts(tokens, state.log_prob, state.length - state.prompt_len, state.score)
    found = method.strategy.finish(texts, state.strategy)
    return jax.tree.map(lambda x: x[:, : method.num_return], found)


def _read(params: Params, cfg: ModelConfig, state: SearchState) -> tuple[jax.Array, KVCache]:
    """Final states [B, K, n, D] of the candidates, which do not see each other, and the cache."""
    B, K, n = state.candidates.shape
    start = jnp.tile(state.num_cached, K)
    tokens = state.candidates.swapaxes(0, 1).reshape(K * B, n)
    mask = None
    if n > 1:
        mask = pack_mask(jnp.broadcast_to(jnp.eye(n, dtype=bool)[None], (K * B, n, n)))
    positions = jnp.broadcast_to(start[:, None], tokens.shape)
    slots = Slots.append(state.cache, start, jnp.tile(~state.has_stopped, K))
    output = decoder.forward(
        params,
        cfg,
        Window(tokens, positions, mask, is_causal=n == 1),
        slots.replace(length=jnp.tile(state.end, K)),
    )
    assert output.cache is not None
    return output.hidden.reshape(K, B, n, -1).swapaxes(0, 1), output.cache


def _seen(
    params: Params, cfg: ModelConfig, method: SearchMethod, state: SearchState, hidden: jax.Array
) -> Round:
    """What the strategy is told."""
    head, length = vocab.head(params), state.length
    ids = jnp.asarray(method.stop_ids, jnp.int32).reshape(-1)
    ids = jnp.append(ids, jnp.asarray(cfg.eos_ids, jnp.int32))

    def is_end(tokens: jax.Array) -> jax.Array:
        return (tokens[..., None] == ids.reshape((1,) * tokens.ndim + (-1,))).any(axis=-1)

    @functools.cache
    def log_probs() -> jax.Array:
        return _shaped(method, state, jax.nn.log_softmax(vocab.logits(head, hidden)))

    def best(k: int) -> tuple[jax.Array, jax.Array]:
        k = min(k, cfg.vocab_size)
        if not method.is_plain:
            found, tokens = jax.lax.top_k(log_probs(), k)
            return tokens.astype(jnp.int32), found
        stats = vocab.read(head, hidden, k=k)
        assert stats.top_tokens is not None and stats.top_log_probs is not None
        return stats.top_tokens, stats.top_log_probs

    return Round(
        best=best,
        log_probs=log_probs,
        hidden=hidden,
        candidates=state.candidates,
        tokens=state.tokens,
        log_prob=state.log_prob,
        length=length,
        prompt_len=state.prompt_len,
        end=state.end,
        is_first=state.num_cached < state.prompt_len,
        is_end=is_end,
        score=state.score,
        key=fold_in(state.key, state.num_forwards),
        active=~state.has_stopped,
    )


def _shaped(method: SearchMethod, state: SearchState, log_probs: jax.Array) -> jax.Array:
    """Log-probabilities [B, K, n, V] after bias, penalty and bans, not normalised again.

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
    return jnp.where(is_banned.reshape(B, K, 1, V), BANNED, log_probs)


def _write(
    method: SearchMethod,
    state: SearchState,
    choice: Choice,
    source: jax.Array,
    active: jax.Array,
) -> SearchState:
    """The texts of the next round."""
    (B, K, S), is_ahead = state.tokens.shape, method.strategy.looks_ahead
    G = state.log_prob.shape[2]
    rows, lanes = jnp.arange(B)[:, None], jnp.arange(K)[None]
    is_written = active[:, None] & (choice.token >= 0)
    at = jnp.where(is_written, state.length[:, None], S)
    place = jnp.where(is_written, (state.length - state.prompt_len)[:, None], G)
    tokens = taken(state.tokens, source).at[rows, lanes, at].set(choice.token, mode="drop")
    log_prob = taken(state.log_prob, source)
    log_prob = log_prob.at[rows, lanes, place].set(choice.log_prob, mode="drop")
    occurred = state.occurred
    if occurred is not None:
        token = jnp.where(is_written, choice.token, occurred.shape[2])
        occurred = taken(occurred, source).at[rows, lanes, token].set(True, mode="drop")
    longer = state.length + is_written.any(axis=1)
    length = longer if choice.length is None else choice.length
    length = jnp.where(active, length, state.length)
    keep = lambda new, old: jnp.where(  # noqa: E731
        active.reshape(-1, *[1] * (new.ndim - 1)), new, old
    )
    return state.replace(
        tokens=tokens,
        length=length,
        num_cached=jnp.where(active, length - (not is_ahead), state.num_cached),
        candidates=keep(choice.candidates, state.candidates),
        score=keep(choice.score, state.score),
        log_prob=log_prob,
        num_forwards=state.num_forwards + active,
        has_stopped=state.has_stopped | choice.is_done | (length >= state.end),
        occurred=occurred,
        strategy=jax.tree.map(keep, choice.state, state.strategy),
        num_steps=state.num_steps + 1,
    )


def _under_all(cache: KVCache, K: int) -> KVCache:
    """The cache of B prompts as that of K B hypotheses."""
    if K == 1:
        return cache
    return jax.tree.map(lambda x: jnp.concatenate([x] * K, axis=x.ndim - 4), cache)


def _move(
    cache: KVCache, source: jax.Array, first: jax.Array, num_slots: int
) -> tuple[KVCache, jax.Array]:
    """Copies what stands behind prompts, from rows of sources to rows that they are to be.

    A source stays where it is, as `staying` has it, so nothing is read that was overwritten.

    Args:
      cache: of K B rows.
      source: [B, K] int32.
      first: [B] int32. The first slot that differs.
      num_slots: behind it that may.

    Returns:
      The cache, and how many were copied, [B] int32.
    """
    B, K = source.shape
    is_moved = source != jnp.arange(K)[None]
    if K == 1:
        return cache, jnp.zeros(B, jnp.int32)
    order = jnp.argsort(~is_moved.reshape(-1), stable=True)
    num_slots = min(num_slots, cache.num_slots)
    first = jnp.minimum(first, cache.num_slots - num_slots)

    def copy(i: jax.Array, cache: KVCache) -> KVCache:
        b, k = order[i] // K, order[i] % K
        old, new = source[b, k] * B + b, k * B + b

        def one(x: jax.Array) -> jax.Array:  # [..., K B, heads, S, H]
            lead = x.ndim - 4
            at = lambda row: (0,) * lead + (row, 0, first[b], 0)  # noqa: E731
            size = (*x.shape[:lead], 1, x.shape[-3], num_slots, x.shape[-1])
            taken = jax.lax.dynamic_slice(x, at(old), size)
            return jax.lax.dynamic_update_slice(x, taken, at(new))

        def every(x: jax.Array | Apart) -> jax.Array | Apart:
            return Apart(tuple(map(one, x.layers))) if isinstance(x, Apart) else one(x)

        return jax.tree.map(every, cache, is_leaf=is_apart)

    cache = jax.lax.fori_loop(0, is_moved.sum(), copy, cache)
    return cache, is_moved.sum(axis=1, dtype=jnp.int32)


def _by_row(x: jax.Array) -> jax.Array:
    """[B, K] as the rows of the cache have it, [K B]."""
    return x.swapaxes(0, 1).reshape(-1)
