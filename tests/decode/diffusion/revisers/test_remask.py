import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import DualCache, Factor, FixedBlocks, Quota, SubBlocks, Threshold
from decode.diffusion.loop import DiffusionMethod
from decode.diffusion.revisers.remask import Remask
from tests.lib import oracle
from tests.lib.batches import LENGTHS, PROMPTS
from tests.lib.oracle import look
from tests.lib.rounds import make_round
from tests.lib.rows import run


def decode_alone(model, prompt, gen_len, block_len, quota_steps, rounds, count, after):
    """ParallelBench's loop: steps of a list, extra ones among them, each masking before it looks.

    The list is laid out by decided positions, which one token per step makes the same.
    """
    mask = model.cfg.mask_token_id
    out, forwards = [mask] * gen_len, 0
    for low in range(0, gen_len, block_len):
        block = range(low, min(low + block_len, gen_len))
        n, recorded = len(block), {}
        sizes = [n // quota_steps + (i < n % quota_steps) for i in range(quota_steps)]
        sizes = [size for size in sizes if size]
        due = int(np.searchsorted(np.cumsum(sizes), max(int(n * after), 1))) + 1
        steps = [(size, False) for size in sizes]
        steps[due:due] = [(count, True)] * rounds
        for size, is_extra in steps:
            if is_extra:
                weakest = sorted(recorded, key=lambda g: (recorded[g], g))[:count]
                size = len(weakest)
                for g in weakest:
                    out[g] = mask
                    del recorded[g]
            token, p = look(model, prompt, out)
            forwards += 1
            for g in sorted((g for g in block if out[g] == mask), key=lambda g: (-p[g], g))[:size]:
                out[g], recorded[g] = int(token[g]), p[g]
    return out, forwards


def rounds_of(reviser, steps, num_open):
    """Drives one row by hand through [(confidence, commits)]; its commits and take-backs."""
    W, out = len(steps[0][0]), []
    state, undecided = reviser.init(None, 1, W), np.ones(W, bool)
    for step, (confidence, commit) in enumerate(steps):
        view = make_round(confidence, eligible=undecided).replace(
            block_step=jnp.array([step]), num_open=jnp.array([num_open])
        )
        commit = np.isin(np.arange(W), commit)
        revision, state = reviser.revise(view, jnp.asarray(commit[None]), state)
        commit, back = np.asarray(revision.commit[0]), np.asarray(revision.take_back[0])
        assert not (commit & ~undecided).any() and not (back & undecided & ~commit).any()
        undecided = undecided & ~commit | back
        out.append((np.flatnonzero(commit).tolist(), np.flatnonzero(back).tolist()))
    return out


def test_rounds_by_hand():
    sure = [0.9, 0.3, 0.8, 0.5]
    again = [0.9, 0.95, 0.4, 0.2]
    steps = [
        (sure, [0, 1]),  # half of it is decided: 1, the least sure, goes back
        (again, [3]),  # an extra round: its surest is committed, 1 again, now at 0.95; 0 goes back
        (again, [3]),  # the second: 0 again
        (again, [3]),  # and on with the rule
        (again, [2]),
    ]
    got = rounds_of(Remask(2, 1, after=0.5), steps, num_open=4)
    assert got == [([0, 1], [1]), ([1], [0]), ([0], []), ([3], []), ([2], [])]


def test_the_last_commit_may_go_back_at_once():
    steps = [([0.9, 0.8], [0]), ([0.9, 0.2], [1]), ([0.9, 0.7], [0]), ([0.5, 0.5], [])]
    got = rounds_of(Remask(1, 1, after=1.0), steps, num_open=2)
    assert got == [([0], []), ([1], [1]), ([1], []), ([], [])]


def test_a_new_block_starts_over():
    reviser = Remask(1, 1, after=1.0)
    state = reviser.init(None, 1, 2)
    view = make_round([0.9, 0.8])
    both = jnp.array([[True, True]])
    for _ in range(2):  # two blocks, each filled by its first round
        revision, state = reviser.revise(view, both, state)
        assert revision.take_back.tolist() == [[False, True]]
        assert revision.commit.tolist() == [[True, True]]


@pytest.mark.parametrize(
    ("quota_steps", "rounds", "count", "after"),
    [(8, 3, 2, 7 / 8), (8, 1, 1, 7 / 8), (4, 2, 3, 1.0), (2, 4, 1, 0.5)],
)
def test_a_ragged_batch_equals_the_public_loop(
    toy_cfg, toy_params, quota_steps, rounds, count, after
):
    """Blocks of 8 and, at the end of a row, 4 or 2: multiples of the steps, or one per step."""
    lengths = [16, 12, 8, 10] if quota_steps != 4 else [16, 12, 8, 16]
    method = DiffusionMethod(
        FixedBlocks(8), rule=Quota(quota_steps), reviser=Remask(rounds, count, after)
    )
    rows = run(toy_params, toy_cfg, method, gen_len=lengths)
    model = oracle.Model(toy_params, toy_cfg)
    for row, prompt, gen_len in zip(rows, PROMPTS, lengths, strict=True):
        expected = decode_alone(model, prompt, gen_len, 8, quota_steps, rounds, count, after)
        assert (row["tokens"], row["num_forwards"]) == expected


def test_it_changes_something(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(8), rule=Quota(2))
    plain = run(toy_params, toy_cfg, method, gen_len=16)
    again = run(toy_params, toy_cfg, method.replace(reviser=Remask(6, 3, 1.0)), gen_len=16)
    assert [r["tokens"] for r in again] != [r["tokens"] for r in plain]
    assert {r["num_forwards"] for r in again} == {4 + 2 * 6}


def test_no_rounds_is_plain_decoding(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), DualCache(), rule=Threshold(0.4))
    plain = run(toy_params, toy_cfg, method, gen_len=LENGTHS)
    method = method.replace(reviser=Remask(0, 2, 0.5))
    assert run(toy_params, toy_cfg, method, gen_len=LENGTHS) == plain


def test_forwards_are_within_their_bound(toy_cfg, toy_params):
    rng = np.random.default_rng(1)
    method = DiffusionMethod(FixedBlocks(4), DualCache(), temperature=0.8)
    for _ in range(3):
        rounds, count = (int(x) for x in rng.integers(1, 5, 2))
        rule = Factor(2 * rng.random())
        point = method.replace(rule=rule, reviser=Remask(rounds, count, rng.random()))
        rows = run(toy_params, toy_cfg, point, gen_len=LENGTHS, seeds=3)
        for b, gen_len in enumerate(LENGTHS):
            blocks = -(-gen_len // 4)
            assert rounds * blocks < rows[b]["num_forwards"] <= gen_len + rounds * blocks
            assert toy_cfg.mask_token_id not in rows[b]["tokens"]


def test_parts_of_blocks_have_a_wider_bound(toy_cfg, toy_params):
    method = DiffusionMethod(SubBlocks(6, 2), rule=Threshold(0.2), reviser=Remask(3, 4))
    for row in run(toy_params, toy_cfg, method, gen_len=12):
        assert row["num_forwards"] <= 12 + 2 * 3 * (1 + 4)
        assert toy_cfg.mask_token_id not in row["tokens"]


def test_bad_values_are_refused(toy_cfg):
    for reviser, message in [
        (Remask(-1), "rounds=-1 must be at least 0"),
        (Remask(1, 0), "count=0 must be at least 1"),
        (Remask(1, 1, 2.0), r"after=2 must be in \[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            reviser.validate(toy_cfg)
