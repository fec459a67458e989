"""What a window leaves in the cache, and that nothing else of it is touched or copied."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion import loop as diffusion
from decode.diffusion.components import DelayedCache, DualCache, FixedBlocks, Threshold
from decode.speculative.controller import Controller
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.drafters.token_recycling import TokenRecycling
from decode.speculative.loop import SpeculativeMethod, decode, init_state
from decode.speculative.tree import from_paths
from dlm.cache import KVCache, write
from dlm.sharding import make_mesh
from dlm.window import Slots

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


@pytest.mark.parametrize("is_controlled", [False, True])
def test_no_round_copies_the_cache(toy_cfg, toy_params, is_controlled):
    """In the compiled loop nothing of the cache's size is made anew, and it is given away."""
    for drafter in (PromptLookup(num_drafts=3), TokenRecycling(TREE)):
        controller = Controller()
        costs = np.ones(1 + len(controller.widths_of(drafter)), np.float32)
        method = SpeculativeMethod(
            drafter, controller=controller.replace(costs=costs) if is_controlled else None
        )
        state = init_state(toy_cfg, method, [[1, 2, 3]] * 3, gen_len=40)
        check_in_place(decode.lower(toy_params, toy_cfg, method, state).compile(), state.cache)


@pytest.mark.parametrize("policy", [DualCache(), DelayedCache()])
def test_no_step_of_diffusion_copies_the_cache(toy_cfg, toy_params, policy):
    method = diffusion.DiffusionMethod(FixedBlocks(4), policy, rule=Threshold(0.4))
    state = diffusion.init_state(toy_cfg, method, [[1, 2, 3]] * 3, gen_len=40)
    compiled = diffusion.decode.lower(toy_params, toy_cfg, method, state).compile()
    check_in_place(compiled, state.cache.kv)


def check_in_place(compiled, cache):
    shape = ",".join(map(str, cache.k.shape))
    made = set(re.findall(rf"= f32\[{shape}\]\S* ([a-z-]+)\(", compiled.as_text()))
    assert made and not made & {"copy", "select", "transpose"}, made
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.num_bytes
