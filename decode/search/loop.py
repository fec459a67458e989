"""The search loop: read the candidates of all hypotheses, choose, move what has to be moved.

A method is a pytree of choices, whose structure picks the program and whose leaves are data:

    strategy         which hypotheses go on?                         decode/search/strategies/
    sampling         bias, penalties, filters                        decode/core/sampling.py
    no_repeat_ngram  sequences that may not come up twice
    constraint       what is allowed at all?                         decode/search/constrained.py
    adaptation       steps of the prompt's states                    decode/core/hso.py

The rows of the cache are hypotheses: on every device with B prompts row k B + b is the k-th of its
prompt b. A prompt is read once and its keys and values are then laid under all of its hypotheses;
where a hypothesis gets a second child, only what stands behind the prompt is copied, from row to
row. (Where all hypotheses of a prompt share a row, nothing ever is.) The candidates of a round are
the last tokens of the texts, where there is one, else what may come behind them; the cache covers
what stands before. A strategy may have hypotheses wait: a round reads the first rows only, if no
prompt of the batch needs more.

A round is `decode.search.judge`, the strategy, and `decode.search.move`.

Letters: B prompts, K hypotheses, n candidates, P longest prompt, G completion positions, S slots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from decode.core import loop
from decode.core.requests import PREFILL, lay_out, piece_len, read_requests
from decode.search import constrained
from decode.search.contracts import (
    Choice,
    Results,
    Round,
    Texts,
    Weighed,
    completions_of,
    staying,
    taken,
)
from decode.search.judge import read, what_is_seen
from decode.search.method import SearchMethod
from decode.search.move import by_row, that_occur, under_all, write
from decode.search.state import SearchState
from dlm.cache import KVCache, compact, copy_rows, init_cache
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import Params
from dlm.window import Slots, Window

__all__ = ["SearchMethod", "SearchState", "begin", "decode", "results", "step", "weighed"]


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
    chunk = piece_len(asked.P, chunk)
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
    if method.adaptation is not None:
        adapt = method.adaptation.of_prompts
        cache, hidden, start, count = adapt(params, cfg, cache, tokens, length, end)
        known = strategy.prefill(hidden, start, count, known)
    last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)
    occurred = None
    if method.keeps_occurred:
        occurred = jnp.repeat(that_occur(tokens[:, None], length, cfg.vocab_size), K, axis=1)
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
        cache=under_all(cache, method.num_rows),
        strategy=known,
        constraint=None
        if method.constraint is None
        else constrained.init(method.constraint, cfg, B, K, n),
        num_steps=jnp.zeros((), jnp.int32),
    )


def step(params: Params, cfg: ModelConfig, method: SearchMethod, state: SearchState) -> SearchState:
    """One round. Pure; prompts that are done stay as they are.

    Of several widths it has one round each, of which one runs.
    """
    widths = method.strategy.widths
    if len(widths) == 1:
        return _round(params, cfg, method, method.strategy.width, state)
    live = jnp.where(state.has_stopped, 0, method.strategy.num_live(state.strategy)).max()
    enough = (jnp.asarray(widths[:-1]) < live).sum()
    for i, width in enumerate(widths):
        run = functools.partial(_round, params, cfg, method, width)
        state = loop.in_place(enough == i, run, state)
    return state


def _round(
    params: Params, cfg: ModelConfig, method: SearchMethod, width: int, state: SearchState
) -> SearchState:
    """As `step`, of which the first `width` hypotheses are read."""
    _, K, n = state.candidates.shape
    active, here = ~state.has_stopped, state.first(width)
    with jax.named_scope("judge"):
        hidden, cache = read(params, cfg, method, here)
    with jax.named_scope("choose"):
        seen = what_is_seen(params, cfg, method, here, hidden)
        choice = _choose(method, seen, state)
    with jax.named_scope("move"):
        if n > 1:
            node = jnp.where(active[:, None], choice.node, 0)
            start = by_row(jnp.broadcast_to(state.num_cached[:, None], node.shape))
            cache = compact(cache, start, by_row(node)[:, None])
        source = jnp.where(active[:, None], choice.source, jnp.arange(K)[None])
        if method.num_rows > 1:
            # While the others wait, the first hypothesis alone has the prompt's last token.
            more = int(len(method.strategy.widths) > 1)
            num_slots = state.log_prob.shape[2] + n + more
            cache = copy_rows(cache, source, state.prompt_len - more, num_slots)
            num_moves = (source != jnp.arange(K)[None]).sum(axis=1, dtype=jnp.int32)
        else:
            num_moves = jnp.zeros_like(state.num_moves)
    with jax.named_scope("write"):
        return write(cfg, method, state, choice, source).replace(
            cache=cache, num_moves=state.num_moves + num_moves
        )


def _choose(method: SearchMethod, seen: Round, state: SearchState) -> Choice:
    """The hypotheses of the next round, where they can in the places of those they come from."""
    choice = method.strategy.choose(seen, state.strategy)
    if len(method.strategy.widths) > 1:
        return choice
    order = staying(choice.source)
    names = ("source", "token", "log_prob", "score", "candidates", "node")
    return choice.replace(**{name: taken(getattr(choice, name), order) for name in names})


decode = loop.compile_decode(step)  # its arguments are said there


@functools.partial(jax.jit, static_argnames=("cfg",))
def weighed(
    params: Params, cfg: ModelConfig, method: SearchMethod, state: SearchState
) -> tuple[Weighed, jax.Array, jax.Array]:
    """What will be compared in the next round, and where hypotheses will come from.

    The state stays as it is.

    Returns:
      What is compared; of each hypothesis of the next round which one it comes from, and the token
      that is written behind it, or -1, both [B, K] int32.
    """
    hidden, _ = read(params, cfg, method, state)
    seen = what_is_seen(params, cfg, method, state, hidden)
    choice = _choose(method, seen, state)
    return method.strategy.weigh(seen, state.strategy), choice.source, choice.token


@jax.jit
def results(method: SearchMethod, state: SearchState) -> Results:
    """The best completions of every prompt; the state needs no cache."""
    tokens = completions_of(state.tokens, state.prompt_len, state.log_prob.shape[2])
    texts = Texts(tokens, state.log_prob, state.length - state.prompt_len, state.score)
    found = method.strategy.finish(texts, state.strategy)
    return jax.tree.map(lambda x: x[:, : method.num_return], found)
