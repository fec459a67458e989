import dataclasses
import functools
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm import rope, vocab
from dlm.blocks.rotary import rotary_angles
from dlm.cache import init_cache
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import (
    abstract_params,
    apart,
    init_params,
    num_expert_params,
    num_params,
    param_shardings,
    param_specs,
)
from dlm.presets import PRESETS
from dlm.sharding import constrain, logical_sharding, make_mesh
from dlm.window import BlockDiffusion, Slots, Window
from tests.lib import weights
from tests.lib.tiers import more

VARIANTS = {
    "llada": {},
    "dream": dict(qkv_bias=True, shifted_logits=True),
    "qwen3": dict(qk_norm=True, tie_embeddings=True),
}


def model(name, **changes):
    cfg = dataclasses.replace(PRESETS["tiny"], **VARIANTS[name], **changes)
    return cfg, weights.noisy(jax.random.key(1), weights.init_params(jax.random.key(0), cfg))


forward = jax.jit(decoder.forward, static_argnames=("cfg", "feature_layers", "layers", "remat"))


def random_tokens(cfg, B=2, T=12):
    tokens = jax.random.randint(jax.random.key(2), (B, T), 0, cfg.vocab_size)
    return tokens, jnp.broadcast_to(jnp.arange(T), (B, T))


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("name", ["qwen3", *more(*(name for name in VARIANTS if name != "qwen3"))])
def test_causal_prefill_in_chunks_equals_one_forward(name):
    cfg, params = model(name)
    tokens, positions = random_tokens(cfg)
    whole = forward(params, cfg, Window(tokens, positions, is_causal=True)).hidden
    cache = init_cache(cfg, 2, 16)
    outputs, filled = [], 0
    for length in (5, 1, 6):
        start = jnp.full(2, filled)
        window = Window.at(tokens[:, filled : filled + length], start, is_causal=True)
        out = forward(params, cfg, window, Slots.append(cache, start))
        outputs.append(out.hidden)
        cache, filled = out.cache, filled + length
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), whole, atol=2e-5)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("name", VARIANTS)
def test_window_against_the_cache_of_the_same_tokens_equals_the_whole_canvas(name):
    """With unchanged tokens the stale cache is not stale: both caches must then be exact."""
    cfg, params = model(name)
    tokens, positions = random_tokens(cfg)
    empty = Slots(init_cache(cfg, 2, 12), write_at=jnp.zeros(2, jnp.int32))
    full = forward(params, cfg, Window(tokens, positions), empty)
    around = Slots(full.cache, jnp.array([[[0, 4], [8, 12]]] * 2))
    inside = decoder.forward(params, cfg, Window(tokens[:, 4:8], positions[:, 4:8]), around)
    np.testing.assert_allclose(inside.hidden, full.hidden[:, 4:8], atol=2e-5)
    before = Slots.below(full.cache, jnp.full(2, 4))
    suffix = decoder.forward(params, cfg, Window(tokens[:, 4:], positions[:, 4:]), before)
    assert inside.cache is suffix.cache is full.cache
    np.testing.assert_allclose(suffix.hidden, full.hidden[:, 4:], atol=2e-5)


def test_left_padding_changes_nothing():
    cfg, params = model("llada")
    tokens, positions = random_tokens(cfg, B=1)
    alone = forward(params, cfg, Window(tokens, positions)).hidden
    padded = jnp.concatenate([jnp.full((1, 5), 7), tokens], axis=1)
    got = forward(params, cfg, Window.left_padded(padded, jnp.array([5]))).hidden
    np.testing.assert_allclose(got[:, 5:], alone, atol=2e-5)


def test_causal_does_not_look_ahead_and_bidirectional_does():
    cfg, params = model("llada")
    tokens, positions = random_tokens(cfg)
    other = tokens.at[:, 8].set((tokens[:, 8] + 1) % cfg.vocab_size)
    for is_causal in (True, False):
        a = forward(params, cfg, Window(tokens, positions, is_causal=is_causal)).hidden[:, :8]
        b = forward(params, cfg, Window(other, positions, is_causal=is_causal)).hidden[:, :8]
        assert bool((a != b).any()) == (not is_causal)


def test_windows_that_contradict_themselves_are_refused():
    cfg, params = model("llada")
    tokens, positions = random_tokens(cfg)
    window = Window(tokens, positions, jnp.zeros((2, 12, 1), jnp.uint32), is_causal=True)
    with pytest.raises(ValueError, match="is_causal=True goes without a mask"):
        forward(params, cfg, window)
    window = Window(tokens, positions, BlockDiffusion(jnp.zeros((2, 6), jnp.int32), 3))
    slots = Slots(init_cache(cfg, 2, 12), write_at=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="goes without slots and range"):
        forward(params, cfg, window, slots)


