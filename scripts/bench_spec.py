"""What judging a draft tree costs: rounds of W nodes against a one-token forward.

Used by `python -m scripts.bench spec`. Weights are random, so nothing is said about how much is
accepted; `break_even` is the acceptance length from which a round of that size pays, drafting for
free.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.drafters.contracts import Context, Drafter
from decode.speculative import (
    SpeculativeMethod,
    SpeculativeState,
    init_state,
    prefill,
    step,
)
from decode.tree import DraftTree, TreeShape, chain
from dlm.config import ModelConfig
from dlm.params import Params, init_params, num_params
from dlm.transformer import forward, vocab_stats
from scripts.timing import Ceilings, forward_cost, paired_medians_s

NODES = (1, 8, 32, 64)
COLUMNS = ["batch", "nodes", "round_ms", "one_token_ms", "break_even", "bound", "roofline_share"]
ROUNDS_PER_CALL = 4  # the loop's own overhead is part of a round; dispatch from Python is not


@struct.dataclass
class Binary(Drafter):
    """A tree of two children per node, of the root's own token: drafting that costs nothing."""

    shape: TreeShape = struct.field(pytree_node=False, default=chain(0))

    def propose(self, cfg: ModelConfig, context: Context, state: Any) -> tuple[DraftTree, Any]:
        tokens = jnp.broadcast_to(context.root[:, None], (len(context.root), self.num_nodes))
        return self.shape.tree(tokens), state


def binary_tree(num_nodes: int) -> TreeShape:
    """Node v's parent is (v - 1) // 2."""
    if num_nodes == 1:
        return chain(0)
    return TreeShape(
        tuple((v - 1) // 2 for v in range(1, num_nodes)),
        tuple((v - 1) % 2 for v in range(1, num_nodes)),
    )


def bench_spec(
    cfg: ModelConfig, batch: int, prompt_len: int, repeats: int, ceilings: Ceilings
) -> list[dict[str, Any]]:
    """Rounds of every size, and a bare jitted forward of one token with an arg-max, in turn."""
    params = jax.block_until_ready(init_params(jax.random.key(0), cfg))
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, cfg.vocab_size - 2, (batch, prompt_len)).tolist()
    runs: dict[str, Any] = {}
    for nodes in NODES:
        method = SpeculativeMethod(Binary(binary_tree(nodes)))
        state = init_state(cfg, method, prompts, gen_len=nodes)
        state = prefill(params, cfg, method, state)
        rounds = jax.jit(_repeat_round, static_argnames=("cfg",))
        runs[str(nodes)] = functools.partial(rounds, params, cfg, method, state)
    bare = jax.jit(_repeat_bare, static_argnames=("cfg",))
    runs["bare"] = functools.partial(bare, params, cfg, state)
    medians = {
        name: seconds / ROUNDS_PER_CALL for name, seconds in paired_medians_s(runs, repeats).items()
    }
    results = []
    for nodes in NODES:
        flops, num_bytes = forward_cost(cfg, batch, nodes, prompt_len, nodes)
        floor_s = max(flops / ceilings.flops_per_s, num_bytes / ceilings.bytes_per_s)
        seconds = medians[str(nodes)]
        results.append(
            {
                "case": "spec", "device": jax.devices()[0].device_kind, "jax": jax.__version__,
                "dtype": cfg.dtype, "params_m": round(num_params(cfg) / 1e6, 1), "batch": batch,
                "prompt_len": prompt_len, "nodes": nodes, "round_ms": round(1e3 * seconds, 3),
                "one_token_ms": round(1e3 * medians["bare"], 3),
                "break_even": round(seconds / medians["bare"], 2),
                "bound": "compute" if flops / ceilings.flops_per_s == floor_s else "bandwidth",
                "roofline_share": round(floor_s / seconds, 3),
                "ceiling_gflops": round(ceilings.flops_per_s / 1e9, 1),
                "ceiling_gb_per_s": round(ceilings.bytes_per_s / 1e9, 1),
            }
        )  # fmt: skip
    return results


def _repeat_round(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> jax.Array:
    """Rounds that all start from the same length, so that all read as much of the cache."""

    def body(_: int, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        tokens, cache = carry
        after = step(params, cfg, method, state.replace(tokens=tokens, cache=cache))
        return after.tokens, after.cache

    return jax.lax.fori_loop(0, ROUNDS_PER_CALL, body, (state.tokens, state.cache))[0]


def _repeat_bare(params: Params, cfg: ModelConfig, state: SpeculativeState) -> jax.Array:
    """One token and its arg-max, written to the cache."""
    at = state.length - 1
    ranges = jnp.stack([jnp.zeros_like(at), at], axis=1)[:, None]
    rows = jnp.arange(len(at))

    def body(_: int, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        token, cache = carry
        output = forward(
            params, cfg, token[:, None], positions=at[:, None], cache=cache, cache_ranges=ranges,
            write_at=at,
        )  # fmt: skip
        return vocab_stats(params, output.hidden[:, 0]).token, output.cache

    start = (state.tokens[rows, at], state.cache)
    return jax.lax.fori_loop(0, ROUNDS_PER_CALL, body, start)[0]
