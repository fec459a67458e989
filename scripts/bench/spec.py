"""What drafting and verifying cost: rounds of W nodes against a one-token forward.

Rounds of trees of 1 to 64 nodes that are drafted for free
say what judging costs; rounds of real drafters, all with one tree (chains: as many drafts as it is
deep, DFlash a block of 8), say what drafting adds. Weights are random, so nothing is said about how
much is accepted: `break_even` is the acceptance length from which a round pays, and an acceptance
length over it is the speed-up.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from tqdm import tqdm

from decode.speculative.contracts import Context, Drafter, Proposal, spent
from decode.speculative.drafters.dflash import DFlash
from decode.speculative.drafters.draft_model import DraftModel
from decode.speculative.drafters.eagle import Eagle
from decode.speculative.drafters.hydra import Hydra
from decode.speculative.drafters.medusa import Medusa
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.loop import SpeculativeMethod, SpeculativeState, init_state, prefill, step
from decode.speculative.tree import TreeShape, chain
from dlm import vocab
from dlm.config import ModelConfig
from dlm.heads.dflash import DFlashHeads
from dlm.heads.eagle_1 import Eagle1Heads
from dlm.heads.eagle_3 import Eagle3Heads
from dlm.heads.hydra import HydraHeads
from dlm.heads.medusa import MedusaHeads
from dlm.models.decoder import forward
from dlm.params import Params, init_from_specs, init_params, num_params
from dlm.window import Slots, Window
from scripts.bench.models import random_params
from scripts.bench.timing import Ceilings, forward_cost, measure_ceilings, paired_medians_s
from scripts.quickstart_spec.drafters import NUM_DRAFTS, TREE

NODES = (1, 8, 32, 64)
COLUMNS = ["batch", "drafter", "nodes", "round_ms", "one_token_ms", "break_even", "bound",
           "roofline_share"]  # fmt: skip
FREE = "none"
ROUNDS_PER_CALL = 4  # the loop's own overhead is part of a round; dispatch from Python is not


@struct.dataclass
class Binary(Drafter):
    """A tree of two children per node, of the root's own token: drafting that costs nothing."""

    shape: TreeShape = struct.field(pytree_node=False, default=chain(0))

    def propose(self, cfg: ModelConfig, context: Context, state: Any) -> Proposal:
        tokens = jnp.broadcast_to(context.root[:, None], (len(context.root), self.num_nodes))
        return Proposal(self.shape.tree(tokens), spent(context, 0), state)


