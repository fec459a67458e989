import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import DualCache, EosBlock, FixedBlocks, Threshold
from decode.diffusion.loop import DiffusionMethod
from decode.diffusion.revisers.token_edit import TokenEdit
from tests.lib import oracle
from tests.lib.batches import LENGTHS, PROMPTS
from tests.lib.oracle import look
from tests.lib.rounds import make_round
from tests.lib.rows import run


def decode_alone(model, prompt, gen_len, block_len, tau, tau_edit, max_rounds):
    """The loop of the paper: mask to token above tau, token to token above tau_edit."""
    mask = model.cfg.mask_token_id
    out, forwards = [mask] * gen_len, 0
    for low in range(0, gen_len, block_len):
        block = range(low, min(low + block_len, gen_len))
        post = 0
        while True:
            before = list(out)
            open_ = [g for g in block if before[g] == mask]
            if not open_:
                post += 1
                if post > max_rounds:
                    break
            token, p = look(model, prompt, before)
            forwards += 1
            sure = [g for g in open_ if p[g] >= tau]
            for g in sure or sorted(open_, key=lambda g: (-p[g], g))[:1]:
                out[g] = int(token[g])
            for g in block:
                if g not in open_ and token[g] != before[g] and p[g] > tau_edit:
                    out[g] = int(token[g])
            if not open_ and out == before:
                break
    return out, forwards


def edited_round(step, eligible, confidence, proposal):
    view = make_round(confidence, eligible=eligible)
    return view.replace(
        proposal=jnp.asarray([proposal]), block_step=jnp.array([step])
    )  # `tokens` are 0, 1, 2, ...


def revise(reviser, view, commit, rounds=0):
    revision, state = reviser.revise(view, jnp.asarray([commit]), jnp.array([rounds]))
    assert revision.take_back is None
    return np.flatnonzero(revision.commit[0]).tolist(), bool(revision.hold[0]), int(state[0])


def test_sure_changes_of_older_tokens_are_written():
    # 0: same token; 1: another one, sure; 2: another one at the threshold; 3, 4: MASK.
    eligible = [False, False, False, True, True]
    view = edited_round(2, eligible, [0.9, 0.75, 0.5, 0.9, 0.9], [0, 7, 7, 7, 7])
    only_3 = [False, False, False, True, False]
    assert revise(TokenEdit(0.5), view, only_3) == ([1, 3], False, 0)
    assert revise(TokenEdit(0.0), view, only_3) == ([1, 2, 3], False, 0)
    assert revise(TokenEdit(1.0), view, only_3) == ([3], False, 0)


def test_what_counts_is_the_probability_of_the_proposal():
    view = edited_round(2, [False, True], [0.8, 0.8], [7, 7])
    view = view.replace(confidence=jnp.full((1, 2), -9.0))
    assert revise(TokenEdit(0.5), view, [False, True])[0] == [0, 1]


def test_a_full_block_is_held_until_a_round_changes_nothing_or_the_budget_is_spent():
    fills = edited_round(1, [False, True], [0.9, 0.9], [0, 7])
    full = [False, False]
    changes = edited_round(2, full, [0.9, 0.9], [0, 7])
    settled = edited_round(2, full, [0.9, 0.9], [0, 1])
    assert revise(TokenEdit(0.5, 2), fills, [False, True]) == ([1], True, 0)
    assert revise(TokenEdit(0.5, 0), fills, [False, True]) == ([1], False, 0)
    assert revise(TokenEdit(0.5, 2), changes, full, rounds=0) == ([1], True, 1)
    assert revise(TokenEdit(0.5, 2), changes, full, rounds=1) == ([1], False, 2)
    assert revise(TokenEdit(0.5, 2), changes, full, rounds=2) == ([], False, 3)  # a follow-up
    assert revise(TokenEdit(0.5, 2), settled, full, rounds=0) == ([], False, 1)
    # A new block counts anew.
    fresh = edited_round(0, [True, True], [0.9, 0.9], [7, 7])
    assert revise(TokenEdit(0.5, 2), fresh, [True, True], rounds=2) == ([0, 1], True, 0)


@pytest.mark.parametrize("tau_edit", [0.0, 0.2, 0.5])
@pytest.mark.parametrize(("tau", "max_rounds"), [(0.1, 3), (0.4, 1), (0.4, 16)])
def test_a_ragged_batch_equals_the_plain_loop(toy_cfg, toy_params, tau, tau_edit, max_rounds):
    method = DiffusionMethod(
        FixedBlocks(4), rule=Threshold(tau), reviser=TokenEdit(tau_edit, max_rounds)
    )
    rows = run(toy_params, toy_cfg, method, gen_len=LENGTHS)
    model = oracle.Model(toy_params, toy_cfg)
    for row, prompt, gen_len in zip(rows, PROMPTS, LENGTHS, strict=True):
        expected = decode_alone(model, prompt, gen_len, 4, tau, tau_edit, max_rounds)
        assert (row["tokens"], row["num_forwards"]) == expected
    plain = run(toy_params, toy_cfg, method.replace(reviser=TokenEdit(1.0, 0)), gen_len=LENGTHS)
    assert [r["tokens"] for r in rows] != [r["tokens"] for r in plain]  # there is something to edit


def test_without_edits_it_is_plain_decoding(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), DualCache(), rule=Threshold(0.4))
    plain = run(toy_params, toy_cfg, method, gen_len=LENGTHS)
    method = method.replace(reviser=TokenEdit(1.0, 0))
    assert run(toy_params, toy_cfg, method, gen_len=LENGTHS) == plain
    # With rounds to spare each block gets one, which finds nothing to do.
    checked = run(toy_params, toy_cfg, method.replace(reviser=TokenEdit(1.0, 5)), gen_len=LENGTHS)
    for a, b, gen_len in zip(checked, plain, LENGTHS, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["num_forwards"] == b["num_forwards"] + -(-gen_len // 4)


def test_forwards_are_within_their_bound(toy_cfg, toy_params):
    rng = np.random.default_rng(0)
    method = DiffusionMethod(FixedBlocks(4), DualCache(), stopper=EosBlock(), temperature=0.8)
    for _ in range(3):
        tau, tau_edit, max_rounds = *rng.random(2), int(rng.integers(0, 6))
        point = method.replace(rule=Threshold(tau), reviser=TokenEdit(tau_edit, max_rounds))
        rows = run(toy_params, toy_cfg, point, gen_len=LENGTHS, seeds=3)
        for b, gen_len in enumerate(LENGTHS):
            assert rows[b]["num_forwards"] <= gen_len + max_rounds * -(-gen_len // 4)


def test_bad_values_are_refused(toy_cfg):
    with pytest.raises(ValueError, match=r"threshold=1\.5 must be in \[0, 1\]"):
        TokenEdit(1.5).validate(toy_cfg)
    with pytest.raises(ValueError, match="max_rounds=-1 must be at least 0"):
        TokenEdit(0.5, -1).validate(toy_cfg)
