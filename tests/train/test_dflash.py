"""DFlash's network: what it drafts and learns, against one that is run block by block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import Sampling
from decode.speculative.accept import SpeculativeSampling
from decode.speculative.drafters.dflash import DFlash
from decode.speculative.loop import SpeculativeMethod, init_state, prefill, stream
from decode.speculative.state import context_of
from dlm.blocks.attention import project_qkv
from dlm.blocks.linear import linear
from dlm.blocks.mlp import mlp
from dlm.blocks.norm import rms_norm
from dlm.blocks.rotary import rotary_angles
from dlm.heads.dflash import DFlashHeads
from dlm.heads.published import dflash as published
from dlm.trainable import Learned
from tests.lib.gradients import check_gradients
from tests.lib.heads import features_of, init, shaken, simulated_length
from tests.lib.objectives import CONTEXT, loss_of, make_batch
from tests.lib.speculation import random_prompts
from tests.lib.tiers import more
from train.objectives import Context
from train.objectives.dflash import DFlashLoss, DPaceLoss, read_blocks
from train.reading import read_text

HEADS = DFlashHeads(n_layers=3, block_len=5, d_ff=20)


def network_of(cfg, params, heads=HEADS, *, is_near=False):
    """With `is_near` its block is causal and two of its layers see six positions."""
    fresh = init(heads, cfg)
    network = heads.network(cfg, shaken(heads.start(cfg, params, fresh)))
    if not is_near:
        return network
    pattern = ("dense sliding rotary", "dense global rotary", "dense sliding rotary")
    sliding = dataclasses.replace(network.cfg, sliding_window=6, pattern=pattern)
    return network.replace(cfg=sliding, is_causal=True)


def one_block(network, params, features, root):
    """Final states [b, D] of the block behind positions 0 .. n - 1 with `features` [n, F]."""
    cfg, n, b = network.cfg, len(features), network.block_len
    padded = np.zeros((1, MOST, network.feature_width), np.float32)
    padded[0, :n] = features
    place = np.asarray([*range(n), *[0] * (MOST - n), *range(n, n + b)])[None]
    c, x = _entered(network, params["embed"], padded, np.int32(root))
    for i in range(cfg.n_layers):
        q, k, v = (np.asarray(a[0], np.float64) for a in _projected(network, c, x, place, i))
        q = q[MOST:]
        k, v = (np.concatenate([a[:n], a[MOST:]]) for a in (k, v))
        k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
        s = np.einsum("tnh,snh->tns", q, k) / np.sqrt(q.shape[-1])
        gap = np.arange(n, n + b)[:, None] - np.arange(n + b)
        is_seen = np.ones_like(gap, bool) if network.reach is None else gap < network.reach[i]
        is_seen &= (gap >= 0) | (not network.is_causal)
        s = np.where(is_seen[:, None], s, -np.inf)
        w = np.exp(s - s.max(axis=-1, keepdims=True))
        out = np.einsum("tns,snh->tnh", w / w.sum(axis=-1, keepdims=True), v)
        x = _left(network, x, out.astype(np.float32)[None], i)
    return np.asarray(_final(network, x))


MOST = 24  # positions of contexts; one length, so that little is compiled


@jax.jit
def _entered(network, embed, features, root):
    drafts = jnp.full(network.block_len - 1, network.mask_id)
    return network.context(features), embed[jnp.concatenate([root[None], drafts])][None]


@jax.jit
def _projected(network, c, x, place, i):
    cfg, p = network.cfg, jax.tree.map(lambda x: x[i], network.own["layers"])
    both = jnp.concatenate([c, rms_norm(x, p["attention_norm"], cfg.norm_eps)], axis=1)
    return project_qkv(both, p["attention"], cfg, rotary_angles(place, cfg))


@jax.jit
def _left(network, x, out, i):
    cfg, p = network.cfg, jax.tree.map(lambda x: x[i], network.own["layers"])
    x = x + linear(out, p["attention"]["o"], num_in=2)
    return x + mlp(rms_norm(x, p["mlp_norm"], cfg.norm_eps), p["mlp"])


@jax.jit
def _final(network, x):
    return rms_norm(x, network.own["final_norm"], network.cfg.norm_eps)[0]


def log_softmax(z):
    return z - np.log(np.exp(z - z.max()).sum()) - z.max()


def read(network, cfg, params, batch):
    """Texts and what the network reads of them, in NumPy."""
    read = jax.jit(read_text, static_argnums=(1, 3), static_argnames="feature_layers")
    text = read(params, cfg, batch, False, feature_layers=network.feature_layers)
    return jax.device_get(text)


@pytest.mark.parametrize(("num_drafts", "is_near"), [(2, True), *more((0, False))])
def test_blocks_are_drafted_behind_the_text(toy_cfg, toy_params, num_drafts, is_near):
    """In the middle of texts, prompts of one token among them; drawn drafts say their laws."""
    cfg = dataclasses.replace(toy_cfg, eos_token_id=None)
    network = network_of(cfg, toy_params, is_near=is_near)
    drawn = SpeculativeMethod(
        DFlash(network, num_drafts, is_sampled=True),
        SpeculativeSampling(),
        Sampling(temperature=0.7),
    )
    best = DFlash(network, num_drafts)
    prompts = [[4], *(p for p in random_prompts(cfg, 8) if len(p) > 5)][:3]
    first = prefill(toy_params, cfg, drawn, init_state(cfg, drawn, prompts, gen_len=9, chunk=4))
    for rounds, state in enumerate(stream(toy_params, cfg, drawn, first)):
        if rounds not in (0, 2):
            continue
        context = context_of(toy_params, drawn, state)
        tree, greedy = (
            jax.jit(drafter.propose, static_argnums=0)(cfg, context, state.drafter).tree
            for drafter in (drawn.drafter, best)
        )
        for b in np.flatnonzero(~np.asarray(state.has_stopped)):
            text = np.asarray(state.tokens[b, : int(state.length[b])]).tolist()
            features = features_of(network, cfg, toy_params, text)[:-1]
            hidden = one_block(network, toy_params, features, text[-1])
            said = hidden[1 : best.depth + 1] @ np.asarray(toy_params["unembed"]).T
            np.testing.assert_array_equal(greedy.tokens[b, 1:], said.argmax(axis=-1))
            law = np.exp([log_softmax(z) for z in said / 0.7])
            np.testing.assert_allclose(tree.probs[b, :-1], law, atol=2e-5)
            assert int(tree.tokens[b, 0]) == text[-1]


@pytest.mark.parametrize("is_near", [True, *more(False)])
def test_blocks_of_training_are_those_of_drafts(toy_cfg, toy_params, is_near):
    """Card: a block's rows depend on no other block, and on nothing from its anchor on."""
    batch = make_batch(toy_cfg)
    network = network_of(toy_cfg, toy_params, is_near=is_near)
    text = read(network, toy_cfg, toy_params, batch)
    T = text.tokens.shape[1]
    anchors = np.tile(np.arange(3, T - 1, 2), (len(text.tokens), 1))
    hidden = np.asarray(jax.jit(read_blocks)(network, toy_params, text, anchors))
    checked = 0
    for b in range(len(text.tokens)):
        start = int(text.start[b])
        for i, a in enumerate(np.asarray(anchors[b])):
            if a < start:
                continue
            expected = one_block(
                network, toy_params, text.features[b, start:a], int(text.tokens[b, a])
            )
            np.testing.assert_allclose(hidden[b, i], expected, atol=2e-5)
            checked += 1
    assert checked > 6


