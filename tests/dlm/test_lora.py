"""LoRA: one model attached and merged, PEFT's files, and training of nothing else."""

import dataclasses
import functools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import dlm
from dlm import lora as lora_lib
from dlm.blocks.linear import linear, to_heads
from dlm.config import Experts
from dlm.hf.saving import save_hf
from dlm.lora import TARGETS, Lora
from dlm.models.decoder import forward
from dlm.params import LowRank, init_from_specs, param_shardings
from dlm.sharding import make_mesh
from dlm.tokenizer import word_tokenizer
from dlm.trainable import Learned
from dlm.window import Window
from tests.lib import toys
from tests.lib.kinds import model
from tests.lib.models import TOY_CFG, dream_toy
from tests.lib.objectives import make_batch
from tests.lib.oracle import Model
from tests.lib.runs import assert_same, toy_config, without_times
from tests.lib.weights import init_params
from train import data, loop
from train import step as step_lib
from train.config import ConfigError, OptimConfig
from train.model import model_config
from train.objectives.masked_diffusion import MaskedDiffusion

# D 16, N H 24, K H 12, F 20: no two sizes agree.
WIDE = dataclasses.replace(TOY_CFG, head_dim=6, d_ff=20, qkv_bias=True, shifted_logits=True)
LORA = Lora(rank=3, alpha=6.0)
# What makes a published model of one of another kind.
FAMILIES = {
    "gemma": dict(
        embed_scale=8.0, tie_embeddings=True, shifted_logits=True, mask_token_id=None,
        logit_cap=None, norm_eps=1e-6,
    ),
    "experts behind a dense layer": dict(  # whose q, k and v are one matrix
        pattern=("dense global rotary", *["experts global rotary"] * 3), sliding_window=None,
        qk_norm=True, block_len=32, never_causal=True, rotary_dim=None,
        experts=Experts(num_experts=4, num_chosen=2, d_ff=24, scores="sigmoid", bias="choose"),
    ),
}  # fmt: skip
PREFIX, SAVED = "base_model.model.", "adapter_model.safetensors"
SIZES = {  # of WIDE: what goes in, what comes out
    "q": (16, 24), "k": (16, 12), "v": (16, 12), "o": (24, 16),
    "gate": (16, 20), "up": (16, 20), "down": (20, 16),
}  # fmt: skip


def random_delta(lora, cfg):
    """A change with both factors random."""
    rng = np.random.default_rng(0)
    draw = lambda spec: jnp.asarray(0.2 * rng.normal(size=spec.shape), jnp.float32)
    return jax.tree.map(draw, lora.specs(cfg))


def merge_by_hand(params, delta, scale):
    """In float64, weight by weight, from the layouts of `param_specs`."""
    params = jax.tree.map(lambda x: np.array(x, np.float64), params)
    for target, change in delta.items():
        group = params["layers"]["attention" if target in "qkvo" else "mlp"]
        for weight, down, up in zip(group[target], change["down"], change["up"], strict=True):
            product = scale * np.asarray(down, np.float64) @ np.asarray(up, np.float64)  # [I, O]
            if target in ("q", "k", "v"):  # [heads, H, D]
                weight += np.moveaxis(product.reshape(len(product), *weight.shape[:2]), 0, 2)
            else:  # [N, H, D] of o, [D, F] or [F, D]
                weight += product.reshape(weight.shape)
    return params


@pytest.fixture(scope="module")
def wide():
    """Parameters of WIDE whose biases and norms are not trivial."""
    rng = np.random.default_rng(1)
    noisy = lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), jnp.float32)
    return jax.tree.map(noisy, jax.device_get(init_params(jax.random.key(0), WIDE)))


# ---- The change -------------------------------------------------------------------------------


def test_shapes_and_first_values():
    specs = LORA.specs(WIDE)
    assert tuple(specs) == TARGETS
    for target, (num_in, num_out) in SIZES.items():
        assert specs[target]["down"].shape == (2, num_in, 3)
        assert specs[target]["up"].shape == (2, 3, num_out)
    assert set(Lora(rank=1, alpha=1.0, targets=("v", "q")).specs(WIDE)) == {"v", "q"}
    wider = Lora(rank=50, alpha=1.0).specs(WIDE)
    delta = jax.jit(lambda key: init_from_specs(key, wider, jnp.float32))(jax.random.key(0))
    for target, (num_in, _) in SIZES.items():
        assert (delta[target]["up"] == 0).all()
        np.testing.assert_allclose(np.std(delta[target]["down"]), num_in**-0.5, rtol=0.1)


