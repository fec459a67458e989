import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import DualCache, FixedBlocks, Quota, SubBlocks, Threshold
from decode.diffusion.loop import DiffusionMethod
from decode.diffusion.revisers.running_confidence import RunningConfidence
from tests.lib import oracle
from tests.lib.batches import LENGTHS, PROMPTS
from tests.lib.oracle import look
from tests.lib.rounds import make_round
from tests.lib.rows import run


def decode_alone(model, prompt, gen_len, block_len, quota_steps):
    """RCR as published: commit all remaining quotas, then mask all later ones again."""
    mask = model.cfg.mask_token_id
    out, forwards = [mask] * gen_len, 0
    for low in range(0, gen_len, block_len):
        block = range(low, min(low + block_len, gen_len))
        n, recorded = len(block), {}
        quotas = [n // quota_steps + (i < n % quota_steps) for i in range(quota_steps)]
        for i in range(quota_steps):
            token, p = look(model, prompt, out)
            forwards += 1
            order = sorted((g for g in block if out[g] == mask), key=lambda g: (-p[g], g))
            for g in order[: sum(quotas[i:])]:
                out[g], recorded[g] = int(token[g]), p[g]
            for g in sorted(recorded, key=lambda g: (recorded[g], -g))[: sum(quotas[i + 1 :])]:
                out[g] = mask
            if mask not in [out[g] for g in block]:
                break
    return out, forwards


def test_rounds_by_hand():
    reviser = RunningConfidence()
    state, undecided, out = reviser.init(None, 1, 4), np.ones(4, bool), []
    for step, (confidence, commit) in enumerate([
        ([0.9, 0.4, 0.6, 0.3], [0, 2]),  # two may stand: 0 and 2
        ([0.1, 0.8, 0.1, 0.7], [1]),  # three: 0 (0.9), 1 (0.8) and 3 (0.7); 2 (0.6) gives way
        ([0.1, 0.1, 0.2, 0.1], [2]),  # four
    ]):  # fmt: skip
        view = make_round(confidence, eligible=undecided).replace(block_step=jnp.array([step]))
        commit = jnp.asarray(np.isin(np.arange(4), commit)[None])
        revision, state = reviser.revise(view, commit, state)
        assert revision.hold is None
        commit, back = np.asarray(revision.commit[0]), np.asarray(revision.take_back[0])
        undecided = undecided & ~commit | back
        out.append((np.flatnonzero(commit).tolist(), np.flatnonzero(back).tolist()))
    assert out == [([0, 2], []), ([1, 3], [2]), ([2], [])]


def test_ties_keep_the_left():
    view = make_round([0.5, 0.5, 0.5])
    reviser = RunningConfidence()
    state = reviser.init(None, 1, 3)
    revision, state = reviser.revise(view, jnp.array([[False, False, True]]), state)
    assert revision.commit.tolist() == [[True, False, False]]


def test_tokens_of_an_earlier_block_stay():
    """A scheduler may leave decided positions to the next block; their confidences are gone."""
    view = make_round([0.1, 0.9, 0.9], eligible=[False, True, True])
    reviser = RunningConfidence()
    revision, _ = reviser.revise(view, jnp.array([[False, True, False]]), jnp.zeros((1, 3)) - 9)
    assert not revision.take_back.any() and revision.commit.tolist() == [[False, True, False]]


@pytest.mark.parametrize("quota_steps", [1, 2, 3, 4, 9])
def test_a_ragged_batch_equals_the_public_loop(toy_cfg, toy_params, quota_steps):
    lengths = [16, 12, 8, 11]
    method = DiffusionMethod(FixedBlocks(8), rule=Quota(quota_steps), reviser=RunningConfidence())
    rows = run(toy_params, toy_cfg, method, gen_len=lengths)
    plain = run(toy_params, toy_cfg, method.replace(rule=Quota(quota_steps)), gen_len=lengths)
    model = oracle.Model(toy_params, toy_cfg)
    for row, other, prompt, gen_len in zip(rows, plain, PROMPTS, lengths, strict=True):
        expected = decode_alone(model, prompt, gen_len, 8, quota_steps)
        assert (row["tokens"], row["num_forwards"]) == expected
        assert row["num_forwards"] == other["num_forwards"]


def test_it_changes_something(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(None), rule=Quota(5))
    plain = run(toy_params, toy_cfg, method, gen_len=16)
    running = run(toy_params, toy_cfg, method.replace(reviser=RunningConfidence()), gen_len=16)
    assert [r["tokens"] for r in running] != [r["tokens"] for r in plain]


@pytest.mark.exhaustive(every=4)
def test_one_step_is_plain_decoding(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), DualCache(), rule=Quota(1))
    plain = run(toy_params, toy_cfg, method, gen_len=LENGTHS)
    method = method.replace(reviser=RunningConfidence())
    assert run(toy_params, toy_cfg, method, gen_len=LENGTHS) == plain


def test_forwards_are_within_their_bound(toy_cfg, toy_params):
    rng = np.random.default_rng(2)
    method = DiffusionMethod(
        SubBlocks(8, 4), DualCache(), reviser=RunningConfidence(), temperature=0.8
    )
    for _ in range(3):
        point = method.replace(rule=Threshold(rng.random()))
        rows = run(toy_params, toy_cfg, point, gen_len=LENGTHS, seeds=3)
        for b, gen_len in enumerate(LENGTHS):
            assert rows[b]["num_forwards"] <= gen_len
            assert toy_cfg.mask_token_id not in rows[b]["tokens"]