@pytest.mark.parametrize(
    ("kind", "teacher"),
    [(DFlashLoss, False), (DPaceLoss, True), *more((DFlashLoss, True), (DPaceLoss, False))],
)
def test_the_loss_by_hand(toy_cfg, toy_params, kind, teacher):
    """With as many anchors as there are positions, each position that may be one is."""
    batch = make_batch(toy_cfg)
    network = network_of(toy_cfg, toy_params)
    text = read(network, toy_cfg, toy_params, batch)
    P, b = batch["prompt"].shape[1], network.block_len
    head = np.asarray(toy_params["unembed"], np.float64)
    total, weights, right = 0.0, 0.0, [{} for _ in range(b - 1)]
    for row in range(len(text.tokens)):
        start, end = int(text.start[row]), P + int(batch["completion_len"][row])
        tokens = np.asarray(text.tokens[row])
        for a in range(max(start, P - 1), end - 1):
            if not bool(text.is_scored[row, a + 1]):
                continue
            states = one_block(network, toy_params, text.features[row, start:a], int(tokens[a]))
            n = min(b - 1, end - 1 - a)
            ce, own = [], []
            for i in range(1, n + 1):
                log_q = log_softmax(np.asarray(states[i], np.float64) @ head.T)
                z = np.asarray(text.hidden[row, a + i - 1], np.float64) @ head.T
                p = np.exp(log_softmax(z)) if teacher else np.eye(len(z))[tokens[a + i]]
                ce.append(-(p * log_q).sum())
                own.append(np.exp(-ce[-1]))
                right[i - 1][row, a] = log_q.argmax() == tokens[a + i]
            w = np.exp(-np.arange(n) / 3.0)
            if kind is DPaceLoss:
                reached = np.cumprod([(q + 1) / 2 for q in own])
                w = np.array([reached[i:].sum() for i in range(n)])
            total += (w * ce).sum()
            weights += w.sum()
    objective = kind(num_anchors=99, reach=3.0, teacher=teacher)
    loss, metrics = loss_of(objective, Learned(toy_params, network), toy_cfg, batch)
    np.testing.assert_allclose(loss, total / weights, rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy_3"], np.mean([*right[1].values()]), atol=1e-6)
    length = simulated_length(right)
    np.testing.assert_allclose(metrics["acceptance_length"], length, atol=1e-5)


def test_anchors_are_drawn_anew(toy_cfg, toy_params):
    batch = make_batch(toy_cfg)
    learned = Learned(toy_params, network_of(toy_cfg, toy_params))
    few = DFlashLoss(num_anchors=1)
    losses = {
        float(loss_of(few, learned, toy_cfg, batch, Context(jax.random.key(seed)))[0])
        for seed in range(4)
    }
    assert len(losses) == 4


@pytest.mark.exhaustive(every=4)
def test_gradients_against_finite_differences(toy_cfg, toy_params):
    batch = make_batch(toy_cfg)
    network = network_of(toy_cfg, toy_params)

    def loss(own):
        params = Learned(toy_params, network.replace(own=own))
        return DFlashLoss(teacher=True).loss(params, toy_cfg, batch, CONTEXT)[0]

    check_gradients(loss, network.own)


# ---- Files and refusals -----------------------------------------------------------------------


def test_published_files_there_and_back(toy_cfg, toy_params, tmp_path):
    heads = dataclasses.replace(HEADS, n_heads=2, n_kv_heads=1, head_dim=8, layers=(1, 2))
    network = network_of(toy_cfg, toy_params, heads)
    published.save(tmp_path, network)
    back = published.load(tmp_path, toy_cfg)
    assert jax.tree.structure(back) == jax.tree.structure(network)
    for ours, theirs in zip(*map(jax.tree.leaves, (back, network)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match=r"hidden_size=16 must be the target's d_model=32"):
        published.load(tmp_path, dataclasses.replace(toy_cfg, d_model=32))


def test_layers_that_are_read(toy_cfg):
    """Published: Qwen3-8B's drafter reads behind layers 1, 9, 17, 25 and 33 of 36."""
    of = lambda n_layers, heads: heads.feature_layers(
        dataclasses.replace(toy_cfg, n_layers=n_layers)
    )
    assert of(36, DFlashHeads()) == (2, 10, 18, 26, 34)
    assert of(4, DFlashHeads()) == (1, 2, 4) and of(2, DFlashHeads(n_layers=1)) == (0, 1, 2)
    with pytest.raises(ValueError, match=r"must be different ones in \[0, n_layers=4\]"):
        of(4, DFlashHeads(layers=(1, 5)))


def test_what_does_not_fit_is_refused(toy_cfg, toy_params):
    network = network_of(toy_cfg, toy_params)
    for drafter, cfg, message in (
        (DFlash(network, 5), toy_cfg, r"num_drafts=5 must be in \[0, 4\]"),
        (DFlash(network), dataclasses.replace(toy_cfg, vocab_size=30), "this one has 30 and 16"),
        (DFlash(network), dataclasses.replace(toy_cfg, n_layers=1), "a target that has 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeculativeMethod(drafter).validate(cfg)
    no_mask = dataclasses.replace(toy_cfg, mask_token_id=None)
    with pytest.raises(ValueError, match=r"mask_id=-1 must be a token .* own MASK is None"):
        HEADS.network(no_mask, network.own)