@pytest.mark.exhaustive(every=4)
def test_attached_and_merged_are_the_same_model(wide):
    """Also the one that a plain loop makes; and without a change it is the model, bit for bit."""
    delta = random_delta(LORA, WIDE)
    tokens = np.random.default_rng(0).integers(0, 20, (2, 7)).astype(np.int32)

    @jax.jit
    def run(params):
        positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
        return forward(params, WIDE, Window(jnp.asarray(tokens), positions)).hidden

    by_hand = merge_by_hand(wide, delta, 2.0)
    merged = jax.jit(LORA.merge)(wide, delta)
    for ours, theirs in zip(*map(jax.tree.leaves, (merged, by_hand)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    attached, base = run(LORA.attach(WIDE, Learned(wide), delta).target), run(wide)
    expected = [Model(by_hand, WIDE).run(row, range(7))[0] for row in tokens]
    np.testing.assert_allclose(attached, expected, atol=2e-5)
    np.testing.assert_allclose(run(merged), expected, atol=2e-5)
    assert np.abs(attached - base).max() > 0.5
    for target in TARGETS:
        delta[target]["up"] *= 0
    np.testing.assert_array_equal(run(LORA.attach(WIDE, Learned(wide), delta).target), base)
    assert_same(jax.jit(LORA.merge)(wide, delta), wide)


def test_a_change_may_begin_behind_some_positions():
    """By hand; those before are, to the bit, what they are without it."""
    rng = np.random.default_rng(0)
    of = lambda *shape: rng.normal(size=shape).astype(np.float32)
    x, down, up = of(2, 5, 3, 4), of(12, 2), of(2, 6)
    change = 0.5 * x.reshape(2, 5, 12) @ down @ up
    for given, weight, op in (
        (x, of(3, 4, 6), functools.partial(linear, num_in=2)),
        (x.reshape(2, 5, 12), of(2, 3, 12), to_heads),
    ):
        times = jax.jit(op)
        plain = np.asarray(times(given, weight)).reshape(2, 5, 6)
        for first in (0, 2):
            found = np.asarray(times(given, LowRank(weight, down, up, 0.5, first)))
            found = found.reshape(2, 5, 6)
            np.testing.assert_array_equal(found[:, :first], plain[:, :first])
            expected = plain[:, first:] + change[:, first:]
            np.testing.assert_allclose(found[:, first:], expected, atol=1e-5)


def test_only_targets_change_and_only_by_their_own():
    """Every target alone, in shapes only for what is attached, in numbers for what is merged."""
    zeros = jax.tree.map(jnp.zeros_like, init_params(jax.random.key(0), WIDE))
    for target in TARGETS:
        lora = Lora(rank=3, alpha=6.0, targets=(target,))
        group = "attention" if target in ("q", "k", "v", "o") else "mlp"
        delta = random_delta(lora, WIDE)
        attached = lora.attach(WIDE, Learned(zeros), delta).target
        merged = jax.device_get(lora.merge(zeros, delta))
        assert jax.tree.structure(merged) == jax.tree.structure(zeros)
        for name, leaves in zeros["layers"].items():
            for leaf in leaves if isinstance(leaves, dict) else ():
                is_target = (name, leaf) == (group, target)
                assert isinstance(attached["layers"][name][leaf], LowRank) == is_target
                assert (merged["layers"][name][leaf] != 0).any() == is_target
        low_rank = attached["layers"][group][target]
        assert low_rank.scale == 2.0 and low_rank.weight is zeros["layers"][group][target]


@pytest.mark.parametrize("name", ["gemma", "experts behind a dense layer"])
def test_models_of_other_layers(tmp_path, name):
    """Attached, merged, and saved and loaded, also where layers lie in two stacks."""
    cfg, params = model(name, attention_cap=None, **FAMILIES[name])
    lora = Lora(rank=3, alpha=6.0, targets=("q", "v", "o"))
    delta = random_delta(lora, cfg)
    window = Window(*(jnp.broadcast_to(jnp.arange(7), (2, 7)),) * 2)
    run = jax.jit(lambda params: forward(params, cfg, window).hidden)
    attached = run(lora.attach(cfg, Learned(params), delta).target)
    np.testing.assert_allclose(run(jax.jit(lora.merge)(params, delta)), attached, atol=3e-5)
    assert np.abs(attached - run(params)).max() > 0.1
    lora_lib.save(tmp_path, lora, delta, cfg)
    again, loaded = lora_lib.load(tmp_path, cfg)
    assert again.rank == (3 if name == "gemma" else 6) and again.scale == lora.scale
    np.testing.assert_allclose(run(jax.jit(again.merge)(params, loaded)), attached, atol=3e-5)
    save_hf(tmp_path / "base", params, cfg)
    save_hf(tmp_path / "merged", jax.jit(lora.merge)(params, delta), cfg)
    base, merged, tensors = (
        safetensors.numpy.load_file(tmp_path / file)
        for file in ("base/model.safetensors", "merged/model.safetensors", SAVED)
    )
    changed = {name for name in base if (base[name] != merged[name]).any()}
    assert len(tensors) == 2 * len(changed)
    for weight in changed:
        a, b = (tensors[PREFIX + weight.replace("weight", f"lora_{x}.weight")] for x in "AB")
        np.testing.assert_allclose(merged[weight], base[weight] + 2 * b @ a, atol=1e-5)


def test_mlps_that_are_not_there_are_refused():
    cfg, _ = model("experts behind a dense layer")
    with pytest.raises(ValueError, match="targets has 'gate', but MLPs of the model are experts"):
        LORA.specs(cfg)
    cfg, _ = model("gpt2")
    with pytest.raises(ValueError, match=r"'gate', .* without a gate: name some of q, k, v, o, up"):
        LORA.specs(cfg)


def test_dtypes(wide):
    """Products in the model's dtype; what is merged is added in float32 and rounded once."""
    delta = random_delta(LORA, WIDE)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    q = LORA.attach(WIDE, Learned(half), delta).target["layers"]["attention"]["q"]
    assert q.weight.dtype == q.down.dtype == q.up.dtype == jnp.bfloat16
    merged = jax.jit(LORA.merge)(half, delta)
    by_hand = merge_by_hand(half, delta, 2.0)
    for ours, theirs in zip(*map(jax.tree.leaves, (merged, by_hand)), strict=True):
        assert ours.dtype == jnp.bfloat16
        # Float32 sums may fall on the other side of a rounding boundary, rarely.
        assert (np.asarray(ours) == theirs.astype(ml_dtypes.bfloat16)).mean() > 0.99


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank=0 must be a whole number of at least 1"),
        ({"rank": 2.0}, "rank=2.0 must be a whole number"),
        ({"rank": "2"}, "rank='2' must be a whole number"),
        ({"alpha": 0.0}, "alpha=0.0 must be positive"),
        ({"alpha": float("nan")}, "alpha=nan must be positive"),
        ({"targets": ("q", "w")}, "targets has 'w'; it may have q, k, v, o, gate, up, down"),
        ({"targets": ()}, "targets has nothing"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Lora(**{"rank": 2, "alpha": 1.0, **fields})


# ---- Files ------------------------------------------------------------------------------------

MODULES = {  # of layer 1, as PEFT names them, in the published models
    "llada": {
        "q": "model.transformer.blocks.1.q_proj",
        "k": "model.transformer.blocks.1.k_proj",
        "v": "model.transformer.blocks.1.v_proj",
        "o": "model.transformer.blocks.1.attn_out",
        "gate": "model.transformer.blocks.1.ff_proj",
        "up": "model.transformer.blocks.1.up_proj",
        "down": "model.transformer.blocks.1.ff_out",
    },
    "dream": {
        "q": "model.layers.1.self_attn.q_proj",
        "k": "model.layers.1.self_attn.k_proj",
        "v": "model.layers.1.self_attn.v_proj",
        "o": "model.layers.1.self_attn.o_proj",
        "gate": "model.layers.1.mlp.gate_proj",
        "up": "model.layers.1.mlp.up_proj",
        "down": "model.layers.1.mlp.down_proj",
    },
}


@pytest.mark.parametrize("name", MODULES)
def test_files_are_those_of_peft(tmp_path, toy_params, name):
    """Their names, and W + alpha / r B A of each module is the merged model's published tensor."""
    cfg, params = dream_toy() if name == "dream" else (TOY_CFG, toy_params)
    delta = random_delta(LORA, cfg)
    lora_lib.save(tmp_path / "adapter", LORA, delta, cfg)
    save_hf(tmp_path / "base", params, cfg)
    save_hf(tmp_path / "merged", jax.jit(LORA.merge)(params, delta), cfg)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["bias"] == "none"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6.0, 0.0)
    names = [module.rsplit(".", 1)[1] for module in MODULES[name].values()]
    assert config["target_modules"] == names
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    base, merged = (
        safetensors.numpy.load_file(tmp_path / folder / "model.safetensors")
        for folder in ("base", "merged")
    )
    changed = set()
    for module in MODULES[name].values():
        for layer in (0, 1):
            named = module.replace(".1.", f".{layer}.")
            a = tensors[f"base_model.model.{named}.lora_A.weight"]
            b = tensors[f"base_model.model.{named}.lora_B.weight"]
            weight = base[f"{named}.weight"]
            assert a.shape == (3, weight.shape[1]) and b.shape == (weight.shape[0], 3)
            assert a.dtype == b.dtype == np.float32
            np.testing.assert_allclose(
                merged[f"{named}.weight"], weight + 2.0 * b @ a, rtol=1e-5, atol=1e-6
            )
            changed.add(f"{named}.weight")
    for rest in set(base) - changed:
        np.testing.assert_array_equal(base[rest], merged[rest])


@pytest.mark.parametrize("name", MODULES)
def test_what_is_saved_is_loaded(tmp_path, name):
    cfg = dream_toy()[0] if name == "dream" else TOY_CFG
    lora = Lora(rank=2, alpha=3.0, targets=("q", "o", "down"))
    delta = random_delta(lora, cfg)
    lora_lib.save(tmp_path, LORA, random_delta(LORA, cfg), cfg)
    lora_lib.save(tmp_path, lora, delta, cfg)  # in its place
    again, loaded = lora_lib.load(tmp_path, cfg)
    assert again == lora
    assert jax.tree.structure(loaded) == jax.tree.structure(delta)
    assert_same(loaded, delta)
    # Half precision, as others may save it, is widened.
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(
        {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}, file
    )
    _, loaded = lora_lib.load(tmp_path, cfg)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), delta)
    assert_same(loaded, half)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}