def test_remat_changes_no_gradient():
    cfg, params = model("llada")
    tokens, positions = random_tokens(cfg)

    def loss(params, remat):
        hidden = forward(params, cfg, Window(tokens, positions), remat=remat).hidden
        return (vocab.logits(vocab.head(params), hidden) ** 2).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    a, b = gradient(params, False), gradient(params, True)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), a, b)


def test_published_sizes():
    assert num_params(PRESETS["llada_8b"]) == 8_015_581_184
    assert num_params(PRESETS["dream_7b"]) == 7_615_616_512
    for name, expected in {
        "llada2_mini": 16_255_643_392,
        "qwen3_30b_a3b": 30_532_122_624,
        "mistral_7b": 7_241_732_096,
        "mixtral_8x7b": 46_702_792_704,
        "olmoe_1b_7b": 6_919_161_856,
        "gemma2_2b": 2_614_341_888,
        "gemma3_1b": 999_885_952,
        "phi3_mini_4k": 3_821_079_552,
        "smollm3_3b": 3_075_098_624,
        "gpt2": 124_439_808,
    }.items():
        assert num_params(PRESETS[name]) == expected
    mini = PRESETS["llada2_mini"]  # 16B, of which 1.4B are used
    used = num_params(mini) - num_expert_params(mini) * (1 - 8 / 256)
    assert round(used / 1e9, 1) == 1.4
    non_embedding = num_params(PRESETS["llada_8b"]) - 2 * 126464 * 4096
    assert round(non_embedding / 1e9, 2) == 6.98


def test_specs_init_and_abstract_agree():
    for name in VARIANTS:
        cfg = model(name)[0]
        params = jax.eval_shape(functools.partial(init_params, cfg=cfg), jax.random.key(0))
        specs, abstract = param_specs(cfg), abstract_params(cfg)
        jax.tree.map(
            lambda p, s, a: (p.shape == s.shape == a.shape) or 1 / 0, params, specs, abstract
        )
        assert ("unembed" in params) != cfg.tie_embeddings


def test_sharded_forward_equals_unsharded():
    cfg, params = model("dream", n_heads=8, n_kv_heads=2)
    tokens, positions = random_tokens(cfg, B=4)
    run = jax.jit(
        lambda p, t: vocab.logits(vocab.head(p), forward(p, cfg, Window(t, positions)).hidden)
    )
    expected = run(params, tokens)
    mesh = make_mesh(data=2, fsdp=1, tensor=4)  # two kv heads on four shards: replicated
    shardings = param_shardings(cfg, mesh)
    assert shardings["layers"]["attention"]["q"].spec[1] == "tensor"
    assert shardings["layers"]["attention"]["k"].spec[1] is None
    with jax.set_mesh(mesh):
        got = run(jax.device_put(params, shardings), tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_mesh_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="needs 64 devices, but there are 8"):
        make_mesh(data=64)
    with pytest.raises(ValueError, match="logical axis 'head'"):
        logical_sharding((4,), ("head",), make_mesh(data=2))
    x = jnp.ones(3)
    assert constrain(x, "batch") is x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n_kv_heads=3), "n_heads=4 must be a multiple of n_kv_heads=3"),
        (dict(head_dim=15), "head_dim=15 must be even"),
        (dict(n_layers=0), "n_layers=0 must be at least 1"),
        (dict(mask_token_id=128), r"mask_token_id=128 must be in \[0, vocab_size=128\)"),
        (dict(pad_token_id=127), "must differ from mask_token_id"),
        (dict(dtype="int8"), "dtype='int8' must be"),
        (dict(pattern=()), r"pattern=\(\) must be kinds of layers, of .* 'dense global rotary'"),
        (dict(pattern=("dense wide rotary",)), "must be kinds of layers"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["tiny"], **change)


def test_config_is_hashable():
    assert hash(PRESETS["tiny"]) == hash(ModelConfig(**dataclasses.asdict(PRESETS["tiny"])))
    stored = json.loads(json.dumps(dataclasses.asdict(PRESETS["tiny"])))
    assert ModelConfig(**stored) == PRESETS["tiny"]


