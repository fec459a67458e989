"""Layers whose weights are arrays of their own are the model whose weights are stacked."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm
from dlm.cache import init_cache
from dlm.lora import TARGETS, Lora
from dlm.models import decoder
from dlm.params import (
    Apart,
    abstract_params,
    apart,
    init_from_specs,
    init_params,
    is_apart,
    is_faster_apart,
)
from dlm.presets import PRESETS
from dlm.sharding import make_mesh
from dlm.trainable import Learned
from dlm.window import Slots, Window
from tests.lib.kinds import KINDS, model
from tests.lib.paths import GOLDEN
from tests.lib.tiers import more

forward = jax.jit(decoder.forward, static_argnames=("cfg", "feature_layers", "layers"))
TINY = PRESETS["tiny"]


def window(cfg, T=5):
    tokens = jax.random.randint(jax.random.key(2), (2, T), 0, cfg.vocab_size)
    return Window.at(tokens, jnp.array([0, 3]), is_causal=True)


def run(cfg, params, **options):
    cache = init_cache(cfg, 2, 16)
    return forward(params, cfg, window(cfg), Slots.append(cache, jnp.array([0, 3])), **options)


def assert_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("name", ["gemma", *more(*(name for name in KINDS if name != "gemma"))])
def test_every_kind_of_layer(name):
    cfg, params = model(name)
    split = apart(params, cfg)
    assert any(map(is_apart, jax.tree.leaves(split, is_leaf=is_apart)))
    assert_same(run(cfg, split), run(cfg, params))


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("name", ["gemma", *more("experts behind a dense layer")])
def test_caches_that_lie_apart(monkeypatch, name):
    """What is read of them, and what is left in them, also by a window of all slots."""
    cfg, params = model(name)
    outputs = []
    for least in (0, 2**30):
        monkeypatch.setattr("dlm.cache.APART_BYTES", least)
        first = run(cfg, params)
        assert is_apart(first.cache.k) == (least == 0)
        start = jnp.array([5, 8])
        then = forward(params, cfg, window(cfg, 1), Slots.append(first.cache, start))
        whole = Slots.below(then.cache, start).replace(write_at=jnp.zeros(2, jnp.int32))
        filled = forward(params, cfg, window(cfg, 16), whole)
        caches = [jax.tree.leaves((out.cache.k, out.cache.v)) for out in (then, filled)]
        flat = [np.stack(c).reshape(2, cfg.n_layers, -1) for c in caches]
        outputs.append([then.hidden, filled.hidden, *flat])
    assert_same(*outputs)


@pytest.mark.exhaustive(every=4)
def test_some_layers_and_features():
    cfg, params = model("experts behind a dense layer")
    options = dict(layers=(0, 2, 3), feature_layers=(2, 4))
    assert_same(run(cfg, apart(params, cfg), **options), run(cfg, params, **options))


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("targets", [TARGETS, *more(["k", "o", "up"])])
def test_low_rank_changes_attached_and_merged(targets):
    params = init_params(jax.random.key(0), TINY)
    lora = Lora(rank=2, alpha=3.0, targets=targets)
    specs = jax.tree.map(lambda s: dataclasses.replace(s, stddev=0.1), lora.specs(TINY))
    own = jax.jit(lambda key: init_from_specs(key, specs, jnp.float32))(jax.random.key(1))
    split, merge = apart(params, TINY), jax.jit(lora.merge)
    expected = run(TINY, merge(params, own)).hidden
    np.testing.assert_allclose(run(TINY, merge(split, own)).hidden, expected, atol=1e-5)
    attached = lora.attach(TINY, Learned(target=split, own=own), own).target
    np.testing.assert_allclose(run(TINY, attached).hidden, expected, atol=1e-5)
    assert not np.allclose(run(TINY, split).hidden, expected, atol=1e-3)


def test_a_loaded_model_is_saved_and_known_as_the_stacked_one(tmp_path):
    stacked, split = (
        dlm.load(GOLDEN / "dream_small", apart=is_split) for is_split in (False, True)
    )
    o, qkv = (split.params["layers"]["attention"][name] for name in ("o", "qkv"))
    assert isinstance(o, Apart) and o.shape == stacked.params["layers"]["attention"]["o"].shape
    assert qkv.sizes == tuple(stacked.params["layers"]["attention"][x].shape[1] for x in "qkv")
    jax.tree.map(np.testing.assert_array_equal, apart(stacked.params, stacked.cfg), split.params)
    assert dlm.fingerprint(split) == dlm.fingerprint(stacked)
    for name, lm in (("a", stacked), ("b", split)):
        dlm.save(tmp_path / name, lm)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    with pytest.raises(ValueError, match="apart=True goes without a mesh"):
        dlm.load(GOLDEN / "dream_small", apart=True, mesh=make_mesh())


def test_large_layers_lie_apart_on_a_cpu():
    wide = dataclasses.replace(TINY, d_model=512, d_ff=1536)
    assert is_faster_apart(wide) and not is_faster_apart(TINY)
    assert dlm.load(GOLDEN / "llada_small").params["layers"]["mlp"]["up"].ndim == 3


@pytest.mark.parametrize("T", [1, 8])
def test_weights_of_layers_are_not_copied(T):
    """In the compiled program no array of the shape of a layer's weights is made."""
    cfg = dataclasses.replace(TINY, n_layers=3, d_model=96, d_ff=416)
    shapes = abstract_params(cfg)
    split = jax.eval_shape(lambda params: apart(params, cfg), shapes)
    slots = Slots.append(jax.eval_shape(lambda: init_cache(cfg, 1, 16)), jnp.zeros(1, jnp.int32))
    tokens = jnp.zeros((1, T), jnp.int32)
    made = []
    for params in (shapes, split):
        at = Window.at(tokens, jnp.zeros(1, jnp.int32), is_causal=True)
        text = forward.lower(params, cfg, at, slots).compile().as_text()
        found = re.findall(r"= f32\[(?:1,)?(?:96,416|(?:416|832),96)\]\S* ([a-z-]+)\(", text)
        made.append(set(found) - {"parameter", "get-tuple-element", "bitcast"})
    assert made[0] and not made[1], made
