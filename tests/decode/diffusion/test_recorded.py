import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import Credit, Eotp, FixedBlocks, Quota, Threshold
from decode.diffusion.loop import DiffusionMethod, init_state, stream
from decode.diffusion.recorded import GreedyOracle, Recorded
from tests.lib.batches import LENGTHS, PROMPTS, assert_same, run
from tests.lib.oracle import Model

C, G = 4, 12


def test_recording_changes_nothing_and_notes_every_round(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(C), rule=Threshold(0.5))
    plain = run(toy_params, toy_cfg, method)
    recorded = run(toy_params, toy_cfg, method.replace(confidence=Recorded(G)))
    assert_same(recorded, plain)
    record, P = recorded.components.confidence, plain.prompt_len
    for b, length in enumerate(LENGTHS):
        rounds = int(plain.num_forwards[b])
        for i in range(length):
            step, start = int(plain.step_map[b, i]), i // C * C
            assert int(record.block_start[b, step]) == start
            confidence = record.confidence[b, step, i - start]
            np.testing.assert_allclose(confidence, plain.confidence[b, i], rtol=1e-6)
            assert int(record.proposal[b, step, i - start]) == int(plain.tokens[b, P + i])
            assert bool(record.undecided[b, step, i - start])
            later = record.undecided[b, step + 1 :, i - start]
            later &= record.block_start[b, step + 1 :] == start
            assert not later.any()
        assert not record.confidence[b, rounds:].any()


@pytest.mark.exhaustive(every=4)
def test_rounds_beyond_the_record_are_left_out(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(C), rule=Quota(C))
    whole, short = (
        run(toy_params, toy_cfg, method.replace(confidence=Recorded(n))).components.confidence
        for n in (G, 5)
    )
    for long, cut in zip(jax.tree.leaves(whole), jax.tree.leaves(short), strict=True):
        np.testing.assert_array_equal(long[:, :5], cut)


def decode_greedily(model, prompt, reference, mask):
    """Learn2PD card, section 2, plainly: rounds of (start, confidence, right, undecided)."""
    length, canvas = len(reference), list(prompt) + [mask] * len(reference)
    rounds, P = [], len(prompt)
    for start in range(0, length, C):
        block, before = range(start, min(start + C, length)), None
        while any(canvas[P + i] == mask for i in block):
            hidden, _ = model.run(canvas, range(len(canvas)))
            said, sure = [], []
            for i in block:
                z = model.logits(hidden[P + i])
                z[mask] = -np.inf
                p = np.exp(z - z.max())
                said.append(int(z.argmax()))
                sure.append(p.max() / p.sum())
            right = [token == reference[i] for token, i in zip(said, block, strict=True)]
            undecided = [canvas[P + i] == mask for i in block]
            rounds.append((start, sure, right, undecided))
            for i, good in zip(block, right, strict=True):
                if good or said == before:
                    canvas[P + i] = reference[i]
            before = said
    return rounds


def test_the_oracle_is_the_cards_loop(toy_cfg, toy_params):
    """With answers that the model would not give everywhere, so that it gets stuck, too."""
    rng, model = np.random.default_rng(0), Model(toy_params, toy_cfg)
    method = DiffusionMethod(FixedBlocks(C), rule=Quota(C))
    plain = run(toy_params, toy_cfg, method)
    P = plain.prompt_len
    answers = np.array(plain.tokens[:, P:])
    wrong = rng.random(answers.shape) < 0.3
    answers = np.where(wrong, rng.integers(0, 20, answers.shape), answers).astype(np.int32)
    knowing = method.replace(confidence=Recorded(2 * G), reviser=GreedyOracle(jnp.asarray(answers)))
    state = run(toy_params, toy_cfg, knowing)
    record, stuck = state.components.confidence, 0
    for b, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        assert state.tokens[b, P : P + length].tolist() == answers[b, :length].tolist()
        reference = answers[b, :length].tolist()
        rounds = decode_greedily(model, prompt, reference, toy_cfg.mask_token_id)
        assert int(state.num_forwards[b]) == len(rounds)
        for step, (start, sure, right, undecided) in enumerate(rounds):
            n = len(sure)
            assert int(record.block_start[b, step]) == start
            np.testing.assert_allclose(record.confidence[b, step, :n], sure, rtol=1e-4)
            assert not record.confidence[b, step, n:].any()
            ours = record.proposal[b, step, :n] == answers[b, start : start + n]
            assert ours.tolist() == right
            assert record.undecided[b, step, :n].tolist() == undecided
            stuck += not any(right[i] and undecided[i] for i in range(n))
    assert stuck > 0


def test_what_the_model_would_say_anyway_takes_one_round_per_block(toy_cfg, toy_params):
    """Card, check 3."""
    method = DiffusionMethod(FixedBlocks(C), rule=Threshold(0.0))  # all at once: says it anyway
    said = run(toy_params, toy_cfg, method)
    answers = said.tokens[:, said.prompt_len :]
    state = run(toy_params, toy_cfg, method.replace(rule=Quota(C), reviser=GreedyOracle(answers)))
    assert state.num_forwards.tolist() == [3, 3, 3, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(confidence=Recorded(4, base=Credit())), r"base=Credit\) must be of a measure"),
        (dict(confidence=Recorded(4), stopper=Eotp()), "Recorded needs windows of one block"),
    ],
)
def test_what_cannot_be_recorded_is_refused(toy_cfg, change, message):
    method = DiffusionMethod(FixedBlocks(C)).replace(**change)
    with pytest.raises(ValueError, match=message):
        init_state(toy_cfg, method, [[1]], gen_len=4)


def test_a_record_can_be_streamed(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(C), confidence=Recorded(G), rule=Quota(C))
    state = init_state(toy_cfg, method, PROMPTS, gen_len=4)
    noted = [int((s.components.confidence.confidence[0] > 0).any(axis=-1).sum())
             for s in stream(toy_params, toy_cfg, method, state)]  # fmt: skip
    assert noted == [1, 2, 3, 4]