@pytest.fixture
def saved(tmp_path):
    """Writes an adapter of the toy, with changes to its config and its tensors."""

    def write(change=None, **entries):
        lora_lib.save(tmp_path, LORA, random_delta(LORA, TOY_CFG), TOY_CFG)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | entries))
        if change is not None:
            file = tmp_path / "adapter_model.safetensors"
            tensors = safetensors.numpy.load_file(file)
            change(tensors)
            safetensors.numpy.save_file(tensors, file)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"bias": "all"}, "bias='all' must be 'none'"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA' must be 'LORA'"),
        ({"use_dora": True}, "use_dora=True must be False"),
        ({"use_rslora": True}, "use_rslora=True must be False"),  # alpha / sqrt(r)
        ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern={'q_proj': 1} and .* leave alpha / r=2"),
        ({"rank_pattern": {"qkv": 3}}, "rank_pattern={'qkv': 3} must be of modules"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' must be True or False or"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' must be"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens=\[1, 2\] must be absent"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\] must be absent"),
        ({"use_qalora": True}, "use_qalora=True must be False"),
        ({"new_scale": 3}, "new_scale=3 is not known here and may change what the adapter does"),
        ({"r": None}, r"r and entries of rank_pattern are \[None\], not integers above 0"),
        ({"r": 0}, r"are \[0\], not integers"),
        ({"rank_pattern": {"q_proj": "x"}}, r"are \[3, 'x'\], not integers"),
        ({"rank_pattern": [3]}, "rank_pattern and alpha_pattern must be objects"),
        ({"lora_alpha": "x"}, r"lora_alpha and entries of alpha_pattern are \['x'\], not numbers"),
        ({"lora_alpha": float("inf")}, r"are \[inf\], not numbers above 0"),
        ({"r": 4}, r"q_proj.lora_A.weight is \[3, 16\] and must be \[4, 16\]"),
    ],
)
def test_other_changes_are_refused(saved, entries, message):
    with pytest.raises(ValueError, match=message):
        lora_lib.load(saved(**entries), TOY_CFG)


