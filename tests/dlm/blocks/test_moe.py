"""Experts and routers against plain loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm.blocks import moe as moe_lib
from dlm.blocks.mlp import mlp
from dlm.blocks.moe import at_once, in_turn, moe, route, sorted_by_expert
from dlm.config import Experts
from dlm.sharding import make_mesh

D, F = 6, 5
EXPERTS = Experts(num_experts=8, num_chosen=3, d_ff=F)


def weights_of(experts, seed=0, shared=0):
    rng = np.random.default_rng(seed)
    E, F = experts.num_experts, experts.d_ff
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    p = {"router": draw(E, D), "gate": draw(E, D, F), "up": draw(E, D, F), "down": draw(E, F, D)}
    if shared:
        p["shared"] = {"gate": draw(D, shared), "up": draw(D, shared), "down": draw(shared, D)}
    return p


def silu(x):
    return x / (1 + np.exp(-x))


def by_hand(rows, p, chosen, weights):
    """Token by token and expert by expert, in float64."""
    rows, weights = np.asarray(rows, np.float64), np.asarray(weights, np.float64)
    out = np.zeros_like(rows)
    for m, (row, of_token) in enumerate(zip(rows, np.asarray(chosen), strict=True)):
        for e, w in zip(of_token, weights[m], strict=True):
            gate, up, down = (p[name][e].astype(np.float64) for name in ("gate", "up", "down"))
            out[m] += w * ((silu(row @ gate) * (row @ up)) @ down)
    return out


FORMS = {
    name: jax.jit(lambda *args, form=form: form(*args, activation="silu"))
    for name, form in (("in turn", in_turn), ("sorted", sorted_by_expert), ("at once", at_once))
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["mixed", "one token", "all to one", "all experts"])
def test_all_ways_are_the_sum_over_the_chosen(form, case):
    rng = np.random.default_rng(1)
    p = weights_of(EXPERTS)
    M, k = (1 if case == "one token" else 7), (8 if case == "all experts" else 3)
    rows = rng.normal(size=(M, D)).astype(np.float32)
    chosen = np.stack([rng.permutation(8)[:k] for _ in range(M)]).astype(np.int32)
    if case == "all to one":
        chosen = np.full((M, 1), 4, np.int32)
    weights = rng.random(chosen.shape).astype(np.float32)
    got = FORMS[form](rows, chosen, weights, p["gate"], p["up"], p["down"])
    np.testing.assert_allclose(got, by_hand(rows, p, chosen, weights), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_experts_that_are_elsewhere_count_nothing(form):
    """As on a mesh that splits them: numbers outside of what is here."""
    p, rng = weights_of(EXPERTS), np.random.default_rng(2)
    rows = rng.normal(size=(5, D)).astype(np.float32)
    chosen = np.array([[-2, 0, 3], [1, 9, 2], [8, -1, 11], [0, 1, 2], [7, 7, 7]], np.int32)
    weights = rng.random(chosen.shape).astype(np.float32)
    here = {name: p[name][:4] for name in ("gate", "up", "down")}
    got = FORMS[form](rows, chosen, weights, *here.values())
    is_here = (chosen >= 0) & (chosen < 4)
    expected = by_hand(rows, p, np.clip(chosen, 0, 3), weights * is_here)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-5)
    assert not np.asarray(got)[[2, 4]].any()


def test_gradients_of_all_ways_agree():
    p, rng = weights_of(EXPERTS), np.random.default_rng(3)
    rows = rng.normal(size=(4, D)).astype(np.float32)
    chosen = np.stack([rng.permutation(8)[:3] for _ in range(4)]).astype(np.int32)
    weights = rng.random((4, 3)).astype(np.float32)

    def gradient(form):
        loss = lambda rows, weights, *w: (
            form(rows, chosen, weights, *w, activation="silu") ** 2
        ).sum()
        return jax.jit(jax.grad(loss, argnums=range(5)))(
            rows, weights, p["gate"], p["up"], p["down"]
        )

    expected = gradient(in_turn)
    for form in (sorted_by_expert, at_once):
        for one, other in zip(expected, gradient(form), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [in_turn, sorted_by_expert, at_once])
def test_weights_are_read_among_those_of_other_layers(form):
    p, rng = [weights_of(EXPERTS, seed) for seed in range(3)], np.random.default_rng(9)
    stacked = [np.stack([layer[name] for layer in p]) for name in ("gate", "up", "down")]
    rows = rng.normal(size=(5, D)).astype(np.float32)
    chosen = np.stack([rng.permutation(8)[:3] for _ in range(5)]).astype(np.int32)
    weights = rng.random((5, 3)).astype(np.float32)
    run = jax.jit(lambda layer, *x: form(*x, layer, activation="silu"))
    for layer in range(3):
        expected = by_hand(rows, p[layer], chosen, weights)
        got = run(layer, rows, chosen, weights, *stacked)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("form", [sorted_by_expert, at_once])
def test_many_tokens_go_a_chunk_at_a_time(monkeypatch, form):
    monkeypatch.setattr(moe_lib, "AT_ONCE", 4)
    monkeypatch.setattr(moe_lib, "SORTED", 4)
    p, rng = weights_of(EXPERTS), np.random.default_rng(10)
    rows = rng.normal(size=(10, D)).astype(np.float32)
    chosen = np.stack([rng.permutation(8)[:3] for _ in range(10)]).astype(np.int32)
    weights = rng.random((10, 3)).astype(np.float32)
    matrices = (p["gate"], p["up"], p["down"])
    got = jax.jit(lambda *x: form(*x, activation="silu"))(rows, chosen, weights, *matrices)
    np.testing.assert_allclose(got, by_hand(rows, p, chosen, weights), rtol=2e-5, atol=1e-5)


def scores_by_hand(logits, experts, bias):
    """A row of logits: which are chosen, as a set, and the weight of each."""
    if experts.scores == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    ranked = scores + (0 if bias is None else bias)
    weigh = ranked if experts.bias == "weigh" else scores
    size = experts.num_experts // experts.num_groups
    groups = np.split(ranked, experts.num_groups)
    best = np.argsort([-np.sort(group)[-2:].sum() for group in groups], kind="stable")
    is_open = np.isin(np.arange(len(ranked)) // size, best[: experts.num_chosen_groups])
    chosen = np.argsort(np.where(is_open, -ranked, np.inf), kind="stable")[: experts.num_chosen]
    total = weigh[chosen].sum() if experts.is_renormalised else 1.0
    return {int(e): weigh[e] / total * experts.scale for e in chosen}


ROUTERS = {
    "softmax": EXPERTS,
    "as they are": dataclasses.replace(EXPERTS, is_renormalised=False),
    "one": dataclasses.replace(EXPERTS, num_chosen=1),
    "bias weighs": dataclasses.replace(EXPERTS, bias="weigh", is_renormalised=False),
    "groups": dataclasses.replace(
        EXPERTS, scores="sigmoid", bias="choose", num_groups=4, num_chosen_groups=2, scale=2.5
    ),
    "all groups": dataclasses.replace(
        EXPERTS, scores="sigmoid", bias="choose", num_groups=4, num_chosen_groups=4
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_by_hand(name):
    experts, p, rng = ROUTERS[name], weights_of(EXPERTS), np.random.default_rng(4)
    rows = rng.normal(size=(20, D)).astype(np.float32)
    bias = None
    if experts.bias != "none":
        p["bias"] = bias = rng.normal(size=8).astype(np.float32) * 0.2
    chosen, weights = jax.jit(route, static_argnums=2)(rows, p, experts)
    for row, of_token, w in zip(rows, np.asarray(chosen), np.asarray(weights), strict=True):
        expected = scores_by_hand((p["router"] @ row).astype(np.float64), experts, bias)
        assert set(of_token.tolist()) == set(expected)
        np.testing.assert_allclose(w, [expected[e] for e in of_token.tolist()], rtol=1e-4)


def test_one_expert_is_a_dense_mlp_and_a_shared_one_is_added():
    one = Experts(num_experts=1, num_chosen=1, d_ff=F, shared_d_ff=4, has_shared_gate=True)
    p = weights_of(one, shared=4)
    p["shared_gate"] = np.random.default_rng(5).normal(size=(D, 1)).astype(np.float32)
    x = np.random.default_rng(6).normal(size=(2, 3, D)).astype(np.float32)
    got = jax.jit(moe, static_argnums=2)(x, p, one)
    dense = {name: jnp.asarray(p[name][0]) for name in ("gate", "up", "down")}
    gate = 1 / (1 + np.exp(-(x @ p["shared_gate"])))
    expected = mlp(x, dense) + gate * mlp(x, jax.tree.map(jnp.asarray, p["shared"]))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_token_gets_what_it_gets_alone():
    """Sums are made in the order of a token's own experts, whatever else is there."""
    p, rng = weights_of(EXPERTS), np.random.default_rng(7)
    x = rng.normal(size=(1, 6, D)).astype(np.float32)
    run = jax.jit(moe, static_argnums=2)
    whole = run(x, p, EXPERTS)
    for t in range(6):
        alone = run(x[:, t : t + 1], p, EXPERTS)[:, 0]
        np.testing.assert_allclose(alone, whole[:, t], rtol=1e-6, atol=1e-6)
    order = rng.permutation(6)
    np.testing.assert_array_equal(run(x[:, order], p, EXPERTS), whole[:, order])


