"""What a window leaves in the cache, and that nothing else of it is touched or copied."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion import loop as diffusion
from decode.diffusion.components import DelayedCache, DualCache, FixedBlocks, Threshold
from decode.search import loop as search
from decode.search.components import METHODS as SEARCHES
from decode.speculative.controller import Controller
from decode.speculative.drafters.dynamic_exit import DynamicExit
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.drafters.swift import Swift
from decode.speculative.drafters.token_recycling import TokenRecycling
from decode.speculative.loop import SpeculativeMethod, decode, init_state
from decode.speculative.tree import from_paths
from dlm.cache import KVCache, compact, copy_rows, init_cache, write, write_positions
from dlm.params import Apart
from dlm.sharding import make_mesh
from dlm.window import Slots
from tests.lib.tiers import more

TREE = from_paths([[0], [1], [0, 0]])
L, B, K, S, H, T = 3, 4, 2, 16, 4, 3
START = np.array([0, 6, 13, 8], np.int32)
ROWS = np.array([True, True, True, False])


def random_cache(seed, num_layers=L, num_slots=S):
    rng = np.random.default_rng(seed)
    shape = (num_layers, B, K, num_slots, H)
    return KVCache(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in "kv"))


def by_hand(old, new, layers=range(L)):
    expected = np.array(old)
    for i, layer in enumerate(layers):
        for b in range(B):
            if ROWS[b]:
                expected[layer, b, :, START[b] : START[b] + T] = new[i, b]
    return expected


def test_the_chosen_rows_get_the_window():
    old, new = random_cache(0), random_cache(1, num_slots=T)
    got = jax.jit(write)(old, new, START, ROWS)
    np.testing.assert_array_equal(got.k, by_hand(old.k, new.k))
    np.testing.assert_array_equal(got.v, by_hand(old.v, new.v))
    assert Slots(old).store(new) is old  # nothing says where


def test_a_window_may_be_of_the_first_rows():
    """Keys, values and positions; also where slots are on several devices."""
    old, new = random_cache(0), random_cache(1, num_slots=T)
    old = old.replace(positions=jnp.arange(B * S, dtype=jnp.int32).reshape(1, B, 1, S, 1))
    first = jax.tree.map(lambda x: x[:, :2], new)
    places = np.arange(2 * T, dtype=np.int32).reshape(2, T)

    def run(old):
        written = write(old, first, jnp.asarray(START[:2]), jnp.asarray(ROWS[:2]))
        return write_positions(written, jnp.asarray(places), jnp.asarray(START[:2]), None)

    got = jax.jit(run)(old)
    for a, b, c in ((got.k, old.k, new.k), (got.v, old.v, new.v)):
        np.testing.assert_array_equal(a[:, :2], by_hand(b, c)[:, :2])
        np.testing.assert_array_equal(a[:, 2:], b[:, 2:])
    positions = np.array(old.positions[0, :, 0, :, 0])
    for b in range(2):
        positions[b, START[b] : START[b] + T] = places[b]
    np.testing.assert_array_equal(got.positions[0, :, 0, :, 0], positions)
    if jax.device_count() >= 8:
        with jax.set_mesh(make_mesh(sequence=2, tensor=2)):
            jax.tree.map(np.testing.assert_array_equal, jax.jit(run)(old), got)
        order = np.array([0, 2, 1, 3])  # two rows a device, of which each has the first
        apart = jax.tree.map(lambda x: x[:, order], old)
        with jax.set_mesh(make_mesh(data=2, sequence=2, tensor=2)):
            by_device = jax.jit(run)(apart)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:, order]), by_device, got)


def split(cache):
    """The same, apart."""
    k, v = (Apart(tuple(x)) for x in (cache.k, cache.v))
    return KVCache(k, v, cache.positions)


def stacked(cache):
    k, v = (jnp.stack(x.layers) for x in (cache.k, cache.v))
    return KVCache(k, v, cache.positions)


def test_layers_that_lie_apart_get_the_same():
    old, new = random_cache(0), random_cache(1, num_slots=T)
    some = random_cache(2, 2, T)
    index = np.array([[1, 0], [0, 2], [2, 1], [1, 1]], np.int32)

    @jax.jit
    def run(cache):
        written = write(cache, new, START, ROWS)
        written = write(written, some, START, None, (0, 2))
        return compact(written, START, index)

    jax.tree.map(np.testing.assert_array_equal, stacked(run(split(old))), run(old))


def test_which_caches_lie_apart(toy_cfg):
    """Those of which a position has many numbers, without a mesh; none of the toy."""
    assert isinstance(init_cache(toy_cfg, 2, 8).k, jax.Array)
    wide = dataclasses.replace(toy_cfg, head_dim=64)
    cache = init_cache(wide, 2, 8)
    assert isinstance(cache.k, Apart) and cache.num_layers == wide.n_layers
    assert cache.k.shape == (wide.n_layers, 2, wide.n_kv_heads, 8, 64) and cache.num_slots == 8
    assert cache.num_bytes == 2 * 4 * np.prod(cache.k.shape)
    with jax.set_mesh(make_mesh()):
        assert init_cache(wide, 2, 8).k.shape == cache.k.shape
        assert not isinstance(init_cache(wide, 2, 8).k, Apart)


def test_some_layers():
    old, new = random_cache(0), random_cache(1, 2, T)
    got = write(old, new, jnp.asarray(START), jnp.asarray(ROWS), (0, 2))
    np.testing.assert_array_equal(got.k, by_hand(old.k, new.k, (0, 2)))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_slots_of_several_devices():
    old, new = random_cache(0), random_cache(1, num_slots=T)
    with jax.set_mesh(make_mesh(data=2, sequence=2, tensor=2)):
        got = jax.jit(write)(old, new, START, ROWS)
    np.testing.assert_array_equal(got.k, by_hand(old.k, new.k))


SOURCE, FIRST = np.array([[0, 0], [1, 1]], np.int32), np.array([3, 9], np.int32)


def row_of(group, nth, devices):
    """Of two groups of two rows: on every device the first ones come first."""
    return 2 * nth + group if devices == 1 else 2 * group + nth


def copied_by_hand(x, num_slots, devices=1):
    """Of group 0 its second row is to be like its first, of group 1 its first like its second."""
    x = np.array(x)
    for group, old, new, first in ((0, 0, 1, 3), (1, 1, 0, 9)):
        old, new = (row_of(group, nth, devices) for nth in (old, new))
        x[:, new, :, first : first + num_slots] = x[:, old, :, first : first + num_slots]
    return x


@pytest.mark.parametrize("is_apart", [False, True])
def test_rows_that_are_copied(is_apart):
    """Only these slots, and only of rows that are to be others."""
    old = random_cache(0)
    got = jax.jit(copy_rows, static_argnums=3)(split(old) if is_apart else old, SOURCE, FIRST, 5)
    got = stacked(got) if is_apart else got
    np.testing.assert_array_equal(got.k, copied_by_hand(old.k, 5))
    np.testing.assert_array_equal(got.v, copied_by_hand(old.v, 5))


@pytest.mark.exhaustive
@pytest.mark.parametrize("axes", [dict(data=2), dict(sequence=2), dict(data=2, sequence=4)])
def test_rows_that_are_copied_on_several_devices(axes):
    """Each device copies what it has of them, and perhaps more slots beside them."""
    old, devices = random_cache(0), axes.get("data", 1)
    with jax.set_mesh(make_mesh(**axes)):
        got = jax.jit(copy_rows, static_argnums=3)(old, SOURCE, FIRST, 5)
    got, wanted = np.array(got.k), copied_by_hand(old.k, 5, devices)
    kept = np.array(old.k)
    for group, new, first in ((0, 1, 3), (1, 0, 9)):
        row, source = (row_of(group, nth, devices) for nth in (new, 1 - new))
        inside = slice(first, first + 5)
        np.testing.assert_array_equal(got[:, row, :, inside], wanted[:, row, :, inside])
        for s in range(S):
            here = got[:, row, :, s]
            assert (here == kept[:, source, :, s]).all() or (here == kept[:, row, :, s]).all()
        np.testing.assert_array_equal(got[:, source], kept[:, source])


@pytest.mark.parametrize(("is_controlled", "is_apart"), [(True, False), *more((False, True))])
def test_no_round_copies_the_cache(toy_cfg, toy_params, monkeypatch, is_controlled, is_apart):
    """In the compiled loop nothing of the cache's size is made anew, and it is given away."""
    monkeypatch.setattr("dlm.cache.APART_BYTES", 0 if is_apart else 2**30)
    writes = Swift.example if is_controlled else DynamicExit.example  # to the target's cache
    drafters = PromptLookup(num_drafts=3), TokenRecycling(TREE), writes(toy_cfg, toy_params)
    for drafter in drafters:
        controller = Controller()
        costs = np.ones(1 + len(controller.widths_of(drafter)), np.float32)
        method = SpeculativeMethod(
            drafter, controller=controller.replace(costs=costs) if is_controlled else None
        )
        state = init_state(toy_cfg, method, [[1, 2, 3]] * 3, gen_len=40)
        check_in_place(decode.lower(toy_params, toy_cfg, method, state).compile(), state.cache)


