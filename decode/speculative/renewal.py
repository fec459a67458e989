"""A further text in the place of a finished one that began like it: what both share is not read.

Between rounds the cache of a row covers all of its tokens but the last one, and a token lies in the
slot of its position. So of a text that begins with n of them the cache holds the keys of n tokens,
whatever stands behind, and `prefill` begins there; drafters say what they know of them
(`Drafter.keep`). A dialogue asks like this, turn after turn, see `decode.conversation`.

Letters: B rows, S token slots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from decode.core.requests import lay_out, read_requests
from decode.speculative.loop import SpeculativeMethod, SpeculativeState
from decode.speculative.state import first_state, num_rows
from dlm.cache import KVCache
from dlm.config import ModelConfig


def renew(
    cfg: ModelConfig,
    method: SpeculativeMethod,
    state: SpeculativeState,
    prompts: Sequence[Sequence[int]],
    *,
    num_kept: int,
    gen_len: int | Sequence[int],
    seeds: int | Sequence[int] = 0,
    chunk: int,
) -> SpeculativeState:
    """The state before `prefill` of further prompts, in the shapes of an earlier state.

    `num_read` says from which position on prompts will be read: at least their last two tokens are
    left, as drafters want to see something. A drafter begins anew where nothing is kept.

    Args:
      cfg: the target.
      method: that of `state`, or one of the same structure.
      state: of texts that are done, or were given up; it is given away.
      prompts: token ids per row.
      num_kept: >= 0, tokens that all of them begin with as the texts of `state` do.
      gen_len, seeds, chunk: as of `init_state`.

    Raises:
      ValueError: as `init_state`, and where prompt and completion do not fit into the state.
    """
    method.validate(cfg)
    (B, S), G = state.tokens.shape, state.step_map.shape[1]
    P = S - G - num_rows(cfg, method)
    asked = read_requests(cfg, prompts, gen_len, seeds, P, G, B, may_be_empty=False)
    rows = lay_out(cfg, prompts, asked.gen_lens, B, S)
    ended = state.length, state.end
    kept = state.cache, state.drafter
    return _renewed(cfg, method, *rows, asked.key, G, min(S, chunk), kept, ended, num_kept)


def enlarge(state: SpeculativeState, old: SpeculativeState) -> SpeculativeState:
    """`old` with as many slots as `state`, a first one of the same method, has; both given away."""
    caches = _put_first((state.cache, state.drafter), (old.cache, old.drafter))
    return state.replace(
        cache=caches[0], drafter=caches[1], length=jnp.copy(old.length), end=jnp.copy(old.end)
    )


@functools.partial(
    jax.jit, static_argnames=("cfg", "G", "chunk"), donate_argnames=("kept",)
)  # the other arguments are those of `first_state`
def _renewed(
    cfg: ModelConfig, method: SpeculativeMethod, tokens: jax.Array, length: jax.Array,
    end: jax.Array, key: jax.Array, G: int, chunk: int, kept: tuple[KVCache, Any],
    ended: tuple[jax.Array, jax.Array], num_kept: jax.Array,
) -> SpeculativeState:  # fmt: skip
    """As `renew`; `ended` are lengths and ends of the texts that `kept` is of, each [B] int32."""
    state = first_state(cfg, method, tokens, length, end, key, G, chunk)
    (cache, drafter), (old_length, old_end) = kept, ended
    is_kept = ~state.has_stopped  # rows without a prompt have no say
    num_kept = jnp.where(is_kept, jnp.minimum(num_kept, old_length - 1), 0)
    if cfg.rope_scaling is not None:
        num_kept = jnp.where(cfg.rope_scaling.is_same(end, old_end), num_kept, 0)
    drafter, known = method.drafter.keep(cfg, drafter, old_length, num_kept)
    known = jnp.minimum(jnp.minimum(known, num_kept), length - 2)
    first = jnp.where(is_kept, known, cfg.max_seq_len).min()
    first = jnp.where(is_kept.any(), jnp.maximum(first, 0), 0)
    drafter = jax.tree.map(lambda new, old: jnp.where(first > 0, old, new), state.drafter, drafter)
    return state.replace(cache=cache, drafter=drafter, num_read=jnp.full_like(length, first))


@functools.partial(jax.jit, donate_argnames=("large",))
def _put_first(large: Any, small: Any) -> Any:
    """Every array of `small` in the first places of its counterpart."""
    put = lambda to, what: jax.lax.dynamic_update_slice(to, what, (0,) * to.ndim)  # noqa: E731
    return jax.tree.map(put, large, small)