def test_what_peft_writes_by_default_is_accepted(saved):
    path = saved(
        use_dora=False, use_rslora=False, alpha_pattern={}, rank_pattern=None, revision=None,
        init_lora_weights=True, layers_to_transform=None, lora_bias=False, peft_version="0.18.0",
        exclude_modules=None, eva_config=None, loftq_config={}, qalora_group_size=16,
    )  # fmt: skip
    assert lora_lib.load(path, TOY_CFG)[0] == LORA


FIRST = "base_model.model.model.transformer.blocks.0.q_proj.lora_A.weight"
FOREIGN = "base_model.model.model.transformer.ff_out.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({FOREIGN: t[FIRST]}), "transformer.ff_out.lora_A.weight changes noth"),
        (lambda t: t.pop(FIRST.replace("blocks.0", "blocks.1")), "blocks.1.q_proj.* is missing"),
        (lambda t: t.pop(FIRST.replace("_A", "_B")), "blocks.0.q_proj.lora_B.weight is missing"),
        (lambda t: t.pop(FIRST), "q_proj.lora_.* changes nothing of this model"),
    ],
)
def test_other_tensors_are_refused(saved, change, message):
    with pytest.raises(ValueError, match=message):
        lora_lib.load(saved(change), TOY_CFG)


def test_broken_files_are_told_in_one_sentence(saved, tmp_path):
    path = saved()
    tensors, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    whole = tensors.read_bytes()
    for broken in (whole[:-9], b"version https://git-lfs.github.com/spec/v1", b""):
        tensors.write_bytes(broken)
        with pytest.raises(
            ValueError, match=r"is not a complete safetensors file .*; (download it|.*lfs pull)"
        ):
            lora_lib.load(path, TOY_CFG)
    tensors.rename(path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is missing: .*weights"):
        lora_lib.load(path, TOY_CFG)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is not valid JSON"):
        lora_lib.load(path, TOY_CFG)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json is missing: .*no adapter"):
        lora_lib.load(path, TOY_CFG)


def test_other_models_are_refused(saved, tmp_path):
    path = saved()
    deeper, shallower = (dataclasses.replace(TOY_CFG, n_layers=n) for n in (3, 1))
    wider = dataclasses.replace(TOY_CFG, d_ff=32)
    with pytest.raises(ValueError, match=r"blocks\.2\.q_proj\.lora_A\.weight is missing"):
        lora_lib.load(path, deeper)
    with pytest.raises(ValueError, match=r"blocks\.1\..* changes nothing of this model"):
        lora_lib.load(path, shallower)
    with pytest.raises(ValueError, match=r"ff_proj\.lora_B\.weight is \[24, 3\] and must be \[32"):
        lora_lib.load(path, wider)
    with pytest.raises(ValueError, match="targets has nothing"):
        lora_lib.load(path, dream_toy()[0])
    with pytest.raises(FileNotFoundError):
        lora_lib.load(tmp_path / "nowhere", TOY_CFG)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        lora_lib.load(path, TOY_CFG)


# ---- Steps ------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_steps_change_the_adapter_only_and_are_the_same_sharded(toy_params):
    lora = Lora(rank=4, alpha=8.0)
    optim = OptimConfig(learning_rate=1e-2, decay_steps=9)
    specs, batch = lora.specs(TOY_CFG), jax.device_get(make_batch(TOY_CFG, rows=8))
    weights = jax.device_get(toy_params)
    static = {"cfg": TOY_CFG, "objective": MaskedDiffusion(), "optim": optim, "trainable": lora}
    results = []
    for mesh in (make_mesh(), make_mesh(data=2, fsdp=2, tensor=2)):
        with jax.set_mesh(mesh):
            shardings = step_lib.state_shardings(specs, optim, mesh)
            frozen = jax.device_put(weights, param_shardings(TOY_CFG, mesh))
            state = step_lib.first_state(
                jax.random.key(0), None, specs, jnp.float32, optim, shardings
            )
            step = step_lib.jit_train_step(shardings)
            states = [jax.device_get(state.params)]
            for _ in range(2):
                placed = data.to_global(batch, mesh)
                state, metrics = step(state, placed, jax.random.key(2), Learned(frozen), **static)
                states.append(jax.device_get(state.params))
        assert_same(jax.device_get(frozen), weights)
        results.append((states, jax.device_get(metrics)))
    for leaf in jax.tree.leaves(state.params):
        assert leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    # Moments of what is learned, and no others.
    shapes = [x.shape for x in jax.tree.leaves(state.params)]
    assert sorted(x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim) == sorted(2 * shapes)
    first, second, third = results[0][0]
    for target in TARGETS:
        # While `up` is zero, `down` has no gradient.
        assert_same(first[target]["down"], second[target]["down"])
        assert (first[target]["up"] == 0).all() and (second[target]["up"] != 0).any()
        assert (second[target]["down"] != third[target]["down"]).any()
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


# ---- Runs -------------------------------------------------------------------------------------

TRAINABLE = {"make": "dlm.lora:Lora", "rank": 2, "alpha": 4.0, "targets": ["q", "v", "down"]}


def lora_config(base, **changes):
    section = {**toy_config().train, "trainable": TRAINABLE, "init_from": str(base)}
    return toy_config(train=section, **changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a model for the toy task. Not to be written to."""
    path = tmp_path_factory.mktemp("base") / "model"
    settings = loop.from_config_dict(toy_config())
    tokenizer = word_tokenizer(toys.Copy().pieces)
    cfg = model_config(settings, tokenizer)
    dlm.save(path, dlm.LanguageModel(init_params(jax.random.key(3), cfg), cfg, tokenizer))
    return path


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A run of eight steps. Not to be written to."""
    workdir = tmp_path_factory.mktemp("run")
    before = {path: path.read_bytes() for path in base.iterdir()}
    result = loop.run(lora_config(base), workdir)
    assert {path: path.read_bytes() for path in base.iterdir()} == before
    return workdir, result


@pytest.mark.exhaustive(every=4)
def test_run_leaves_the_adapter_and_the_model_it_makes(base, finished):
    workdir, result = finished
    assert result.step == 8 and result.model_path == workdir / "model"
    model, ours = dlm.load(base), dlm.load(workdir / "model")
    lora, delta = lora_lib.load(workdir / "adapter", model.cfg)
    assert lora == Lora(rank=2, alpha=4.0, targets=("q", "v", "down"))
    assert all((delta[target]["up"] != 0).any() for target in lora.targets)
    assert ours.cfg == model.cfg
    assert ours.tokenizer.encode("abc>") == model.tokenizer.encode("abc>")
    assert_same(ours.params, jax.jit(lora.merge)(model.params, delta))
    flat, merged = (dict(jax.tree_util.tree_leaves_with_path(m.params)) for m in (model, ours))
    changed = [jax.tree_util.keystr(k) for k in flat if (flat[k] != merged[k]).any()]
    assert [name.split("'")[-2] for name in changed] == ["q", "v", "down"]


@pytest.mark.exhaustive(every=4)
def test_run_that_was_stopped_goes_on_as_if_it_had_not(base, finished, tmp_path, monkeypatch):
    """Three steps, SIGTERM, the other five."""
    workdir, _ = finished
    calls, original = [], data.to_global

    def to_global(batch, mesh):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, mesh)

    monkeypatch.setattr(data, "to_global", to_global)
    assert loop.run(lora_config(base), tmp_path).step == 3
    assert not (tmp_path / "model").exists() and not (tmp_path / "adapter").exists()
    assert loop.run(lora_config(base), tmp_path).step == 8
    assert without_times(tmp_path) == without_times(workdir)
    for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (tmp_path / file).read_bytes() == (workdir / file).read_bytes()


@pytest.mark.exhaustive(every=4)
def test_a_run_does_not_go_on_beside_another_model(base, finished, tmp_path):
    """Same sizes, other weights, same folder."""
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.copytree(base, tmp_path / "base")
    config = lora_config(tmp_path / "base")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    settings["train"]["init_from"] = str(tmp_path / "base")
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    config.train.num_steps = 9
    assert loop.run(config, tmp_path / "run").step == 9
    model = dlm.load(base)
    shutil.rmtree(tmp_path / "base")
    other = jax.tree.map(lambda x: x * 1.1, model.params)
    dlm.save(tmp_path / "base", dataclasses.replace(model, params=other))
    config.train.num_steps = 10
    with pytest.raises(ConfigError, match=r"is not the one that .* was begun with .*frozen\.json"):
        loop.run(config, tmp_path / "run")


def test_runs_that_cannot_be_are_refused(base, finished, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.init_from='' must be a model"):
        loop.run(lora_config(""), tmp_path)
    wrong = lora_config(base)
    wrong.train.trainable.rank = 0
    with pytest.raises(ConfigError, match=r"train\.trainable: rank=0 must be a whole number"):
        loop.run(wrong, tmp_path)
    other = lora_config(base)
    other.train.trainable.rank = 3
    with pytest.raises(ConfigError, match=r"train\.trainable\.rank was 2 and is 3"):
        loop.run(other, finished[0])
