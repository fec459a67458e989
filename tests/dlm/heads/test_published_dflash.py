"""Published DFlash files: reference networks, and what config.json says of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import Sampling
from decode.speculative.contracts import Context, Seen
from decode.speculative.drafters.dflash import DFlash
from dlm.heads.dflash import DFlashHeads
from dlm.heads.published.dflash import load, save
from tests.lib.heads import init, shaken, target_of
from tests.lib.oracle import Model
from tests.lib.paths import SHARED
from tests.lib.tiers import more
from train.objectives.dflash import read_blocks
from train.reading import Text

GOLDENS = SHARED / "goldens" / "dflash_net"
CASES = sorted(path.name for path in GOLDENS.glob("*")) or ["none"]


def proposed(drafter, cfg, context, features):
    """The tree behind a text, all of whose features but the root's are given."""
    zero = jnp.zeros(1, jnp.int32)
    state = drafter.init(cfg, 1, 40)
    count = context.length - 1
    seen = Seen(context.tokens, features, zero, count, features)
    return drafter.propose(cfg, context, drafter.observe(cfg, context, seen, state)).tree


@jax.jit
def _block(network, params, features, root):
    """Final states and logits of the block behind all features; candidates and their logits."""
    num = len(features)
    place = jnp.arange(num)[None]
    drafter = DFlash(network)
    state = drafter.init(network.cfg, 1, num)
    seen = Seen(place, features[None], jnp.zeros(1, jnp.int32), jnp.array([num]), features[None])
    cache = drafter.observe(network.cfg, None, seen, state)
    hidden = network.read(params, root[None], jnp.array([num]), cache)[0]
    return hidden, network.logits(params, hidden[1:])


@pytest.mark.parametrize("case", [CASES[0], CASES[-1], *more(*CASES[1:-1])])
def test_reference_networks(case):
    root = GOLDENS / case
    if not root.is_dir():
        pytest.skip("the shared folder is not here")
    arrays, about = np.load(root / "arrays.npz"), json.loads((root / "case.json").read_text())
    cfg = target_of(root)
    network = load(root, cfg)
    raw = json.loads((root / "config.json").read_text())
    assert network.feature_layers == tuple(i + 1 for i in raw["dflash_config"]["target_layer_ids"])
    assert network.is_causal == about["causal_in_block"]
    assert network.cfg.sliding_window == about["sliding_window"]
    params = {"embed": arrays["embedding"], "unembed": arrays["output_head"]}
    features, text = arrays["features"], arrays["text"].astype(np.int32)
    T, b = len(features), network.block_len
    assert text[T] == about["root"]
    hidden, logits = _block(network, params, features, text[T])
    np.testing.assert_allclose(hidden, arrays["hidden"], atol=1e-4)
    np.testing.assert_allclose(logits, arrays["logits"], atol=1e-4)
    # -- Blocks side by side, as in training.
    whole = Text(
        tokens=text[None],
        hidden=None,
        is_scored=None,
        start=np.zeros(1, np.int32),
        features=np.pad(features, ((0, len(text) - T), (0, 0)))[None],
    )
    anchors = arrays["anchors"].astype(np.int32)[None]
    blocks = jax.jit(read_blocks)(network, params, whole, anchors)
    np.testing.assert_allclose(blocks[0], arrays["hidden_of_anchors"], atol=1e-4)
    # -- Drafts.
    context = Context(
        params=params,
        tokens=text[None],
        length=jnp.array([T + 1], jnp.int32),
        key=jnp.array([[3, 4]], jnp.uint32),
        sampling=Sampling(jnp.float32(0.7)),
        active=jnp.ones(1, bool),
        cache=None,
    )
    padded = np.pad(features, ((0, len(text) - T), (0, 0)))[None]
    run = jax.jit(proposed, static_argnums=1)
    tree = run(DFlash(network), cfg, context, padded)
    greedy = about.get("greedy_path", about["argmax"])
    assert np.asarray(tree.tokens[0, 1:]).tolist() == greedy and tree.probs is None
    if "candidates" not in about:
        return
    ids = np.asarray(about["candidates"])
    found = np.asarray(network.candidates(params, hidden[1:])[1])
    assert [set(row) for row in found.tolist()] == [set(row) for row in ids.tolist()]
    values = np.take_along_axis(np.asarray(logits), ids, axis=1)
    for previous, expected in (
        ([about["root"], *greedy[:-1]], "scores_on_path"),
        (about["given_predecessors"], "scores_given_predecessors"),
    ):
        scores = values + network.edges(hidden[1:], ids, np.asarray(previous))
        np.testing.assert_allclose(scores, arrays[expected], atol=1e-4)
    drawn = run(DFlash(network, is_sampled=True), cfg, context, padded)
    path = np.asarray(drawn.tokens[0])
    scores = values + network.edges(hidden[1:], ids, path[:-1])
    law = np.exp(scores / 0.7) / np.exp(scores / 0.7).sum(axis=-1, keepdims=True)
    expected = np.zeros((b - 1, cfg.vocab_size))
    np.put_along_axis(expected, ids, np.asarray(law), axis=1)
    np.testing.assert_allclose(drawn.probs[0, :-1], expected, atol=1e-5)
    assert all(token in row for token, row in zip(path[1:].tolist(), ids.tolist(), strict=True))
    on_path = jax.nn.softmax(arrays["scores_on_path"] / 0.7)
    np.testing.assert_allclose(on_path, arrays["q_on_path"], atol=1e-5)


