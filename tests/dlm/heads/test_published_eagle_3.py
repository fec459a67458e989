"""Published EAGLE-3 files: reference networks, dialects of config.json, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from decode.core.sampling import Sampling
from decode.speculative.contracts import Context
from decode.speculative.drafters.eagle import EagleBest
from dlm.cache import init_cache
from dlm.heads.eagle_3 import Eagle3Heads
from dlm.heads.published.eagle_3 import load, save
from dlm.window import Slots, Window
from tests.lib.heads import init, shaken, target_of
from tests.lib.paths import SHARED
from tests.lib.tiers import more

GOLDENS = SHARED / "goldens" / "eagle3_net"
CASES = sorted(path.name for path in GOLDENS.glob("*")) or ["none"]


@jax.jit
def _chain(network, features, tokens):
    """States and logits of all pairs, and the logits behind the best token after the last."""
    num = len(features)
    cache = init_cache(network.cfg, 1, num)
    zero = jnp.zeros(1, jnp.int32)
    states, cache = network.read(
        {},
        network.begin(features[None]),
        Window.at(tokens[None, 1:], zero, is_causal=True),
        Slots.append(cache, zero),
    )
    target = {"embed": network.own["embed"]}
    logits = network.logits(target, states)
    token = jnp.argmax(logits[:, -1:], axis=-1)
    token = token if network.ids is None else network.ids[token]
    after, _ = network.read(
        {},
        network.feed(states[:, -1:]),
        Window.at(token, zero + num, is_causal=True),
        Slots.below(cache, zero + num),
    )
    return states[0], logits[0], token[0, 0], network.logits(target, after)[0, 0]


@pytest.mark.parametrize("case", [CASES[-1], *more(*CASES[:-1])])
def test_reference_networks(case):
    root = GOLDENS / case
    if not root.is_dir():
        pytest.skip("the shared folder is not here")
    arrays = np.load(root / "arrays.npz")
    cfg = target_of(root)
    network = load(root, cfg)
    assert network.feature_layers == (2, 6, 9)
    features, tokens = arrays["features"], arrays["tokens"].astype(np.int32)
    states, logits, token, after = _chain(network, features, tokens)
    np.testing.assert_allclose(states, arrays["states"], atol=1e-4)
    np.testing.assert_allclose(logits, arrays["logits"], atol=1e-4)
    assert int(token) == arrays["chain_token"]
    np.testing.assert_allclose(after, arrays["chain_logits"], atol=1e-4)
    # -- The tree that is drafted behind the last pair.
    expected = json.loads((root / "tree.json").read_text())
    drafter = EagleBest(
        network, expected["top_k"], expected["levels"], expected["nodes_without_root"]
    )
    n = len(tokens)
    state = drafter.init(cfg, 1, 64)
    context = Context(
        params={"embed": network.own["embed"]},
        tokens=jnp.pad(tokens[None], ((0, 0), (0, 64 - n))),
        length=jnp.array([n], jnp.int32),
        key=jnp.zeros((1, 2), jnp.uint32),
        sampling=Sampling(None),
        active=jnp.ones(1, bool),
        cache=state.cache,
    )
    tree = jax.jit(_drafted, static_argnums=1)(drafter, cfg, context, features, state)
    ways = lambda tokens, parents: {tuple(_way(tokens, parents, v)) for v in range(1, len(tokens))}
    assert ways(np.asarray(tree.tokens[0]), np.asarray(tree.parents[0])) == ways(
        np.asarray(expected["tokens"]), np.asarray(expected["parents"])
    )


def _way(tokens, parents, v):
    way = []
    while v > 0:
        way.insert(0, int(tokens[v]))
        v = int(parents[v])
    return way


def _drafted(drafter, cfg, context, features, state):
    """The tree behind a text all of whose features are given."""
    network, num = drafter.network, len(features)
    zero = jnp.zeros(1, jnp.int32)
    _, cache = network.read(
        context.params,
        network.begin(features[None]),
        Window.at(context.tokens[:, 1 : num + 1], zero, is_causal=True),
        Slots.append(state.cache, zero),
    )
    last = state.features.at[:, 0].set(features[-1])
    state = state.replace(cache=cache, features=last, count=zero + 1)
    return drafter.propose(cfg, context, state).tree


# ---- Dialects ---------------------------------------------------------------------------------

SOME = (0, 3, 4, 9, 20)
IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def network(toy_cfg, toy_params):
    """With two layers, all switches that go together, and a part of the vocabulary."""
    cfg = dataclasses.replace(toy_cfg, n_layers=12)
    heads = Eagle3Heads(
        n_layers=2, vocab=SOME, fc_norm=True, norm_before_residual=True, norm_output=True
    )
    return heads.network(cfg, shaken(heads.start(cfg, toy_params, init(heads, cfg))))


@pytest.fixture
def written(network, tmp_path):
    """A directory, its config.json, and its tensors."""
    save(tmp_path, network)
    config = json.loads((tmp_path / "config.json").read_text())
    return tmp_path, config, safetensors.numpy.load_file(tmp_path / "model.safetensors")


def rewrite(root, config, tensors=None):
    (root / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        safetensors.numpy.save_file(tensors, root / "model.safetensors")


def target(toy_cfg, **changes):
    return dataclasses.replace(toy_cfg, n_layers=12, **changes)


def same(network, other):
    assert jax.tree.structure(network) == jax.tree.structure(other)
    for ours, theirs in zip(*map(jax.tree.leaves, (network, other)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_dialects_say_the_same(toy_cfg, network, written):
    """Switches in eagle_config, sizes in transformer_layer_config, other names of tensors."""
    root, config, tensors = written
    cfg = target(toy_cfg, rope_theta=123.0)  # of the target: the file's counts
    same(load(root, cfg), network)
    switches = {
        key: config[key]
        for key in ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output", IDS)
    }
    of_network = (*switches, "draft_vocab_size", "target_hidden_size", "architectures")
    sizes = {key: value for key, value in config.items() if key not in of_network}
    beside = {key: config[key] for key in ("draft_vocab_size", "target_hidden_size")}
    nested = {
        **sizes,
        **beside,
        "architectures": ["LlamaForCausalLMEagle3"],
        "eagle_config": {**switches, IDS: [1, 5, 8], "use_aux_hidden_state": True},
        "rope_scaling": None,
    }
    midlayer = {f"model.{name}".replace("layers.0.", "midlayer."): x for name, x in tensors.items()}
    rewrite(root, nested, midlayer)
    same(load(root, cfg), network)
    theta = sizes.pop("rope_theta")
    speculators = {
        "speculators_model_type": "eagle3",
        "speculators_config": {"algorithm": "eagle3"},
        "has_no_defaults_at_init": False,
        "auto_map": {"": "config.Eagle3SpeculatorConfig"},
        "architectures": ["Eagle3Speculator"],
        **beside,
        **switches,
        "transformer_layer_config": {
            **sizes,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": theta}
                for kind in ("sliding_attention", "full_attention")
            },
        },
    }
    rewrite(
        root, speculators, {k.replace("midlayer.", "midlayer.0."): x for k, x in midlayer.items()}
    )
    same(load(root, cfg), network)
    # -- Without the switch that readers of such files take for different things.
    del speculators["norm_before_residual"]
    rewrite(root, speculators)
    with pytest.raises(ValueError, match=r"must give norm_before_residual"):
        load(root, cfg)
    same(load(root, cfg, norm_before_residual=True), network)
    other = load(root, cfg, norm_before_residual=False, norm_output=False, layers=(3, 1, 2))
    assert not other.norm_before_residual and not other.norm_output
    assert other.feature_layers == (3, 1, 2)


def test_layers_that_a_file_names(toy_cfg, written):
    root, config, _ = written
    for ids, expected in (
        ([2, 6, 9], (2, 6, 9)),
        ([1, 5, 8], (2, 6, 9)),
        ([12, 0, 3], (12, 0, 3)),
        (None, (2, 6, 9)),
    ):
        rewrite(root, config | {IDS: ids})
        assert load(root, target(toy_cfg)).feature_layers == expected
    rewrite(root, config | {IDS: [2, 6, 13]})
    with pytest.raises(ValueError, match=r"config.json: .*ids=\[2, 6, 13\] must be layers"):
        load(root, target(toy_cfg))


def test_an_embedding_and_a_head_of_its_own(toy_cfg, toy_params, written, network):
    root, config, tensors = written
    embed = np.full((toy_cfg.vocab_size, toy_cfg.d_model), 0.5, np.float32)
    rewrite(root, config, tensors | {"embed_tokens.weight": embed})
    back = load(root, target(toy_cfg))
    np.testing.assert_array_equal(back.embed(toy_params, jnp.array([[3]])), embed[None, 3:4])
    # -- All tokens: the head may be the network's embedding, or the target's.
    rest = {k: x for k, x in tensors.items() if k not in ("d2t", "t2d", "lm_head.weight")}
    every = config | {"draft_vocab_size": None}
    rewrite(root, every | {"tie_word_embeddings": True}, rest | {"embed_tokens.weight": embed})
    np.testing.assert_array_equal(load(root, target(toy_cfg)).head(toy_params), embed)
    rewrite(root, every, rest)
    back = load(root, target(toy_cfg))
    assert back.head(toy_params) is toy_params["unembed"] and back.ids is None


def test_a_head_that_is_stored_is_the_head(toy_cfg, network, written, caplog):
    """What is said of tying is the target's: SpecForge's file for Qwen3-4B says it."""
    root, config, _ = written
    rewrite(root, config | {"tie_word_embeddings": True})
    same(load(root, target(toy_cfg)), network)
    assert "tie_word_embeddings=True is not what the tensors say" in caplog.text


def test_names_of_the_network(toy_cfg, network, written):
    """Those of EAGLE's own files and of SpecForge's, whose model_type may be the target's."""
    root, config, _ = written
    for kinds in (["LlamaForCausalLM"], ["LlamaForCausalLMEagle3"], ["Eagle3LlamaForCausalLM"]):
        for model_type in ("llama", "phi3", "kimi_k2"):
            rewrite(root, config | {"architectures": kinds, "model_type": model_type})
            same(load(root, target(toy_cfg)), network)


