"""Experts: MLPs of which a router chooses some for every token.

Reference: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated
Mixture-of-Experts Layer", arXiv:1701.06538; routers as in the public code of Mixtral, Qwen3-MoE and
OLMoE (softmax), and of DeepSeek-V3 and LLaDA2 (sigmoid, groups, a bias that only chooses,
arXiv:2412.19437 section 2.1.2).

Nothing is dropped and there is no capacity: what a token gets depends on that token alone. Two ways
to compute the same sum:

    sorted   assignments of tokens to experts, sorted by expert, go through ragged products
    in turn  one expert after the other goes over all tokens; those that nobody chose are skipped

The former is what TPUs and GPUs do; on CPU ragged products cost as much as all experts together.

Letters: B batch, T window positions, M = B T tokens, D width, E experts, k of them per token,
F hidden width of one, A = M k assignments.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dlm.blocks.linear import linear
from dlm.blocks.mlp import ACTIVATIONS, mlp
from dlm.config import Experts
from dlm.params import Params
from dlm.sharding import per_shard, split_axes


def moe(x: jax.Array, p: Params, experts: Experts, activation: str = "silu") -> jax.Array:
    """The chosen experts' weighted sum, and what every token goes through besides.

    Args:
      x: [B, T, D]. Normalised input.
      p: {"router", "gate", "up", "down"}, and what `experts` says is there besides.
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
    operands = {
        "rows": rows,
        "chosen": chosen,
        "weights": weights,
        **{name: p[name] for name in ("gate", "up", "down")},
    }
    into, out_of = P(by_expert, None, width), P(by_expert, width)
    specs = dict.fromkeys(("rows", "chosen", "weights"), by_row)
    specs |= {"gate": into, "up": into, "down": out_of}
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
    *,
    axis: tuple[str, ...] | None,
    summed: tuple[str, ...] | None,
    activation: str,
) -> jax.Array:
    """[M, D], at least float32: the sum over this device's experts, or over its part of each."""
    first = 0 if axis is None else jax.lax.axis_index(axis) * gate.shape[0]
    y = jax.lax.platform_dependent(
        rows,
        chosen - first,
        weights,
        gate,
        up,
        down,
        cpu=functools.partial(in_turn, activation=activation),
        default=functools.partial(sorted_by_expert, activation=activation),
    )
    return y if summed is None else jax.lax.psum(y, summed)


def in_turn(
    rows: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: str,
) -> jax.Array:
    """[M, D], at least float32: one expert after the other, but for those that nobody chose.

    Args:
      rows: [M, D].
      chosen: [M, k] int32. Numbers outside of [0, E) are experts that are not here.
      weights: [M, k] float32.
      gate, up: [E, D, F].
      down: [E, F, D].
      activation: of their MLPs.
    """
    act = ACTIVATIONS[activation]

    def add(y: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        number, gate, up, down = expert
        is_mine = chosen == number
        weight = jnp.where(is_mine, weights, 0.0).sum(axis=1, keepdims=True)

        def run(y: jax.Array) -> jax.Array:
            out = jnp.dot(act(jnp.dot(rows, gate)) * jnp.dot(rows, up), down)
            return y + weight * out.astype(y.dtype)

        return jax.lax.cond(is_mine.any(), run, lambda y: y, y), None

    numbers = jnp.arange(gate.shape[0], dtype=jnp.int32)
    zeros = jnp.zeros(rows.shape, jnp.promote_types(rows.dtype, jnp.float32))
    return jax.lax.scan(add, zeros, (numbers, gate, up, down))[0]


def sorted_by_expert(
    rows: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: str,
) -> jax.Array:
    """[M, D], at least float32: ragged products over assignments that are sorted by expert.

    Args: as `in_turn`. Assignments to experts that are not here come last, and count nothing.
    """
    M, k = chosen.shape
    E = gate.shape[0]
    flat = chosen.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < E), flat, E)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=E)  # E itself is dropped
    token = order // k
    inputs = rows[token]  # [A, D]
    hidden = ACTIVATIONS[activation](jax.lax.ragged_dot(inputs, gate, sizes))
    hidden = hidden * jax.lax.ragged_dot(inputs, up, sizes)
    out = jax.lax.ragged_dot(hidden, down, sizes)
    out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
    is_here = jnp.arange(M * k) < sizes.sum()
    out = jnp.where(is_here[:, None], out * weights.reshape(-1)[order][:, None], 0.0)
    # Back in the order of tokens, so that sums are the same whatever else is in the batch.
    back = jnp.argsort(order)
    return out[back].reshape(M, k, -1).sum(axis=1)