@pytest.mark.parametrize("is_apart", [False, *more(True)])
@pytest.mark.parametrize("name", ["beam_4", *more(*sorted({*SEARCHES} - {"beam_4"}))])
def test_no_round_of_search_copies_the_cache(toy_cfg, toy_params, monkeypatch, name, is_apart):
    monkeypatch.setattr("dlm.cache.APART_BYTES", 0 if is_apart else 2**30)
    cfg = dataclasses.replace(toy_cfg, mask_token_id=None)
    state = search.begin(toy_params, cfg, SEARCHES[name], [[1, 2, 3]] * 3, gen_len=40)
    compiled = search.decode.lower(toy_params, cfg, SEARCHES[name], state).compile()
    check_in_place(compiled, state.cache)


@pytest.mark.parametrize("is_apart", [False, True])
@pytest.mark.parametrize("policy", [DualCache(), DelayedCache()])
def test_no_step_of_diffusion_copies_the_cache(toy_cfg, toy_params, monkeypatch, policy, is_apart):
    monkeypatch.setattr("dlm.cache.APART_BYTES", 0 if is_apart else 2**30)
    method = diffusion.DiffusionMethod(FixedBlocks(4), policy, rule=Threshold(0.4))
    state = diffusion.init_state(toy_cfg, method, [[1, 2, 3]] * 3, gen_len=40)
    compiled = diffusion.decode.lower(toy_params, toy_cfg, method, state).compile()
    check_in_place(compiled, state.cache.kv)


def check_in_place(compiled, cache):
    shape = ",".join(map(str, jax.tree.leaves(cache.k)[0].shape))
    made = set(re.findall(rf"= f32\[{shape}\]\S* ([a-z-]+)\(", compiled.as_text()))
    assert made and not made & {"copy", "select", "transpose"}, made
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.num_bytes
