"""d3LLM's masks, by hand and from the tokens shown, and its loss from dParallel's card."""

import jax
import numpy as np
import pytest

from dlm.trainable import Learned
from tests.lib.certainty import batch_of, by_card, easy, shown
from tests.lib.objectives import (
    assert_gradient_is_that_of_differences,
    loss_and_canvas,
    make_batch,
    mask_and_canvas,
)
from train.objectives import Context
from train.objectives.pseudo_trajectory import PseudoTrajectory


def trajectory_of(cfg, step_map):
    batch = batch_of(cfg, len(step_map[0]))
    return batch | {"step_map": np.array(step_map, np.int32)}


def random_order(cfg, completion_len, seed=0):
    """Four rows, each decided one position per round, two positions of each never."""
    rng = np.random.default_rng(seed)
    order = np.array([rng.permutation(completion_len) for _ in range(4)])
    return trajectory_of(cfg, np.where(order >= completion_len - 2, -1, order))


def masks(objective, cfg, batch, seed, progress=0.0):
    """What is MASK in the two views of each row: [B, G] bool each."""
    context = Context(jax.random.key(seed), progress)
    tokens = jax.device_get(mask_and_canvas(batch, context, objective, cfg))[2]
    return shown(cfg, tokens)


# ---- Which positions are masked ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "by_block"),
    [
        # Shown are floor(0.5 * 4) = 2 of positions 0 to 3 and floor(0.5 * 3) = 1 of 4 to 6.
        (0.5, [["M.M....", ".M.M...", "..MM..."], ["....MM.", "....M.M", ".....MM"]]),
        # floor(0.75 * 4) = 3 and floor(0.75 * 3) = 2: the undecided one is masked, the last one.
        (0.25, [["M......", "...M...", "...M..."], [".....M.", "....M..", "......M"]]),
        (1.0, [["MMMM..."] * 3, ["....MMM"] * 3]),
    ],
)
def test_masks_follow_the_teacher_by_hand(toy_cfg, ratio, by_block):
    batch = trajectory_of(
        toy_cfg,
        [
            [3, 0, 2, 1, 6, -1, 4],
            [0, 9, 0, -1, -1, 8, 9],
            [5, 5, 5, 5, 7, 7, 7],  # the lower position counts as decided first
            [0] * 7,
        ],
    )
    objective = PseudoTrajectory(block_lens=(4,), ratios=(ratio, ratio))
    seen = set()
    for seed in range(8):
        first, second = masks(objective, toy_cfg, batch, seed)
        for row in range(3):
            active = first[row] ^ second[row]
            block = int(active.argmax()) // 4
            assert active.tolist() == [i // 4 == block for i in range(7)]
            # What follows the block is MASK in both views.
            assert (first & second)[row].tolist() == [i // 4 > block for i in range(7)]
            drawn = "".join("M" if m else "." for m in first[row] & active)
            assert drawn == by_block[block][row]
            seen.add((row, block))
    assert len(seen) == 6


def test_ratios_rise_to_the_highest(toy_cfg):
    """One block of ten: the last ceil(10 t) are masked, with t in [lerp, highest)."""
    batch = random_order(toy_cfg, 10)
    objective = PseudoTrajectory(block_lens=(10,), ratios=(0.25, 0.75))
    order = np.where(batch["step_map"] < 0, 10, batch["step_map"])
    for progress, lowest in ((0.0, 0.25), (0.5, 0.5), (1.0, 0.75)):
        counts = []
        for seed in range(60):
            first, second = masks(objective, toy_cfg, batch, seed, progress)
            active = first ^ second
            for row in np.flatnonzero(active.any(axis=1)):
                assert active[row].all()
                num = int(first[row].sum())
                assert set(order[row, first[row]]) <= set(np.sort(order[row])[10 - num :])
                counts.append((row, num))
        nums = np.array([num for _, num in counts])
        assert nums.min() == int(10 * lowest) + 1 and nums.max() == 8
        expected = np.ceil(10 * np.linspace(lowest, 0.75, 10001)).mean()
        assert abs(nums.mean() - expected) < 4 * max(nums.std(), 0.01) / np.sqrt(len(nums))
        if lowest < 0.75:  # every row draws its own
            by_row = [{num for row, num in counts if row == r} for r in range(4)]
            assert all(len(drawn) > 2 for drawn in by_row)
    lone = [
        len(np.unique(masks(objective, toy_cfg, batch, seed)[0].sum(axis=1))) for seed in range(9)
    ]
    assert max(lone) >= 3


@pytest.mark.parametrize(
    ("block_lens", "lengths"),
    [
        ((2, 6), {0.0: 2, 0.2: 2, 0.25: 3, 0.5: 4, 0.99: 5, 1.0: 6}),
        ((2, 4, 8), {0.0: 2, 0.25: 3, 0.5: 4, 0.75: 6, 1.0: 8}),
        ((16, 32), {0.0: 10, 1.0: 10}),  # longer than the completion: all of it
    ],
)
def test_blocks_widen(toy_cfg, block_lens, lengths):
    """Blocks of floor(lerp) positions, the last one what is left, every one of them drawn."""
    batch = random_order(toy_cfg, 10)
    objective = PseudoTrajectory(block_lens=block_lens)
    for progress, length in lengths.items():
        blocks = set()
        for seed in range(12):
            first, second = masks(objective, toy_cfg, batch, seed, progress)
            for active, future in zip(first ^ second, first & second, strict=True):
                if not active.any():
                    assert 10 % length == 0 and not future.any()
                    continue
                low, high = int(active.argmax()), 10 - int(active[::-1].argmax())
                assert active.sum() == high - low and low % length == 0
                assert high == min(low + length, 10)
                assert future.tolist() == [i >= high for i in range(10)]
                blocks.add(low)
        assert blocks == set(range(0, 10, length))


# ---- The loss ---------------------------------------------------------------------------------


def test_loss_has_the_entropy_of_the_first_view_only(toy_dream):
    cfg, params = toy_dream
    params, batch = easy(params), random_order(cfg, 10)
    objective = PseudoTrajectory(block_lens=(4, 6), ratios=(0.5, 0.75), beta=1.5, temperature=0.7)
    both = []
    for seed in range(4):
        loss, metrics, tokens = jax.device_get(
            loss_and_canvas(
                params, batch, Context(jax.random.key(seed), 0.5), objective=objective, cfg=cfg
            )
        )
        for view in np.split(tokens, 2):
            np.testing.assert_array_equal(view[:, :5], batch["prompt"])
            given = view[:, 5:] != cfg.mask_token_id
            np.testing.assert_array_equal(view[:, 5:][given], batch["completion"][given])
        ce, ent, is_right = by_card(params, cfg, batch, tokens, 0.7)
        np.testing.assert_allclose(metrics["cross_entropy"], ce.sum(), rtol=2e-5)
        np.testing.assert_allclose(metrics["entropy"], ent[0], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(loss, ce.sum() + 1.5 * ent[0], rtol=2e-5)
        np.testing.assert_allclose(metrics["masked_accuracy"], is_right, rtol=1e-6)
        both.append(ent)
    assert (np.max(both, axis=0) > 0.005).all()


def test_gradient_against_finite_differences_in_float64(toy_cfg):
    objective = PseudoTrajectory(block_lens=(4, 6), ratios=(0.5, 0.75), beta=1.5)
    assert_gradient_is_that_of_differences(
        objective, toy_cfg, random_order(toy_cfg, 10), Context(jax.random.key(0), 0.5)
    )


# ---- Refusals ---------------------------------------------------------------------------------


def test_batches_without_a_trajectory_are_refused(toy_cfg):
    with pytest.raises(
        ValueError, match=r"has no step_map: train on what `python -m train\.collect\.traj"
    ):
        PseudoTrajectory().loss(
            Learned({}), toy_cfg, make_batch(toy_cfg), Context(jax.random.key(0))
        )
    with pytest.raises(ValueError, match="has no step_map"):
        PseudoTrajectory().predict({}, toy_cfg, make_batch(toy_cfg), Context(jax.random.key(0)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_lens": ()}, r"block_lens=\(\) must have"),
        ({"block_lens": (16, 0)}, "block_len=0 must be at least 1"),
        ({"ratios": (0.5, 0.2)}, "must be two rising numbers"),
        ({"ratios": (0.0, 1.2)}, "must be two rising numbers"),
        ({"ratios": (0.0,)}, "must be two rising numbers"),
        ({"beta": -1.0}, "beta=-1.0 must be at least 0"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PseudoTrajectory(**fields)