def test_biases_windows_and_norms_of_heads(toy_cfg, toy_params, written, network):
    """Read, and written again as they were."""
    root, config, tensors = written
    cfg, some = target(toy_cfg), np.random.default_rng(0)
    N, K, H, D = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.d_model
    draw = lambda n: some.normal(size=n).astype(np.float32)
    sizes = {"q": N * H, "k": K * H, "v": K * H, "o": D}
    biases = {
        f"layers.{i}.self_attn.{x}_proj.bias": draw(n) for i in range(2) for x, n in sizes.items()
    }
    window = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
    biased = config | window | {"attention_bias": True, "use_sliding_window": None}
    biased["model_type"] = "llama"
    rewrite(root, biased, tensors | biases)
    back = load(root, cfg)
    assert back.reach == (5, None) and back.cfg.o_bias
    bias = biases["layers.0.self_attn.q_proj.bias"]
    np.testing.assert_array_equal(back.own["attention"]["q_bias"].reshape(-1), bias)
    save(root, back)
    same(load(root, cfg), back)
    heads = {f"layers.{i}.self_attn.{x}_norm.weight": draw(H) for i in range(2) for x in "qk"}
    rewrite(root, config | {"model_type": "qwen3"}, tensors | heads)
    back = load(root, cfg)
    assert back.cfg.qk_norm and not back.cfg.qkv_bias
    save(root, back)
    same(load(root, cfg), back)