def test_stretched_frequencies_by_hand():
    """Llama 3.1: long wavelengths are stretched, short ones kept, those in between partly."""
    scaling = rope.Llama3(
        factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_max_seq_len=64
    )
    cfg = dataclasses.replace(PRESETS["tiny"], rope_theta=1000.0, rope_scaling=scaling)
    angles = rotary_angles(jnp.ones((1, 1), jnp.int32), cfg)
    kinds = set()
    for i, angle in enumerate(np.arctan2(angles.sin[0, 0, 0], angles.cos[0, 0, 0])):
        frequency = 1000.0 ** (-2 * i / cfg.head_dim)
        wavelength = 2 * np.pi / frequency
        if wavelength < 64 / 3:
            kinds.add("kept")
        elif wavelength > 64:
            kinds.add("stretched")
            frequency /= 4
        else:
            kinds.add("between")
            smooth = (64 / wavelength - 1) / (3 - 1)
            frequency = (1 - smooth) * frequency / 4 + smooth * frequency
        np.testing.assert_allclose(angle, frequency, rtol=1e-5)
    assert kinds == {"kept", "between", "stretched"}


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("layers", [(0,), (1, 0), (0, 1, 2), (2,)])
def test_features_are_the_residual_stream(layers):
    """Layer by layer: a model of the first i layers leaves what the i-th layer receives."""
    cfg, params = model("llada")
    tokens, positions = random_tokens(cfg)
    window = Window(tokens, positions)
    found = forward(params, cfg, window, feature_layers=layers)
    plain = forward(params, cfg, window)
    np.testing.assert_array_equal(found.hidden, plain.hidden)
    assert plain.features is None
    parts = jnp.split(found.features, len(layers), axis=-1)
    for layer, part in zip(layers, parts, strict=True):
        if layer == 0:
            np.testing.assert_array_equal(part, params["embed"][tokens])
        else:
            below = jax.tree.map(operator.itemgetter(slice(layer)), params["layers"])
            short = dataclasses.replace(cfg, n_layers=layer)
            ones = {"layers": below, "final_norm": jnp.ones_like(params["final_norm"])}
            normed = forward(params | ones, short, window).hidden
            scale = jnp.sqrt(jnp.mean(part**2, axis=-1, keepdims=True) + cfg.norm_eps)
            np.testing.assert_allclose(part / scale, normed, rtol=1e-5, atol=1e-6)


# ---- A subset of the layers -------------------------------------------------------------------


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("layers", [(1, 3), *more(((0,),), ((0, 1, 2),), ((0, 1, 2, 3),))])
def test_some_layers_are_a_model_of_those_layers(layers):
    """Bit for bit, through a cache of their own and through one of the whole model."""
    cfg, params = model("qwen3", n_layers=4)
    tokens, _ = random_tokens(cfg)
    short = dataclasses.replace(cfg, n_layers=len(layers))
    taken = params | {"layers": jax.tree.map(lambda x: x[jnp.array(layers)], params["layers"])}

    @functools.partial(jax.jit, static_argnames=("cfg", "layers"))
    def run(params, cache, cfg, layers=None):
        start = jnp.zeros(2, jnp.int32)
        first = Window.at(tokens[:, :8], start, is_causal=True)
        first = forward(params, cfg, first, Slots.append(cache, start), layers=layers)
        then = Window.at(tokens[:, 8:], start + 8, is_causal=True)
        then = forward(params, cfg, then, Slots.append(first.cache, start + 8), layers=layers)
        return jnp.concatenate([first.hidden, then.hidden], axis=1), then.cache

    expected, written = run(taken, init_cache(short, 2, 16), short)
    own, own_cache = run(params, init_cache(short, 2, 16), cfg, layers)
    shared, whole_cache = run(params, init_cache(cfg, 2, 16), cfg, layers)
    np.testing.assert_array_equal(own, expected)
    np.testing.assert_array_equal(shared, expected)
    np.testing.assert_array_equal(own_cache.k, written.k)
    np.testing.assert_array_equal(whole_cache.k[jnp.array(layers)], written.k)
    others = [i for i in range(4) if i not in layers]
    assert not np.asarray(whole_cache.k)[others].any()


def test_features_of_some_layers():
    cfg, params = model("llada", n_layers=3)
    tokens, positions = random_tokens(cfg)
    window = Window(tokens, positions)
    both = forward(params, cfg, window, layers=(0, 2), feature_layers=(2, 3)).features
    first, last = jnp.split(both, 2, axis=-1)
    alone = forward(params, cfg, window, layers=(0,), feature_layers=(3,)).features
    np.testing.assert_allclose(first, alone, rtol=1e-6)
    assert (np.asarray(first) != last).any()


