import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import (
    BlockCausal,
    FixedBlocks,
    MultiBlock,
    NarrowOut,
    Quota,
    SubBlocks,
    Threshold,
)
from decode.diffusion.loop import DiffusionMethod, decode, init_state, stream
from dlm.models.decoder import forward
from dlm.window import Window
from kernels_pallas.block_diffusion_attention import block_diffusion_mask
from kernels_pallas.window_attention import pack_mask
from tests.lib.oracle import Model, proposals, sure
from tests.lib.tiers import more

C = 4
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [2, 2, 2, 2], [9] * 8]
LENGTHS = [12, 10, 5, 12, 1]


def decode_plainly(model, prompt, gen_len, threshold, sub_len=C, origin=0, first_alone=False):
    """Threshold decoding with the whole canvas recomputed under the block-causal mask."""
    cfg, P, n = model.cfg, len(prompt), len(prompt) + gen_len
    canvas, step_map, step = list(prompt) + [cfg.mask_token_id] * gen_len, [-1] * gen_len, 0
    place = np.arange(n) - origin
    block = place // C
    shift = int(cfg.shifted_logits)
    for b in range(block[P], block[-1] + 1):
        here = [i for i in range(P, n) if block[i] == b]
        part_of = {i: place[i] % C // sub_len + 1 for i in here}
        if first_alone:
            part_of |= {i: 0 for i in here if place[i] % C == 0}
        for p in sorted(set(part_of.values())):
            part = [i for i in here if part_of[i] == p]
            while any(step_map[i - P] < 0 for i in part):
                allowed = block[:, None] >= block[None]
                hidden, _ = model.run(canvas, range(n), allowed=allowed)
                found = proposals(
                    model, {i: hidden[i - shift] for i in part if step_map[i - P] < 0}
                )
                for i in sure(found, threshold):
                    canvas[i], step_map[i - P] = found[i][1], step
                step += 1
    return canvas[P:], step_map, step


@pytest.mark.parametrize(
    ("sub_len", "aligned", "first_alone"),
    [
        (4, True, False),
        (2, True, True),
        (4, False, False),
        *more((3, True, False), (2, False, True)),
    ],
)
def test_cached_decoding_equals_recomputing_everything(toy_model, sub_len, aligned, first_alone):
    cfg, params = toy_model
    scheduler = SubBlocks(C, sub_len, aligned=aligned, first_alone=first_alone)
    method = DiffusionMethod(scheduler, BlockCausal(C, aligned), rule=Threshold(0.5))
    state = init_state(cfg, method, PROMPTS, gen_len=LENGTHS, prompt_len=11, batch_size=8)
    state = decode(params, cfg, method, state)
    model = Model(params, cfg)
    for b, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        origin = 0 if aligned else len(prompt)
        expected = decode_plainly(model, prompt, length, 0.5, sub_len, origin, first_alone)
        tokens, step_map, steps = expected
        assert state.tokens[b, 11 : 11 + length].tolist() == tokens
        assert state.step_map[b, :length].tolist() == step_map
        assert int(state.num_forwards[b]) == steps


def decode_pipeline(model, prompt, gen_len, threshold, blocks):
    """Several open blocks, the whole canvas recomputed under the block-causal mask."""
    cfg, P, n = model.cfg, len(prompt), len(prompt) + gen_len
    canvas, step_map, step = list(prompt) + [cfg.mask_token_id] * gen_len, [-1] * gen_len, 0
    block = (np.arange(n) - (0 if blocks.aligned else P)) // C
    members = [[i for i in range(P, n) if block[i] == b] for b in range(block[P], block[-1] + 1)]
    first, last = 0, 1  # of the open ones, and behind them
    while first < len(members):
        hidden, _ = model.run(canvas, range(n), allowed=block[:, None] >= block[None])
        todo = [i for b in members[first:last] for i in b if step_map[i - P] < 0]
        found = proposals(model, {i: hidden[i - int(cfg.shifted_logits)] for i in todo})
        for i in sure(found, threshold):
            canvas[i], step_map[i - P] = found[i][1], step
        step += 1
        done = [sum(step_map[i - P] >= 0 for i in b) / len(b) for b in members]
        is_ripe = done[last - 1] >= blocks.open_at
        while first < last and done[first] == 1:
            first += 1
        last = min(max(last + is_ripe, first + 1), first + blocks.max_open, len(members))
    return canvas[P:], step_map, step


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    "blocks",
    [
        MultiBlock(C, 3, 0.3, aligned=True),
        *more(MultiBlock(C, 2, 0.5), MultiBlock(C, 4, 0.0, aligned=True)),
    ],
)
def test_a_pipeline_of_blocks_equals_recomputing_everything(toy_model, blocks):
    cfg, params = toy_model
    method = DiffusionMethod(blocks, BlockCausal(C, blocks.aligned), rule=Threshold(0.7))
    state = init_state(cfg, method, PROMPTS, gen_len=LENGTHS, prompt_len=11, batch_size=8)
    state = decode(params, cfg, method, state)
    model, num_early = Model(params, cfg), 0
    for b, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        tokens, step_map, steps = decode_pipeline(model, prompt, length, 0.7, blocks)
        assert state.tokens[b, 11 : 11 + length].tolist() == tokens
        assert state.step_map[b, :length].tolist() == step_map
        assert int(state.num_forwards[b]) == steps
        place = np.arange(length) + (len(prompt) if blocks.aligned else 0)
        of_block = [np.array(step_map)[place // C == k] for k in np.unique(place // C)]
        num_early += sum(a.max() > b.min() for a, b in itertools.pairwise(of_block))
    assert num_early > 0  # blocks overlapped


def test_only_the_first_round_of_a_block_settles_the_one_before(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(C, aligned=True), BlockCausal(C), rule=Quota(2))
    state = init_state(toy_cfg, method, [[1, 2, 3, 4]], gen_len=12)
    keys, wrote = np.array(state.cache.kv.k), []
    for after in stream(toy_params, toy_cfg, method, state):
        before, keys = keys, np.array(after.cache.kv.k)
        wrote.append(sorted(set(np.nonzero((before != keys).any(axis=(0, 1, 2, 4)))[0] // C)))
    # The prompt; then the block that is done, and the open one with it.
    assert wrote == [[0], [], [1, 2], [], [2, 3], []]


@pytest.mark.exhaustive(every=4)
def test_blocks_of_one_are_autoregressive(toy_cfg, toy_params):
    """Fast-dLLM card, v2: block size 1 is the causal model, token by token."""
    method = DiffusionMethod(FixedBlocks(1, aligned=True), BlockCausal(1))
    state = init_state(toy_cfg, method, PROMPTS[:3], gen_len=6)
    state = decode(toy_params, toy_cfg, method, state)
    assert np.asarray(state.step_map).tolist() == [list(range(6))] * 3
    model = Model(toy_params, toy_cfg)
    for b, prompt in enumerate(PROMPTS[:3]):
        canvas = list(prompt)
        for _ in range(6):
            n = len(canvas) + 1
            seen = [*canvas, toy_cfg.mask_token_id]
            hidden, _ = model.run(seen, range(n), allowed=np.tri(n, dtype=bool))
            z = model.logits(hidden[-1])
            z[toy_cfg.mask_token_id] = -np.inf
            canvas.append(int(z.argmax()))
        assert state.tokens[b, state.prompt_len :].tolist() == canvas[len(prompt) :]


def test_decoding_sees_what_training_saw(toy_cfg, toy_params):
    """The [noisy ; clean] pass gives a noisy block the states that decoding gives it."""
    rng = np.random.default_rng(0)
    clean, L = rng.integers(1, 20, 12), 12
    noisy = np.where(rng.random(L) < 0.6, toy_cfg.mask_token_id, clean)
    mask = pack_mask(jnp.asarray(block_diffusion_mask(L, C))[None])
    both = jnp.asarray(np.concatenate([noisy, clean]))[None]
    window = Window(both, jnp.tile(jnp.arange(L), 2)[None], mask)
    trained = forward(toy_params, toy_cfg, window).hidden
    model = Model(toy_params, toy_cfg)
    block = np.arange(L) // C
    for b in range(3):
        canvas = np.where(block < b, clean, noisy)[: (b + 1) * C]
        allowed = block[: len(canvas), None] >= block[None, : len(canvas)]
        decoded, _ = model.run(canvas, range(len(canvas)), allowed=allowed)
        np.testing.assert_allclose(trained[0, b * C : (b + 1) * C], decoded[-C:], atol=2e-5)


@pytest.mark.parametrize(
    "change",
    [
        dict(scheduler=FixedBlocks(4)),
        dict(scheduler=FixedBlocks(8, aligned=True)),
        dict(scheduler=MultiBlock(4), rule=Threshold(0.9)),
    ],
)
def test_other_blocks_are_refused(toy_cfg, change):
    method = DiffusionMethod(FixedBlocks(C, aligned=True), BlockCausal(C)).replace(**change)
    with pytest.raises(ValueError, match=r"use aligned blocks of 4"):
        init_state(toy_cfg, method, [[1]], gen_len=4)
    from_the_end = method.replace(
        cache=BlockCausal(C, aligned=False), scheduler=FixedBlocks(C, aligned=True)
    )
    with pytest.raises(ValueError, match="use unaligned blocks of 4"):
        init_state(toy_cfg, from_the_end, [[1]], gen_len=4)


def test_what_it_cannot_do_is_refused(toy_cfg):
    method = DiffusionMethod(FixedBlocks(C, aligned=True), BlockCausal(C), reviser=NarrowOut())
    with pytest.raises(ValueError, match="BlockCausal has no shadow"):
        init_state(toy_cfg, method, [[1]], gen_len=4)
