"""What the loop of draft and verify carries, and how it begins: rows laid out, prompts read.

Letters: B rows, S cache slots, G completion positions, W tree nodes, J largest depth, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.requests import PREFILL, lay_out, piece_len, read_requests
from decode.core.results import TopTokens
from decode.core.streams import Stream, fold_in
from decode.speculative.contracts import Context, Seen
from decode.speculative.controller import ControllerState
from decode.speculative.method import SpeculativeMethod
from dlm.cache import KVCache, init_cache
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import Params
from dlm.window import Slots, Window


class SpeculativeState(struct.PyTreeNode):
    """Everything the loop carries, and everything that is reported afterwards.

    Attributes:
      tokens: [B, S] int32. Prompts and completions from slot 0; behind them there is padding.
      length: [B] int32. Tokens of a row so far.
      prompt_len: [B] int32.
      end: [B] int32. `prompt_len` plus the most tokens to write.
      step_map: [B, G] int32. The row's 0-based round that wrote a token; -1: none did.
      log_prob: [B, G] float32. Of the token, by the target itself: no filter, no temperature.
      num_forwards: [B] int32. Forwards of the target made for the row, those of its prompt aside.
      draft_forwards: [B] int32. Forwards of the draft model.
      acceptance_histogram: [B, J + 1] int32. Rounds by how many drafts they accepted.
      has_stopped: [B] bool.
      occurred: [B, V] bool; None without a repetition penalty. Tokens that came up.
      key: [B, 2] uint32. One random stream per row.
      cache: of the target.
      drafter: the drafter's state.
      top: the n most probable tokens per position written; None: they are not kept.
      control: what the controller has seen and chosen; None without one.
      num_steps: scalar int32. Rounds of the loop, for the whole batch.
      num_read: [B] int32. Tokens of the prompt that the cache holds.
      chunk: prompt tokens read per forward. Static.
    """

    tokens: jax.Array
    length: jax.Array
    prompt_len: jax.Array
    end: jax.Array
    step_map: jax.Array
    log_prob: jax.Array
    num_forwards: jax.Array
    draft_forwards: jax.Array
    acceptance_histogram: jax.Array
    has_stopped: jax.Array
    occurred: jax.Array | None
    key: jax.Array
    cache: KVCache
    drafter: Any
    top: TopTokens | None
    control: ControllerState | None
    num_steps: jax.Array
    num_read: jax.Array
    chunk: int = struct.field(pytree_node=False)


def init_state(
    cfg: ModelConfig,
    method: SpeculativeMethod,
    prompts: Sequence[Sequence[int]],
    *,
    gen_len: int | Sequence[int],
    seeds: int | Sequence[int] = 0,
    prompt_len: int | None = None,
    canvas_len: int | None = None,
    batch_size: int | None = None,
    chunk: int = PREFILL,
) -> SpeculativeState:
    """The state before anything was read.

    Args:
      cfg: the target.
      method: how to decode; checked here.
      prompts: token ids per row, at least one each.
      gen_len: most tokens to write, end-of-text included; one for all rows or one per row.
      seeds: random seed, one for all rows (row i then uses seed + i) or one per row.
      prompt_len: at least the longest prompt; default: just that. Buckets of it save compilations.
      canvas_len: G >= the longest `gen_len`; default: just that.
      batch_size: B >= the number of prompts; the rows added are done from the start.
      chunk: most prompt tokens read per forward.

    Raises:
      ValueError: on an empty list or prompt, ids the model does not have, lengths the model does
        not allow, or a method that makes no sense.
    """
    method.validate(cfg)
    asked = read_requests(
        cfg, prompts, gen_len, seeds, prompt_len, canvas_len, batch_size, may_be_empty=False
    )
    P, G, B = asked.P, asked.G, asked.B
    chunk = piece_len(P, chunk)
    W = num_rows(cfg, method)
    # A tree may be judged at the last position, and prompts are read in whole chunks.
    S = max(P + G + W, -(-P // chunk) * chunk)

    rows = lay_out(cfg, prompts, asked.gen_lens, B, S)
    return first_state(cfg, method, *rows, asked.key, G, chunk)


def num_rows(cfg: ModelConfig, method: SpeculativeMethod) -> int:
    """The most positions that a round judges at once: what a cache must have room for."""
    nodes = method.drafter.num_nodes
    return nodes + method.drafter.num_extra + (nodes if cfg.writes_in_place else 0)


@functools.partial(jax.jit, static_argnames=("cfg", "G", "chunk"))
def first_state(
    cfg: ModelConfig, method: SpeculativeMethod, tokens: jax.Array, length: jax.Array,
    end: jax.Array, key: jax.Array, G: int, chunk: int,
) -> SpeculativeState:  # fmt: skip
    """The state of rows of which nothing was read; see `SpeculativeState`.

    One program, as rows that are replaced while others go on wait for it.
    """
    (B, S), drafter = tokens.shape, method.drafter
    zeros = functools.partial(jnp.zeros, B, jnp.int32)
    occurred = None
    if method.sampling.repetition_penalty is not None:
        in_prompt = jnp.where(jnp.arange(S)[None] < length[:, None], tokens, cfg.vocab_size)
        occurred = jnp.zeros((B, cfg.vocab_size), bool)
        occurred = occurred.at[jnp.arange(B)[:, None], in_prompt].set(True, mode="drop")
    return SpeculativeState(
        tokens=jnp.copy(tokens),  # the state is given away, what the host holds is not
        length=jnp.copy(length),
        prompt_len=jnp.copy(length),
        num_read=zeros(),
        end=jnp.copy(end),
        step_map=jnp.full((B, G), -1, jnp.int32),
        log_prob=jnp.zeros((B, G)),
        num_forwards=zeros(),
        draft_forwards=zeros(),
        acceptance_histogram=jnp.zeros((B, drafter.depth + 1), jnp.int32),
        has_stopped=end == length,
        occurred=occurred,
        key=jnp.copy(key),
        cache=init_cache(cfg, B, S),
        drafter=drafter.init(cfg, B, S),
        top=TopTokens.empty((B, G, method.top_logprobs)) if method.top_logprobs else None,
        control=None if method.controller is None else method.controller.init(drafter, B),
        num_steps=jnp.zeros((), jnp.int32),
        chunk=chunk,
    )


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
def prefill(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> SpeculativeState:
    """Reads all prompts but their last tokens, `chunk` positions per forward.

    What every row has read already is not read again, up to a last window that is whole.
    """
    (B, S), chunk = state.tokens.shape, state.chunk
    context = context_of(params, method, state)
    first = state.num_read.min()

    def read(i: jax.Array, carry: tuple[KVCache, Any]) -> tuple[KVCache, Any]:
        cache, drafter = carry
        start = jnp.broadcast_to(jnp.minimum(first + i * chunk, S - chunk), B)
        tokens = jax.lax.dynamic_slice_in_dim(state.tokens, start[0], chunk, axis=1)
        count = jnp.clip(state.prompt_len - 1 - start, 0, chunk)
        output = decoder.forward(
            params,
            cfg,
            Window.at(tokens, start, is_causal=True),
            Slots.append(cache, start).replace(length=state.end),
            feature_layers=method.drafter.feature_layers,
        )
        seen = Seen(tokens, output.hidden, start, count, output.features)
        assert output.cache is not None
        return output.cache, method.drafter.prefill(cfg, context, seen, drafter)

    num_chunks = (state.prompt_len.max() - 1 - first + chunk - 1) // chunk
    cache, drafter = jax.lax.fori_loop(0, num_chunks, read, (state.cache, state.drafter))
    return state.replace(cache=cache, drafter=drafter, num_read=state.prompt_len - 1)


def context_of(params: Params, method: SpeculativeMethod, state: SpeculativeState) -> Context:
    """What a drafter is told before a round."""
    return Context(
        params=params,
        tokens=state.tokens,
        length=state.length,
        key=fold_in(fold_in(state.key, state.num_forwards), Stream.DRAFT),
        sampling=method.sampling,
        active=~state.has_stopped,
        cache=state.cache,
        end=state.end,
        prompt_len=state.prompt_len,
        may_pause=method.controller is not None,
    )
