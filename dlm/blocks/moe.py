"""Experts: MLPs of which a router chooses some for every token.

Reference: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated
Mixture-of-Experts Layer", arXiv:1701.06538; routers as in the public code of Mixtral, Qwen3-MoE and
OLMoE (softmax), and of DeepSeek-V3 and LLaDA2 (sigmoid, groups, a bias that only chooses,
arXiv:2412.19437 section 2.1.2).

Nothing is dropped and there is no capacity: what a token gets depends on that token alone. Three
ways to compute the same sum:

    sorted   TPU  assignments of tokens to experts, sorted by expert, go through ragged products
    at once  GPU  all experts go over all tokens, as one batched product: XLA has no ragged products
                  there, and a block of tokens has to read almost all experts anyway. Where there
                  are many tokens, as in prompts, it costs E / k times the operations
    in turn  CPU  one expert after the other goes over all tokens; those nobody chose are skipped

Weights that lie among those of other layers (`OfLayer`) are read there: for ragged products the
experts of all layers are groups of which only this layer's have rows. Taken out first they would be
read three times instead of once.

Letters: B batch, T window positions, M = B T tokens, D width, E experts, k of them per token,
F hidden width of one, A = M k assignments, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dlm.blocks.linear import linear
from dlm.blocks.mlp import ACTIVATIONS, mlp
from dlm.config import Experts
from dlm.params import OfLayer, Params
from dlm.sharding import per_shard, split_axes

WEIGHTS = ("gate", "up", "down")  # of all experts of a layer: most of what a model weighs
# Tokens that are taken at a time, for the memory that it costs: 3 E F numbers each, or 4 k D.
AT_ONCE, SORTED = 256, 4096


def moe(x: jax.Array, p: Params, experts: Experts, activation: str = "silu") -> jax.Array:
    """The chosen experts' weighted sum, and what every token goes through besides.

    Args:
      x: [B, T, D]. Normalised input.
      p: {"router", "gate", "up", "down"}, and what `experts` says is there besides. The weights of
        experts may be `OfLayer`; gradients to them then cost as much as all layers together.
      experts: how they are chosen.
      activation: of their MLPs.

    Returns:
      [B, T, D] in x's dtype.
    """
    B, T, D = x.shape
    rows = x.reshape(B * T, D)
    chosen, weights = route(rows, p, experts)
    split = split_axes(batch=B, experts=experts.num_experts, ffn=experts.d_ff)
    by_row, by_expert, width = P(split["batch"]), split["experts"], split["ffn"]
    weights_of = {name: p[name] for name in WEIGHTS}
    layer = None
    if isinstance(p["gate"], OfLayer):
        layer = p["gate"].layer
        weights_of = {name: leaf.stack for name, leaf in weights_of.items()}
    operands = {"rows": rows, "chosen": chosen, "weights": weights, "layer": layer, **weights_of}
    lead = () if layer is None else (None,)
    into, out_of = P(*lead, by_expert, None, width), P(*lead, by_expert, width)
    specs = dict.fromkeys(("rows", "chosen", "weights"), by_row)
    specs |= {"gate": into, "up": into, "down": out_of, "layer": P()}
    run = functools.partial(
        _local_experts, axis=by_expert, summed=by_expert or width, activation=activation
    )
    y = per_shard(run, operands, specs, by_row).astype(x.dtype).reshape(B, T, D)
    if experts.shared_d_ff:
        shared = mlp(x, p["shared"], activation)
        if experts.has_shared_gate:
            shared = jax.nn.sigmoid(linear(x, p["shared_gate"])) * shared
        y = y + shared
    return y


def route(rows: jax.Array, p: Params, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """Which experts each token goes to, and with what weights; all of it in float32.

    Args:
      rows: [M, D].
      p: {"router": [E, D]}, and "bias" [E] float32 if there is one.
      experts: how they are chosen; of equal scores the lower number.

    Returns:
      [M, k] int32 in [0, E), and [M, k] float32.
    """
    logits = jax.lax.dot_general(
        rows.astype(jnp.float32),
        p["router"].astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    scores = jax.nn.sigmoid(logits) if experts.scores == "sigmoid" else jax.nn.softmax(logits)
    ranked = scores
    if experts.bias != "none":
        ranked = scores + p["bias"].astype(jnp.float32)[None]
    if experts.bias == "weigh":
        scores = ranked
    if experts.num_chosen_groups < experts.num_groups:
        in_groups = ranked.reshape(len(rows), experts.num_groups, -1)
        of_group = jax.lax.top_k(in_groups, 2)[0].sum(axis=-1)  # [M, groups]
        _, best = jax.lax.top_k(of_group, experts.num_chosen_groups)
        is_open = jax.nn.one_hot(best, experts.num_groups, dtype=bool).any(axis=1)
        ranked = jnp.where(is_open[..., None], in_groups, -jnp.inf).reshape(ranked.shape)
    _, chosen = jax.lax.top_k(ranked, experts.num_chosen)
    weights = jnp.take_along_axis(scores, chosen, axis=1)
    if experts.is_renormalised and (experts.num_chosen > 1 or experts.scores == "softmax"):
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    return chosen.astype(jnp.int32), weights * experts.scale


def _local_experts(
    rows: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    layer: jax.Array | None,
    *,
    axis: tuple[str, ...] | None,
    summed: tuple[str, ...] | None,
    activation: str,
) -> jax.Array:
    """[M, D], at least float32: the sum over this device's experts, or over its part of each."""
    first = 0 if axis is None else jax.lax.axis_index(axis) * gate.shape[-3]
    y = jax.lax.platform_dependent(
        rows,
        chosen - first,
        weights,
        gate,
        up,
        down,
        layer,
        cpu=functools.partial(in_turn, activation=activation),
        tpu=functools.partial(sorted_by_expert, activation=activation),
        default=functools.partial(at_once, activation=activation),
    )
    return y if summed is None else jax.lax.psum(y, summed)