# ---- Files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(toy_cfg, toy_params):
    """Of DFlash 2: rows of 16 channels in 4 groups, 3 taps, 5 candidates, rank 2."""
    heads = DFlashHeads(n_layers=2, block_len=4, layers=(2, 1))
    plain = heads.network(toy_cfg, shaken(heads.start(toy_cfg, toy_params, init(heads, toy_cfg))))
    some, V = np.random.default_rng(0), toy_cfg.vocab_size
    draw = lambda *shape: jnp.asarray(0.3 * some.normal(size=shape), jnp.float32)
    conv = lambda: {"base": draw(2, 2, 3, 16), "projection": draw(2, 16, 2 * 3 * 4)}
    layers = plain.own["layers"] | {"attention_conv": conv(), "mlp_conv": conv()}
    selector = {"predecessor": draw(V, 2), "successor": draw(V, 2), "hidden": draw(16, 2)}
    scaled = dataclasses.replace(plain.cfg, logit_scale=0.5, logit_cap=3.0, embed_scale=2.0)
    own = plain.own | {"layers": layers, "selector": selector}
    return plain.replace(own=own, cfg=scaled, num_candidates=5)


@pytest.fixture
def written(network, tmp_path):
    save(tmp_path, network)
    return tmp_path, json.loads((tmp_path / "config.json").read_text())


def test_there_and_back(toy_cfg, network, written):
    root, config = written
    same(load(root, toy_cfg), network)
    # -- What stands in dflash_config may stand beside it.
    about = dict(config["dflash_config"])
    beside = {key: about.pop(key) for key in ("block_size", "selector_rank", "output_multiplier")}
    rewrite(root, config | beside | {"dflash_config": about})
    same(load(root, toy_cfg), network)


def same(network, other):
    assert jax.tree.structure(network) == jax.tree.structure(other)
    for ours, theirs in zip(*map(jax.tree.leaves, (network, other)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def rewrite(root, config):
    (root / "config.json").write_text(json.dumps(config))


def test_rows_are_mixed_within_blocks(toy_cfg, toy_params, network):
    """Against a loop over rows and taps; attention gives its queries, and the MLP nothing."""
    nothing = jax.tree.map(jnp.zeros_like, network.own["layers"]["mlp"])
    layers = network.own["layers"] | {"mlp": nothing}
    own = network.own | {"layers": layers}
    one = dataclasses.replace(network.cfg, n_layers=1)
    own["layers"] = jax.tree.map(lambda x: x[:1], layers)
    network = network.replace(own=own, cfg=one)
    tokens = np.array([[3, 1, 4, 1, 5, 9, 2, 6]], np.int32)  # two blocks
    attention = lambda i, reach, p, q, k, v: q
    p = jax.tree.map(lambda x: np.asarray(x[0], np.float64), own["layers"])
    out = jax.jit(lambda network: network.run(toy_params, tokens, jnp.arange(8)[None], attention))(
        network
    )
    norm = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + one.norm_eps) * w
    x = 2.0 * np.asarray(toy_params["embed"], np.float64)[tokens[0]]

    def mix(u, h, conv, which):
        total = np.zeros_like(u)
        said = (h @ conv["projection"]).reshape(8, 2, 3, 4)
        for i in range(8):
            for t in range(i % 4 + 1):
                if t < 3:
                    factor = conv["base"][which, t] + np.repeat(said[i, which, t], 4)
                    total[i] += factor * u[i - t]
        return total

    h = norm(x, p["attention_norm"])
    u = mix(h, h, p["attention_conv"], 0)
    q = norm(np.einsum("td,nhd->tnh", u, p["attention"]["q"]), p["attention"]["q_norm"])
    frequency = one.rope_theta ** (-np.arange(0, one.head_dim, 2) / one.head_dim)
    q = Model.rotate(q, np.arange(8)[:, None, None] * frequency)
    x = x + mix(np.einsum("tnh,nhd->td", q, p["attention"]["o"]), h, p["attention_conv"], 1)
    np.testing.assert_allclose(out[0], norm(x, np.asarray(own["final_norm"])), atol=1e-4)


def test_scales_and_drafts_one_after_the_other(toy_cfg, toy_params, network):
    """The chain is the best, or drawn, among the candidates of each slot given the one before."""
    hidden = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)
    head = np.asarray(toy_params["unembed"], np.float64)
    logits = 3.0 * np.tanh(hidden @ head.T * 0.5 / 3.0)
    np.testing.assert_allclose(network.logits(toy_params, hidden), logits, atol=1e-4)
    context = Context(
        params=toy_params,
        tokens=jnp.array([[7, 3]]),
        length=jnp.array([2], jnp.int32),
        key=jnp.array([[3, 4]], jnp.uint32),
        sampling=Sampling(jnp.float32(0.5)),
        active=jnp.ones(1, bool),
        cache=None,
    )
    walk = jax.jit(DFlash._walk, static_argnums=3)
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), network.own["selector"])

    def scores(t, previous):
        best = np.argsort(-logits[t], kind="stable")[:5]
        asked = own["predecessor"][previous] * (hidden[t] @ own["hidden"])
        return best, logits[t, best] + own["successor"][best] @ asked

    drafts, law = walk(DFlash(network), context, hidden[None], False)
    assert law is None
    previous = 3
    for t, token in enumerate(np.asarray(drafts[0]).tolist()):
        best, said = scores(t, previous)
        assert token == best[said.argmax()]
        previous = token
    drafts, law = walk(DFlash(network), context, hidden[None], True)
    previous = 3
    for t, token in enumerate(np.asarray(drafts[0]).tolist()):
        best, said = scores(t, previous)
        expected = np.zeros(toy_cfg.vocab_size)
        expected[best] = np.exp(said / 0.5) / np.exp(said / 0.5).sum()
        np.testing.assert_allclose(law[0, t], expected, atol=1e-5)
        assert expected[token] > 0
        previous = token


