"""Draft heads and networks as their papers write them, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm.heads import hydra, medusa
from dlm.heads.dflash import DFlashHeads
from dlm.heads.eagle_1 import Eagle1Heads
from dlm.heads.eagle_3 import Eagle3Heads
from dlm.window import Window
from tests.lib.heads import fresh, init, shaken
from tests.lib.oracle import Model

T, SOME = 4, tuple(range(2, 20))
silu = lambda x: x / (1 + np.exp(-x))


def network_of(heads, cfg, params):
    return heads.network(cfg, shaken(heads.start(cfg, params, init(heads, cfg))))


def features(width):
    return np.random.default_rng(0).normal(size=(T, width)).astype(np.float32)


@pytest.mark.parametrize("kind", [Eagle1Heads(), Eagle3Heads(vocab=SOME)], ids=["1", "3"])
def test_eagle(toy_cfg, toy_params, kind):
    """Pairs (f_t, x_{t+1}) in a row."""
    network = network_of(kind, toy_cfg, toy_params)
    model, own = (Model(p, toy_cfg) for p in (toy_params, network.own))
    f, tokens, w = features(network.feature_width), np.array([3, 1, 4, 1]), own.params
    embedded = model.params["embed"][tokens]
    if isinstance(kind, Eagle1Heads):
        u = f.astype(np.float64)
        x = residual = np.concatenate([embedded, u], axis=1) @ w["fc"] + w["fc_bias"]
    else:
        u = residual = f @ w["fc"]
        normed = own.norm(embedded, w["embed_norm"]), own.norm(u, w["state_norm"])
        x = np.concatenate(normed, axis=1)
    frequency = toy_cfg.rope_theta ** (-np.arange(0, toy_cfg.head_dim, 2) / toy_cfg.head_dim)
    angle = np.arange(T)[:, None, None] * frequency
    q, k, v = (np.einsum("td,nhd->tnh", x, w["attention"][name]) for name in "qkv")
    attended = own.attend(own.rotate(q, angle), own.rotate(k, angle), v, np.tri(T, dtype=bool))
    x = residual + np.einsum("tnh,nhd->td", attended, w["attention"]["o"])
    h, mlp = own.norm(x, w["mlp_norm"]), w["mlp"]
    x = x + (silu(h @ mlp["gate"]) * (h @ mlp["up"])) @ mlp["down"]

    @jax.jit
    def run(network, params, f, tokens):
        window = Window.at(tokens[None], jnp.zeros(1, jnp.int32), is_causal=True)
        states, _ = network.read(params, network.begin(f[None]), window)
        return states[0], network.logits(params, states)[0]

    states, logits = run(network, toy_params, f, tokens)
    np.testing.assert_allclose(states, x, atol=2e-5)
    if isinstance(kind, Eagle1Heads):
        expected = x @ model.params["unembed"].T
    else:
        expected = own.norm(x, w["final_norm"]) @ w["unembed"].T
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_the_context_of_dflash(toy_cfg, toy_params):
    network = network_of(DFlashHeads(n_layers=1, block_len=4), toy_cfg, toy_params)
    g, own = features(network.feature_width), Model(network.own, toy_cfg)
    c = jax.jit(lambda network, g: network.context(g[None])[0])(network, g)
    expected = own.norm(g @ own.params["fc"], own.params["context_norm"])
    np.testing.assert_allclose(c, expected, atol=1e-5)
    assert network.blocks(jnp.array([7])).tolist() == [[7, 23, 23, 23]]


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_heads(toy_cfg, toy_params, kind):
    own = shaken(fresh(kind, toy_cfg, toy_params, num_blocks=2)[1])
    w = Model(own, toy_cfg).params
    head_hidden = {"medusa": medusa, "hydra": hydra}[kind].head_hidden
    for k in range(3):
        seen = features(16 * (1 if kind == "medusa" else k + 2))
        x = seen.astype(np.float64)
        if kind == "hydra":
            first = w["first"][k]
            x = x @ first["r"] + silu(x @ first["w"] + first["b"])
        for block in w["blocks"]:
            x = x + silu(x @ block["w"][k] + block["b"][k])
        assert len(w["blocks"]) == (2 if kind == "medusa" else 1)
        np.testing.assert_allclose(head_hidden(own, seen, k), x, atol=1e-5)
