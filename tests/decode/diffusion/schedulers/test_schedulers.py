"""What schedulers promise beyond agreeing with the oracle (tests/decode/diffusion/test_loop.py)."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import (
    AdaBlock,
    DualCache,
    EosBlock,
    FixedBlocks,
    MultiBlock,
    NarrowOut,
    NoCache,
    PrefixCache,
    Prophet,
    Quota,
    SlowFast,
    SubBlocks,
    Threshold,
)
from decode.diffusion.loop import DiffusionMethod, init_state, stream
from decode.diffusion.round import Progress
from tests.lib import batches
from tests.lib.batches import PROMPTS, assert_same
from tests.lib.rounds import make_round
from tests.lib.tiers import more

run = functools.partial(batches.run, gen_len=12)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("cache", [DualCache(), *more(NoCache())])
def test_adablock_that_never_finds_a_delimiter_has_fixed_blocks(toy_cfg, toy_params, cache):
    """AdaBlock card, check 1; 10 positions end inside a block."""
    method = DiffusionMethod(cache=cache, rule=Threshold(0.5))
    fixed = method.replace(scheduler=FixedBlocks(4))
    never = method.replace(scheduler=AdaBlock((3, 5), 4, threshold=float("inf")))
    for gen_len in (12, 10):
        assert_same(
            run(toy_params, toy_cfg, never, gen_len=gen_len),
            run(toy_params, toy_cfg, fixed, gen_len=gen_len),
        )


def test_adablock_at_threshold_zero_still_needs_a_delimiter(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), rule=Threshold(0.5))
    fixed = run(toy_params, toy_cfg, method)
    absent = next(t for t in range(24) if t not in np.unique(fixed.tokens))
    never = method.replace(scheduler=AdaBlock((absent,), 4, threshold=0.0))
    assert_same(run(toy_params, toy_cfg, never), fixed)


def test_adablock_on_delimiters_everywhere_is_left_to_right(toy_cfg, toy_params):
    """Check 2: every token a delimiter and a window of one position."""
    every = tuple(range(toy_cfg.vocab_size))
    method = DiffusionMethod(AdaBlock(every, 4, threshold=0.0, window="progress"))
    state = run(toy_params, toy_cfg, method)
    # Early on the paper's window is one position wide, so the first blocks are of one position.
    assert np.asarray(state.step_map)[:, :4].tolist() == [[0, 1, 2, 3]] * 4


@pytest.mark.parametrize("window", ["budget", "progress"])
def test_adablock_lengths_add_up_and_no_forward_probes(toy_cfg, toy_params, window):
    """Checks 3 and 4: a step per forward, every forward commits."""
    method = DiffusionMethod(
        AdaBlock((1, 2, 3, 5, 8), 4, threshold=0.1, share=0.5, window=window), rule=Threshold(0.5)
    )
    state = run(toy_params, toy_cfg, method)
    assert (np.asarray(state.block_start) - state.prompt_len == 12).all()
    for b in range(4):
        steps = np.unique(state.step_map[b])
        assert steps.tolist() == list(range(int(state.num_forwards[b])))


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("cache", [DualCache(), *more(NoCache())])
def test_one_open_block_is_fixed_blocks(toy_cfg, toy_params, cache):
    method = DiffusionMethod(cache=cache, rule=Threshold(0.5))
    go = functools.partial(run, toy_params, toy_cfg, gen_len=10)
    fixed = go(method.replace(scheduler=FixedBlocks(4)))
    one = go(method.replace(scheduler=MultiBlock(4, max_open=1)))
    assert_same(one, fixed)
    late = go(method.replace(scheduler=MultiBlock(4, max_open=3, open_at=1.0)))
    np.testing.assert_array_equal(late.tokens, fixed.tokens)


@pytest.mark.exhaustive(every=4)
def test_a_pipeline_works_on_several_blocks_and_never_too_many(toy_cfg, toy_params):
    method = DiffusionMethod(MultiBlock(3, max_open=2, open_at=0.3), rule=Threshold(0.5))
    state, spans = init_state(toy_cfg, method, PROMPTS, gen_len=12), []
    for after in stream(toy_params, toy_cfg, method, state):
        spans.append(np.asarray(after.block_end - after.block_start))
    assert max(span.max() for span in spans) == 6
    sequential = run(toy_params, toy_cfg, method.replace(scheduler=FixedBlocks(3)))
    pipelined = run(toy_params, toy_cfg, method)
    assert int(pipelined.num_forwards.sum()) < int(sequential.num_forwards.sum())


def test_blocks_open_and_close_by_hand():
    """Blocks of 4, three open at most, the next one opens at half; a row of 10."""
    blocks = MultiBlock(4, max_open=3, open_at=0.5)

    def advance(decided, start, stop, end=10, blocks=blocks):
        decided = jnp.array([[c == "x" for c in decided]])
        progress = Progress(
            completion=jnp.zeros((1, 12), jnp.int32), decided=decided, prompt_len=jnp.array([3]),
            block_start=jnp.array([start]), block_end=jnp.array([stop]), end=jnp.array([end]),
            is_full=jnp.array([False]),
        )  # fmt: skip
        return tuple(int(x[0]) for x in blocks.advance(progress))

    assert advance("x...........", 0, 4) == (0, 4)
    assert advance("x..x........", 0, 4) == (0, 8)  # exactly half
    assert advance("x..x........", 0, 8) == (0, 8)  # of the last one
    assert advance("x..xxxxx....", 0, 8) == (0, 10)  # the row ends in the third
    assert advance("xxxx........", 0, 4) == (4, 8)
    assert advance("xxxxxxxx....", 0, 8) == (8, 10)  # two at once
    assert advance("xxxxxxxxxx..", 0, 10) == (10, 10)
    assert advance("xxxxx...x...", 4, 10) == (4, 10)
    assert MultiBlock(4, 1, 0.5).window_len(12) == 4

    # Three tokens of the prompt belong to the first block.
    aligned = MultiBlock(4, max_open=3, open_at=0.5, aligned=True)
    here = functools.partial(advance, blocks=aligned)
    assert here("............", 0, 1) == (0, 1)
    assert here("x...........", 0, 1) == (1, 5)
    assert here("xxx.........", 1, 5) == (1, 9)
    assert here("xxxxx.x.....", 1, 9) == (5, 9)
    assert here("xxxxxxxxx...", 1, 9) == (9, 10)
    assert here(".xxxxxxxx...", 0, 9) == (0, 9)  # three blocks are open
    assert (aligned.window_len(12), aligned.window_len(2)) == (12, 8)
    start, prompt_len, end = jnp.array([0, 1, 9]), jnp.array([3, 3, 3]), jnp.array([10, 10, 10])
    assert aligned.open_block(start, end, prompt_len).tolist() == [1, 5, 10]


def test_a_gate_of_one_waits_for_the_block_before(toy_cfg, toy_params):
    method = DiffusionMethod(MultiBlock(4, 3, 0.3, active_at=1.0, gate=1.0), rule=Threshold(0.5))
    fixed = DiffusionMethod(FixedBlocks(4), rule=Threshold(0.5))
    np.testing.assert_array_equal(
        run(toy_params, toy_cfg, method).tokens, run(toy_params, toy_cfg, fixed).tokens
    )


@pytest.mark.parametrize("rule", [Threshold(0.5), *more(Quota(4))])
def test_sub_blocks_of_a_whole_block_are_fixed_blocks(toy_cfg, toy_params, rule):
    method = DiffusionMethod(cache=DualCache(), rule=rule)
    go = functools.partial(run, toy_params, toy_cfg, gen_len=10)
    sub, fixed = (go(method.replace(scheduler=s)) for s in (SubBlocks(4, 4), FixedBlocks(4)))
    assert_same(sub, fixed)


def test_sub_blocks_of_one_are_left_to_right(toy_cfg, toy_params):
    state = run(toy_params, toy_cfg, DiffusionMethod(SubBlocks(4, 1), rule=Threshold(0.0)))
    assert np.asarray(state.step_map).tolist() == [list(range(12))] * 4


def test_sub_blocks_keep_the_block_as_the_unit_of_caching(toy_cfg, toy_params):
    """A refresh opens a block; sub-blocks inside do not ask for one."""
    method = DiffusionMethod(SubBlocks(6, 2), PrefixCache(), rule=Threshold(0.5))
    state, starts = init_state(toy_cfg, method, PROMPTS, gen_len=12), {0}
    P = state.prompt_len
    for after in stream(toy_params, toy_cfg, method, state):
        starts |= {int(start) - P for start in after.block_start}
    assert starts == {0, 6, 12}


def test_slow_fast_explores_then_fills_the_stretch(toy_cfg, toy_params):
    method = DiffusionMethod(SlowFast(None, explore=2, floor=1.0), rule=Threshold(1.0))
    state = init_state(toy_cfg, method, PROMPTS, gen_len=12)
    opened = {state.prompt_len: 0}
    for after in stream(toy_params, toy_cfg, method, state):
        opened.setdefault(int(after.block_start[0]), int(after.row_step[0]))
    rounds = np.diff([*opened.values()])
    assert len(rounds) > 2 and (rounds[:-1] >= 2).all()  # no stretch without a slow phase


@pytest.mark.parametrize(
    ("furthest", "ends"),
    [
        ((4, 5, 8), (8, 8, 5)),  # two that agree settle it; what comes after is not noted
        ((2, 6, 7), (8, 8, 7)),
        ((2, 6, 4), (8, 8, 5)),  # the last two do not agree: between them
        ((0, 0, 0), (8, 8, 1)),  # nothing seen is one position
    ],
)
def test_a_stretch_by_hand(furthest, ends):
    scheduler = SlowFast(None, explore=3, floor=0.5)
    state = scheduler.init(None, 1, 8)
    for step, (reach, expected) in enumerate(zip(furthest, ends, strict=True)):
        confidence = [0.9 if i == reach - 1 else 0.1 for i in range(8)]
        view = make_round(confidence).replace(block_step=jnp.array([step]))
        eligible, end, state = scheduler.focus(view, state)
        assert int(end[0]) == expected
        assert eligible.all()  # also beyond the stretch: the slow phase commits anywhere


def test_a_floor_that_nothing_reaches_advances_one_position_at_a_time(toy_cfg, toy_params):
    method = DiffusionMethod(SlowFast(None, explore=2, floor=1.0), rule=Threshold(1.0))
    state = run(toy_params, toy_cfg, method)
    assert (np.asarray(state.num_forwards) == 12).all()  # one token per step all the same


def test_aligned_blocks_count_from_the_prompt():
    """A prompt of 6 leaves 2 positions of its block of 4."""
    blocks, end = FixedBlocks(4, aligned=True), jnp.array([12, 12, 1])
    prompt_len = jnp.array([6, 8, 6])
    first = blocks.open_block(jnp.zeros(3, jnp.int32), end, prompt_len)
    assert first.tolist() == [2, 4, 1]
    assert blocks.open_block(first, end, prompt_len)[:2].tolist() == [6, 8]


def test_a_block_with_end_of_text_ends_the_row(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), rule=Threshold(0.5))
    used = np.asarray(run(toy_params, toy_cfg, method, gen_len=16).tokens)[0, -16:].tolist()
    cfg = dataclasses.replace(toy_cfg, eos_token_id=max(used, key=used.count))
    full = run(toy_params, cfg, method, gen_len=16)
    short = run(toy_params, cfg, method.replace(stopper=EosBlock()), gen_len=16)
    assert (np.asarray(short.num_forwards) <= full.num_forwards).all()
    for b in range(4):
        decided = np.asarray(short.step_map[b]) >= 0
        assert decided.sum() % 4 == 0
        tokens = np.asarray(short.tokens[b, -16:])[decided]
        assert decided.all() or cfg.eos_token_id in tokens
        assert (tokens == np.asarray(full.tokens[b, -16:])[decided]).all()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DiffusionMethod(AdaBlock((99,))), r"delimiter id 99 must be in \[0, vocab_size=24\)"),
        (DiffusionMethod(AdaBlock(())), "delimiter_ids is empty"),
        (DiffusionMethod(AdaBlock((1,), threshold=-1.0)), "threshold=-1 must be at least 0"),
        (DiffusionMethod(AdaBlock((1,), share=2.0)), r"share=2 must be in"),
        (DiffusionMethod(AdaBlock((1,), window="half")), "window='half' must be 'budget' or"),
        (DiffusionMethod(MultiBlock(open_at=2.0)), r"open_at=2 must be in \[0, 1\]"),
        (DiffusionMethod(MultiBlock(), rule=Quota(4)), "Quota spreads a block"),
        (DiffusionMethod(MultiBlock(), reviser=NarrowOut()), "NarrowOut works on one block"),
        (DiffusionMethod(SubBlocks(8, 9)), r"sub_len=9 must be in \[1, block_len=8\]"),
        (DiffusionMethod(SlowFast(explore=1)), "explore=1 must be at least 2 rounds"),
        (DiffusionMethod(FixedBlocks(None, aligned=True)), "aligned=True needs a block_len"),
        (
            DiffusionMethod(stopper=Prophet(3), cache=DualCache()),
            "Prophet must see the whole canvas, but DualCache recomputes only the block",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(toy_cfg, method, message):
    with pytest.raises(ValueError, match=message):
        init_state(toy_cfg, method, [[1]], gen_len=4)