def test_what_is_refused(toy_cfg, written):
    root, config, tensors = written
    for change, message in (
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state=False is not"),
        ({"eagle_config": {"dropout_trick": 1}}, "eagle_config has dropout_trick=1, which is not"),
        ({"some_scale": 2}, r"config.json: some_scale=2: it is not known"),
        ({"fc_norm": "yes"}, "fc_norm='yes' must be true or false"),
        ({"norm_before_fc": True}, "fc_norm=True and norm_before_fc=True exclude"),
        ({"norm_before_fc": True, "fc_norm": False}, "input_norm.weight is missing"),
        ({"fc_norm": False}, "nothing here reads fc_norm.0.weight"),
        ({"num_hidden_layers": 1}, "nothing here reads layers.1"),
        ({"num_hidden_layers": 3}, "layers.2.input_layernorm.weight is missing"),
        ({"target_hidden_size": 32}, "target_hidden_size=32 .* must be the target's d_model=16"),
        ({"hidden_size": 32, "target_hidden_size": 16}, "must hold embed_tokens.weight"),
        ({"vocab_size": 30}, "vocab_size=30 must be the target's 24"),
        ({"draft_vocab_size": 6}, "d2t has 5 entries, and draft_vocab_size=6|numbers of"),
        ({"architectures": ["EagleLlama"]}, r"architectures=\['EagleLlama'\] is not supported"),
        ({"model_type": "gpt2", "architectures": ["Eagle3Speculator"]}, "model_type='gpt2' is not"),
        ({"model_type": "qwen3"}, "model_type does not go with the tensors"),
        ({"sliding_window": 8, "use_sliding_window": None}, "sliding_window=8 goes with"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "how long a text becomes"),
        ({IDS: [2, "6"]}, "must be a list of integers"),
        ({"speculators_model_type": "eagle"}, "speculators_model_type='eagle' is not supported"),
        ({"speculators_model_type": "eagle3"}, "transformer_layer_config=None must be an object"),
    ):
        rewrite(root, config | change)
        with pytest.raises(ValueError, match=message):
            load(root, target(toy_cfg))
    shifted = tensors["d2t"] - 1
    without = {name: x for name, x in tensors.items() if name != "d2t"}
    for changed, message in (
        (tensors | {"mask_hidden": np.zeros(3, np.float32)}, "nothing here reads mask_hidden"),
        (without, "must hold d2t"),
        (tensors | {"d2t": shifted}, r"must ascend, in \[0, vocab_size=24\)"),
        (tensors | {"t2d": ~tensors["t2d"]}, "t2d must be true of the tokens"),
    ):
        rewrite(root, config, changed)
        with pytest.raises(ValueError, match=message):
            load(root, target(toy_cfg))
    (root / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load(root, target(toy_cfg))


def test_a_list_that_begins_with_one_is_not_written(toy_cfg, network, tmp_path):
    with pytest.raises(ValueError, match=r"layers=\(1, 5, 8\) cannot be said"):
        save(tmp_path, network.replace(feature_layers=(1, 5, 8)))


def test_switches(toy_cfg, toy_params):
    """Each does what it says, and those that exclude each other are not given together."""
    f = np.random.default_rng(0).normal(size=(1, 2, 48)).astype(np.float32)
    f /= np.sqrt(np.mean(f.reshape(1, 2, 3, 16) ** 2, axis=-1)).repeat(16, axis=-1)  # RMS 1
    make = lambda **switches: Eagle3Heads(**switches).network(
        toy_cfg, init(Eagle3Heads(**switches), toy_cfg)
    )
    plain = make()
    began = plain.begin(f)
    for switch in ("fc_norm", "norm_before_fc"):
        np.testing.assert_allclose(make(**{switch: True}).begin(f), began, atol=1e-4)
        np.testing.assert_allclose(make(**{switch: True}).begin(7 * f), began, atol=1e-4)
    uneven = f * np.repeat([1.0, 2.0, 3.0], 16).astype(np.float32)
    np.testing.assert_allclose(make(fc_norm=True).begin(uneven), began, atol=1e-4)
    assert np.abs(make(norm_before_fc=True).begin(uneven) - began).max() > 0.01
    before, after = plain.enter(began, began), make(norm_before_residual=True).enter(began, began)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], began)
    np.testing.assert_array_equal(after[1], after[0][..., 16:])
    fed = make(norm_output=True).feed(5 * began)
    np.testing.assert_allclose(np.mean(np.square(fed), axis=-1), 1, atol=1e-3)
    np.testing.assert_array_equal(plain.feed(began), began)
    with pytest.raises(ValueError, match="exclude each other"):
        Eagle3Heads(fc_norm=True, norm_before_fc=True)
    with pytest.raises(ValueError, match="n_layers=0 must be at least 1"):
        Eagle3Heads(n_layers=0)