def test_windows_and_causality(toy_cfg, written):
    root, config = written
    del config["is_causal"]
    slide = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 6}
    half = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6}
    swa = {"use_swa": True, "swa_window_size": 9, "causal": False}
    for change, about, reach, is_causal in (
        ({}, {}, None, False),
        ({}, {"causal": True}, None, True),
        ({"is_causal": True}, {}, None, True),
        (slide, {}, [6, 6], True),
        (slide | {"is_causal": False}, {}, [6, 6], False),
        (slide | {"use_sliding_window": True}, {"causal": False}, [6, 6], False),
        (half | {"is_causal": False}, {}, [2**30, 6], False),
        ({}, swa, [9, 9], False),
    ):
        base = config if "layer_types" not in change else config | {"use_sliding_window": None}
        rewrite(root, base | change | {"dflash_config": config["dflash_config"] | about})
        network = load(root, toy_cfg)
        assert network.is_causal == is_causal
        assert (network.reach is None) if reach is None else network.reach.tolist() == reach
    # -- What stands beside dflash_config counts where that does not say it.
    about = dict(config["dflash_config"])
    beside = {key: about.pop(key) for key in ("mask_token_id", "target_layer_ids", "block_size")}
    rewrite(root, config | beside | {"dflash_config": about})
    network = load(root, toy_cfg)
    assert (network.mask_id, network.block_len) == (beside["mask_token_id"], beside["block_size"])
    same_file = network.replace(is_causal=False)
    save(root, same_file)
    same(load(root, toy_cfg), same_file)


@pytest.mark.exhaustive(every=4)
def test_what_is_refused(toy_cfg, written):
    root, config = written
    slide = {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": None}
    for change, about, message in (
        ({"dflash_config": {}}, None, "must give target_layer_ids, in dflash_config or beside"),
        ({"dflash_config": [1]}, None, r"dflash_config=\[1\] must be an object"),
        ({"architectures": ["DSparkModel"]}, {}, r"architectures=\['DSparkModel'\] is not supp"),
        ({"speculators_model_type": "dflash"}, {}, "speculators_model_type='dflash' is not"),
        ({"num_target_layers": 5}, {}, "num_target_layers=5 must be the target's n_layers=2"),
        ({"vocab_size": 30}, {}, "vocab_size=30 must be the target's 24"),
        ({"new_key": 1}, {}, "new_key=1: it is not known"),
        ({}, {"new_key": 1}, "dflash_config has new_key=1, which is not known"),
        ({}, {"target_layer_ids": [2, 0]}, r"target_layer_ids=\[2, 0\] must be layers"),
        ({}, {"mask_token_id": 24}, r"mask_token_id=24 must be a token in \[0, vocab_size=24\)"),
        ({}, {"block_size": 1}, "block_size=1 must be an integer of at least 2"),
        ({}, {"conv_group_size": None}, "conv_kernel_size=3 and conv_group_size=None must be"),
        ({}, {"conv_group_size": 5}, "conv_group_size=5 must divide 16"),
        ({}, {"conv_kernel_size": None, "conv_group_size": None}, "nothing here reads layers.0"),
        ({}, {"selector_top_k": 25}, "selector_top_k=25 must be at most 24"),
        ({}, {"causal": True}, "is_causal=False and causal=True differ"),
        ({"is_causal": "no"}, {}, "is_causal='no' must be true or false"),
        (slide | {"sliding_window": 3}, {}, "sliding_window=3 must be at least block_size=4"),
        (slide, {}, "sliding_window=None must be at least 1"),
        ({"is_causal": None}, {"use_swa": True, "swa_window_size": 9}, "must come with causal"),
        (
            {**slide, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9}
            | {"is_causal": None},
            {},
            "layer_types has sliding and full layers",
        ),
    ):
        merged = {} if about is None else {"dflash_config": config["dflash_config"] | about}
        rewrite(root, config | merged | change)
        with pytest.raises(ValueError, match=message):
            load(root, toy_cfg)