@pytest.mark.parametrize("layers", [None, (0, 1, 2), (1, 4, 6), "data"])
def test_weights_of_layers_are_not_copied(layers):
    """Beside arguments and results a compiled forward needs less than two layers of weights."""
    cfg, _ = model("llada", n_layers=8, d_model=128, d_ff=1024)
    params = abstract_params(cfg)
    one = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params["layers"])) // 8
    window = Window(*(jax.ShapeDtypeStruct((1, 1), jnp.int32),) * 2)
    run = jax.jit(forward, static_argnames=("cfg", "layers"))
    options = {"layers": layers}
    if layers == "data":
        slots = jax.eval_shape(lambda: Slots.append(init_cache(cfg, 1, 8), jnp.zeros(1, jnp.int32)))
        options = {"slots": slots, "sublayers": jax.ShapeDtypeStruct((1, 8, 2), jnp.bool_)}
    memory = run.lower(params, cfg, window, **options).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * one


def without(params, is_run):
    """Weights with which a model without the sublayers that are not run [L, 2] does the same."""
    layers = jax.tree.map(np.copy, params["layers"])
    layers["attention"]["o"][~is_run[:, 0]] = 0
    layers["mlp"]["down"][~is_run[:, 1]] = 0
    return params | {"layers": layers}


@pytest.mark.parametrize(("name", "lies_apart"), [("llada", True), *more(("llada", False))])
def test_sublayers_that_are_not_run(name, lies_apart):
    """Of every row its own, with a cache and without; the choice is data."""
    cfg, params = model(name, n_layers=3)
    params = jax.device_get(params)
    tokens, positions = map(np.asarray, random_tokens(cfg, 3))
    is_run = np.random.default_rng(2).random((3, 3, 2)) < 0.5
    is_run[2] = True
    stored = apart(params, cfg) if lies_apart else params
    caches = {
        num: Slots.append(init_cache(cfg, num, 16), np.zeros(num, np.int32)) for num in (1, 3)
    }
    for slots in (caches.get, lambda num: None):
        window = Window(tokens, positions, is_causal=True)
        for choice in (is_run, is_run[::-1].copy()):
            ours = jax.device_get(forward(stored, cfg, window, slots(3), sublayers=choice))
            for b in range(3):
                row = Window(tokens[b : b + 1], positions[b : b + 1], is_causal=True)
                theirs = forward(without(params, choice[b]), cfg, row, slots(1))
                theirs, ran = jax.device_get(theirs), choice[b, :, 0]
                np.testing.assert_allclose(ours.hidden[b], theirs.hidden[0], atol=2e-5)
                if ours.cache is not None:
                    keys = [np.stack([*x.cache.k])[ran] for x in (ours, theirs)]
                    np.testing.assert_allclose(keys[0][:, b], keys[1][:, 0], atol=2e-5)


def test_what_no_row_runs_is_not_computed(monkeypatch):
    """Halves that are executed are counted, and beside them no layer's weights are copied."""
    cfg, params = model("llada", n_layers=4)
    counts = {"_attention": 0, "_mlp": 0}

    def counting(name):
        half = getattr(decoder, name)

        def run(*args):
            def count():
                counts[name] += 1

            jax.debug.callback(count)
            return half(*args)

        return run

    for name in counts:
        monkeypatch.setattr(decoder, name, counting(name))
    is_run = np.zeros((2, 4, 2), bool)
    is_run[0, 1], is_run[1, [1, 3], 1] = True, True
    tokens, positions = random_tokens(cfg)
    slots = Slots.append(init_cache(cfg, 2, 16), jnp.zeros(2, jnp.int32))
    run = jax.jit(lambda *args: decoder.forward(args[0], cfg, *args[1:3], sublayers=args[3]))
    jax.block_until_ready(run(params, Window(tokens, positions, is_causal=True), slots, is_run))
    jax.effects_barrier()
    assert counts == {"_attention": 1, "_mlp": 2}


def test_layers_that_cannot_be_run_are_refused():
    cfg, params = model("llada")
    window = Window(*random_tokens(cfg))
    for layers in ((), (2,), (1, 0), (-1,), (0, 0)):
        with pytest.raises(ValueError, match="must be rising layers of the 2 there are"):
            forward(params, cfg, window, layers=layers)
    with pytest.raises(ValueError, match=r"feature_layers=\(1,\) must be among layers=\(0,\)"):
        forward(params, cfg, window, layers=(0,), feature_layers=(1,))
    cache = init_cache(dataclasses.replace(cfg, n_layers=3), 2, 16)
    with pytest.raises(ValueError, match="the cache has 3 layers and must have 1"):
        forward(params, cfg, window, Slots(cache), layers=(0,))