def in_turn(
    rows: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    layer: jax.Array | None = None,
    *,
    activation: str,
) -> jax.Array:
    """[M, D], at least float32: one expert after the other, but for those that nobody chose.

    Args:
      rows: [M, D].
      chosen: [M, k] int32. Numbers outside of [0, E) are experts that are not here.
      weights: [M, k] float32.
      gate, up: [E, D, F], or [L, E, D, F] with `layer`.
      down: [E, F, D], or [L, E, F, D].
      layer: scalar int32. Whose experts they are; None: there is only one.
      activation: of their MLPs.
    """
    act = ACTIVATIONS[activation]
    matrices = (gate, up, down)

    def add(y: jax.Array, expert: tuple[jax.Array, Any]) -> tuple[jax.Array, None]:
        number, own = expert
        is_mine = chosen == number
        weight = jnp.where(is_mine, weights, 0.0).sum(axis=1, keepdims=True)

        def run(y: jax.Array) -> jax.Array:
            gate, up, down = _entries(matrices, layer, number) if own is None else own
            out = jnp.dot(act(jnp.dot(rows, gate)) * jnp.dot(rows, up), down)
            return y + weight * out.astype(y.dtype)

        return jax.lax.cond(is_mine.any(), run, lambda y: y, y), None

    numbers = jnp.arange(gate.shape[-3], dtype=jnp.int32)
    zeros = jnp.zeros(rows.shape, jnp.promote_types(rows.dtype, jnp.float32))
    return jax.lax.scan(add, zeros, (numbers, matrices if layer is None else None))[0]


def at_once(
    rows: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    layer: jax.Array | None = None,
    *,
    activation: str,
) -> jax.Array:
    """[M, D], at least float32: all experts over all tokens, `AT_ONCE` of them at a time.

    Args: as `in_turn`.
    """
    if layer is not None:
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        gate, up, down = take(gate), take(up), take(down)
    act, wide = ACTIVATIONS[activation], jnp.promote_types(rows.dtype, jnp.float32)
    numbers = jnp.arange(gate.shape[0], dtype=jnp.int32)

    def chunk(rows: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        is_chosen = chosen[None] == numbers[:, None, None]  # [E, m, k]
        of_expert = jnp.where(is_chosen, weights[None], 0.0).sum(axis=2)  # [E, m]
        hidden = act(jnp.einsum("md,edf->emf", rows, gate)) * jnp.einsum("md,edf->emf", rows, up)
        out = jnp.einsum("emf,efd->emd", hidden, down).astype(wide)
        return (out * of_expert[..., None]).sum(axis=0)

    return _in_chunks(chunk, AT_ONCE, rows, chosen, weights)


def _in_chunks(
    function: Callable[..., jax.Array],
    size: int,
    rows: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """A function of tokens, `size` of them at a time."""
    M = len(rows)
    if size >= M:
        return function(rows, chosen, weights)
    padded = tuple(
        jnp.pad(x, ((0, -M % size), (0, 0)), constant_values=pad).reshape(-1, size, x.shape[1])
        for x, pad in ((rows, 0), (chosen, -1), (weights, 0))
    )
    out = jax.lax.map(lambda operands: function(*operands), padded)
    return out.reshape(-1, rows.shape[1])[:M]


def _entries(matrices: Any, layer: Any, number: jax.Array) -> Any:
    """One expert's of one layer's, read where they lie."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice(x, (layer, number, 0, 0), (1, 1, *x.shape[2:])).reshape(
            x.shape[2:]
        ),
        matrices,
    )


def sorted_by_expert(
    rows: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    layer: jax.Array | None = None,
    *,
    activation: str,
) -> jax.Array:
    """[M, D], at least float32: ragged products over assignments that are sorted by expert.

    Args: as `in_turn`. Assignments to experts that are not here come last, and count nothing.
    """
    E = gate.shape[-3]
    before: jax.Array | int = 0
    num_groups = E
    if layer is not None:  # experts of other layers are groups without rows
        before, num_groups = layer * E, len(gate) * E
        gate, up, down = (x.reshape(-1, *x.shape[2:]) for x in (gate, up, down))

    def chunk(rows: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        M, k = chosen.shape
        flat = chosen.reshape(-1)
        flat = jnp.where((flat >= 0) & (flat < E), flat, E)
        order = jnp.argsort(flat, stable=True)
        sizes = jnp.bincount(flat, length=E)  # E itself is dropped
        is_here = jnp.arange(M * k) < sizes.sum()
        if num_groups > E:
            none = jnp.zeros(num_groups, sizes.dtype)
            sizes = jax.lax.dynamic_update_slice_in_dim(none, sizes, before, axis=0)
        inputs = rows[order // k]  # [A, D]
        hidden = ACTIVATIONS[activation](jax.lax.ragged_dot(inputs, gate, sizes))
        hidden = hidden * jax.lax.ragged_dot(inputs, up, sizes)
        out = jax.lax.ragged_dot(hidden, down, sizes)
        out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        out = jnp.where(is_here[:, None], out * weights.reshape(-1)[order][:, None], 0.0)
        # Back in the order of tokens: sums are the same whatever else is in the batch.
        return out[jnp.argsort(order)].reshape(M, k, -1).sum(axis=1)

    return _in_chunks(chunk, SORTED, rows, chosen, weights)