def binary_tree(num_nodes: int) -> TreeShape:
    """Node v's parent is (v - 1) // 2."""
    if num_nodes == 1:
        return chain(0)
    return TreeShape(
        tuple((v - 1) // 2 for v in range(1, num_nodes)),
        tuple((v - 1) % 2 for v in range(1, num_nodes)),
    )


def drafters(cfg: ModelConfig, draft: ModelConfig) -> Iterator[tuple[str, Drafter]]:
    """Drafters of a target `cfg`, by name, with random weights.

    Args:
      cfg: the target.
      draft: of the separate draft model.
    """
    keys = iter(jax.random.split(jax.random.key(1), 8))

    def own(heads: Any) -> Params:
        return init_from_specs(next(keys), heads.specs(cfg), cfg.jnp_dtype)

    yield "prompt lookup", PromptLookup(NUM_DRAFTS)
    yield "Medusa", Medusa(own(MedusaHeads()), TREE)
    yield "Hydra", Hydra(own(HydraHeads()), TREE)
    for name, heads in (("EAGLE-1", Eagle1Heads()), ("EAGLE-3", Eagle3Heads())):
        yield name, Eagle(heads.network(cfg, own(heads)), TREE)
    dflash = DFlashHeads(block_len=8, n_layers=min(5, cfg.n_layers - 1), mask_id=0)
    yield "DFlash", DFlash(dflash.network(cfg, own(dflash)))
    yield "draft model", DraftModel(init_params(next(keys), draft), draft, NUM_DRAFTS)


def bench_spec(
    cfg: ModelConfig, draft: ModelConfig, batches: list[int], prompt_len: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Results of every batch size.

    Args:
      cfg: the target.
      draft: of the separate draft model; all weights are random.
      batches: rows.
      prompt_len: tokens.
      repeats: timed runs.
    """
    ceilings = measure_ceilings(cfg.dtype, repeats)
    for batch in tqdm(batches, desc="batch sizes"):
        yield from _bench_batch(cfg, draft, batch, prompt_len, repeats, ceilings)


def _bench_batch(
    cfg: ModelConfig,
    draft: ModelConfig,
    batch: int,
    prompt_len: int,
    repeats: int,
    ceilings: Ceilings,
) -> list[dict[str, Any]]:
    """Rounds of every size and drafter, and a bare jitted forward of one token, in turn."""
    params = random_params(cfg)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, cfg.vocab_size - 2, (batch, prompt_len)).tolist()
    given = [(FREE, Binary(binary_tree(nodes))) for nodes in NODES] + [*drafters(cfg, draft)]

    def prepare(drafter: Drafter) -> tuple[Any, SpeculativeState]:
        method = SpeculativeMethod(drafter)
        state = init_state(cfg, method, prompts, gen_len=max(NODES))
        state = prefill(params, cfg, method, state)
        rounds = jax.jit(_repeat_round, static_argnames=("cfg",))
        compiled = rounds.lower(params, cfg, method, state).compile()
        return functools.partial(compiled, params, method, state), state

    with futures.ThreadPoolExecutor() as pool:  # compilation takes longer than all timings
        prepared = [*pool.map(prepare, [drafter for _, drafter in given])]
    runs: dict[Any, Any] = {
        (name, drafter.num_nodes): run
        for (name, drafter), (run, _) in zip(given, prepared, strict=True)
    }
    bare = jax.jit(_repeat_bare, static_argnames=("cfg",))
    runs[None] = functools.partial(bare, params, cfg, prepared[0][1])
    medians: dict[Any, float] = {
        name: seconds / ROUNDS_PER_CALL for name, seconds in paired_medians_s(runs, repeats).items()
    }
    results = []
    for name, nodes in (key for key in runs if key is not None):
        flops, num_bytes = forward_cost(cfg, batch, nodes, prompt_len, nodes)
        floor_s = max(flops / ceilings.flops_per_s, num_bytes / ceilings.bytes_per_s)
        seconds = medians[name, nodes]
        results.append(
            {
                "case": "spec", "device": jax.devices()[0].device_kind, "jax": jax.__version__,
                "dtype": cfg.dtype, "params_m": round(num_params(cfg) / 1e6, 1), "batch": batch,
                "prompt_len": prompt_len, "drafter": name, "nodes": nodes,
                "round_ms": round(1e3 * seconds, 3),
                "one_token_ms": round(1e3 * medians[None], 3),
                "break_even": round(seconds / medians[None], 2),
                "bound": "compute" if flops / ceilings.flops_per_s == floor_s else "bandwidth",
                "roofline_share": round(floor_s / seconds, 3),
                "ceiling_gflops": round(ceilings.flops_per_s / 1e9, 1),
                "ceiling_gb_per_s": round(ceilings.bytes_per_s / 1e9, 1),
            }
        )  # fmt: skip
    return results


def _repeat_round(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> tuple[jax.Array, Any]:
    """Rounds that all start from the same length, so that all read as much of the cache."""

    def body(_: int, carry: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, Any, Any]:
        tokens, cache, drafter = carry
        before = state.replace(tokens=tokens, cache=cache, drafter=drafter)
        after = step(params, cfg, method, before)
        return after.tokens, after.cache, after.drafter

    start = (state.tokens, state.cache, state.drafter)
    tokens, _, drafter = jax.lax.fori_loop(0, ROUNDS_PER_CALL, body, start)
    return tokens, drafter  # what it keeps is part of the work


def _repeat_bare(params: Params, cfg: ModelConfig, state: SpeculativeState) -> jax.Array:
    """One token and its arg-max, written to the cache."""
    at = state.length - 1
    rows = jnp.arange(len(at))

    def body(_: int, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        token, cache = carry
        output = forward(params, cfg, Window.at(token[:, None], at), Slots.append(cache, at))
        return vocab.read(vocab.head(params), output.hidden[:, 0]).token, output.cache

    start = (state.tokens[rows, at], state.cache)
    return jax.lax.fori_loop(0, ROUNDS_PER_CALL, body, start)[0]