@pytest.mark.exhaustive(every=4)
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (fake) devices")
@pytest.mark.parametrize("num_experts", [8, 6])
@pytest.mark.parametrize("form", [in_turn, sorted_by_expert])
def test_sharded_experts_are_the_same(monkeypatch, num_experts, form):
    """Eight experts are split over four devices; six are not, and their width of 8 is."""
    experts = dataclasses.replace(EXPERTS, num_experts=num_experts, d_ff=8)
    monkeypatch.setattr(moe_lib, "in_turn", form)
    p = weights_of(experts)
    x = np.random.default_rng(8).normal(size=(4, 3, D)).astype(np.float32)
    run = jax.jit(lambda x, p: moe(x, p, experts))
    expected = run(x, p)
    with jax.set_mesh(make_mesh(data=2, tensor=4)):
        got = jax.jit(lambda x, p: moe(x, p, experts))(x, p)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_chosen=9), r"num_chosen=9 must be in \[1, num_experts=8\]"),
        (dict(scores="tanh"), "scores='tanh' must be one of"),
        (dict(bias="both"), "bias='both' must be one of"),
        (dict(num_groups=3), "num_groups=3 must split num_experts=8 evenly"),
        (dict(num_groups=8, num_chosen_groups=4), "two or more in a group"),
        (dict(num_groups=4, num_chosen_groups=1), "leave num_chosen=3"),
        (dict(d_ff=0), "d_ff=0 must be at least 1"),
    ],
)
def test_experts_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(EXPERTS, **change)
