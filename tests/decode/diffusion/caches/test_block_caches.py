"""Where block caches are exact: in models whose blocks do not look ahead (Fast-dLLM card, 4, 5)."""

import functools

import jax.numpy as jnp
import pytest

from decode.diffusion.caches import block_cache, canvas
from decode.diffusion.components import (
    DualCache,
    FixedBlocks,
    NoCache,
    PrefixCache,
    Quota,
    Threshold,
)
from decode.diffusion.loop import DiffusionMethod, decode
from dlm.models.decoder import forward
from kernels_pallas.window_attention import pack_mask
from tests.lib.batches import assert_same, run

C = 4
PROMPTS = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 8, 9, 8]]  # whole blocks


@pytest.fixture
def blocks_look_back_only(monkeypatch):
    """The toy becomes block-causal: its own block and those before, nothing behind."""

    def block_causal(params, cfg, window, slots=None):
        block = window.positions // C
        window = window.replace(mask=pack_mask(block[:, :, None] >= block[:, None]))
        if slots is not None and slots.ranges is not None:  # the second range is the suffix
            slots = slots.replace(ranges=slots.ranges.at[:, 1].set(0))
        return forward(params, cfg, window, slots)

    decode.clear_cache()
    for module in (canvas, block_cache):
        monkeypatch.setattr(module, "forward", block_causal)
    yield
    decode.clear_cache()


@pytest.mark.parametrize("cache", [PrefixCache(), DualCache()])
def test_caches_are_exact_if_blocks_do_not_look_ahead(toy_model, blocks_look_back_only, cache):
    cfg, params = toy_model
    method = DiffusionMethod(FixedBlocks(C), rule=Quota(C))
    go = functools.partial(run, params, cfg, prompts=PROMPTS, gen_len=12)
    exact = go(method.replace(cache=NoCache()))
    cached = go(method.replace(cache=cache))
    assert_same(cached, exact)
    assert jnp.allclose(cached.log_prob, exact.log_prob, atol=1e-4)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("cache", [PrefixCache(), DualCache()])
def test_with_one_block_nothing_but_the_prompt_is_frozen(toy_cfg, toy_params, cache):
    """The first round, a full forward, is exact; later ones are not: the prompt cannot follow."""
    method = DiffusionMethod(FixedBlocks(None), rule=Threshold(0.5))
    exact = run(toy_params, toy_cfg, method, PROMPTS, 12)
    cached = run(toy_params, toy_cfg, method.replace(cache=cache), PROMPTS, 12)
    first = exact.step_map == 0
    assert ((cached.step_map == 0) == first).all()
    assert jnp.allclose(cached.log_prob[first], exact.log_prob[first], atol=1e-5)
    later = ~first
    assert not jnp.allclose(cached.log_prob[later], exact.log_prob[later], atol=1e-3)
