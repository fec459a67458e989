"""What the model sees where nothing is decided; and the sampler of canvases of noise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import (
    Annealed,
    BlockCausal,
    DualCache,
    FixedBlocks,
    Quota,
    Renoise,
    Smoothing,
    Threshold,
    TokenBan,
    UniformNoise,
)
from decode.diffusion.loop import DiffusionMethod, init_state
from tests.lib import batches
from tests.lib.batches import PROMPTS
from tests.lib.oracle import Model
from tests.lib.rounds import make_round

run = functools.partial(batches.run, gen_len=12)

CANVAS = DiffusionMethod(
    FixedBlocks(6),
    confidence=Annealed(steps=12),
    reviser=Renoise(budget=0.5, max_mean_entropy=0.3, steps=12),
    inputs=UniformNoise(),
)


@pytest.mark.exhaustive(every=4)
def test_smoothing_without_weight_is_plain_decoding(toy_cfg, toy_params):
    for cache in (DualCache(),):
        method = DiffusionMethod(FixedBlocks(4), cache, rule=Threshold(0.5))
        plain = run(toy_params, toy_cfg, method)
        smooth = run(toy_params, toy_cfg, method.replace(inputs=Smoothing(0.0, 0.0, 0.0)))
        np.testing.assert_array_equal(smooth.tokens, plain.tokens)
        np.testing.assert_array_equal(smooth.num_forwards, plain.num_forwards)


def test_smoothing_mixes_in_what_was_expected(toy_cfg, toy_params):
    """Against the float64 model, the mixtures being extra rows of its embedding table."""
    method = DiffusionMethod(
        FixedBlocks(4), rule=Quota(4), inputs=Smoothing(0.3, 0.1, 0.45), constraint=TokenBan()
    )
    state = run(toy_params, toy_cfg, method, [PROMPTS[0]], gen_len=8)
    model, P, V = Model(toy_params, toy_cfg), 3, toy_cfg.vocab_size
    table = model.params["embed"]
    canvas, step_map, step = [*PROMPTS[0], *[toy_cfg.mask_token_id] * 8], [-1] * 8, 0
    for low in (0, 4):
        expected = None
        for block_step in range(4):
            seen, extra = list(canvas), []
            weight = min(0.3 + 0.1 * (block_step - 1), 0.45)
            for g in range(low, low + 4):
                if step_map[g] < 0 and expected is not None:
                    extra.append((1 - weight) * table[toy_cfg.mask_token_id] + weight * expected[g])
                    seen[P + g] = V + len(extra) - 1
            model.params["embed"] = np.concatenate([table, np.array(extra).reshape(-1, 16)])
            hidden, _ = model.run(seen, range(len(seen)))
            z = model.logits(hidden[P:])
            z[:, toy_cfg.mask_token_id] = -np.inf
            p = np.exp(z - z.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            expected = p @ table
            left = [g for g in range(low, low + 4) if step_map[g] < 0]
            best = left[int(p[left].max(-1).argmax())]
            canvas[P + best], step_map[best], step = int(z[best].argmax()), step, step + 1
    assert state.tokens[0].tolist() == canvas and state.step_map[0].tolist() == step_map


@pytest.mark.exhaustive(every=4)
def test_smoothing_a_row_is_the_row_alone(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), DualCache(), rule=Threshold(0.5), inputs=Smoothing())
    together = run(toy_params, toy_cfg, method, batch_size=8)
    alone = run(toy_params, toy_cfg, method, [PROMPTS[1]])
    assert alone.tokens[0, -12:].tolist() == together.tokens[1, -12:].tolist()
    assert int(alone.num_forwards[0]) == int(together.num_forwards[1])


def test_noise_is_uniform_and_drawn_anew(toy_cfg):
    key = jax.random.bits(jax.random.key(0), (64, 100, 2), jnp.uint32)
    tokens, undecided = jnp.full((64, 100), 3), jnp.ones((64, 100), bool).at[:, 0].set(False)
    seen = np.asarray(UniformNoise().see(toy_cfg, tokens, undecided, key))
    assert (seen[:, 0] == 3).all()
    counts = np.bincount(seen[:, 1:].ravel(), minlength=24)
    expected = 64 * 99 / 24
    assert ((counts - expected) ** 2 / expected).sum() < 60  # 23 degrees of freedom


def test_the_canvas_sampler_ends_by_agreement_or_by_its_limit(toy_cfg, toy_params):
    state = run(toy_params, toy_cfg, CANVAS)
    assert (np.asarray(state.num_forwards) <= 2 * 12).all()  # two blocks
    assert bool(state.has_stopped.all()) and (np.asarray(state.step_map) >= 0).all()
    limited = CANVAS.replace(reviser=Renoise(budget=0.0, max_mean_entropy=0.0, steps=3))
    state = run(toy_params, toy_cfg, limited)
    assert (np.asarray(state.num_forwards) == 6).all()


def test_a_round_of_the_canvas_sampler_by_hand():
    """Kept while the entropy before is within the budget; the rest is noise; ends in agreement."""
    entropy = [0.3, 0.05, 0.04, 0.2]  # sorted: 2, 1, 3, 0; before them: 0, 0.04, 0.09, 0.29
    view = make_round([0.5] * 4, eligible=[True, False, True, True], entropy=entropy)
    view = view.replace(block_step=jnp.array([3]), proposal=jnp.array([[7, 7, 7, 7]]))
    before = jnp.array([[0, 1, 2, 9]])  # the arg-maxes are 0, 1, 2, 3

    def revise(budget, limit, steps=9, before=before):
        out, best = Renoise(budget, limit, steps).revise(view, view.eligible, before)
        assert best.tolist() == [[0, 1, 2, 3]]
        where = lambda mask: np.flatnonzero(mask[0]).tolist()
        return where(out.commit), where(out.take_back), bool(out.hold[0]), out.proposal.tolist()[0]

    assert revise(0.1, 0.0) == ([1, 2, 3], [0], True, [7] * 4)
    assert revise(0.04, 0.0) == ([1, 2], [0, 3], True, [7] * 4)
    assert revise(0.0, 0.0) == ([2], [0, 1, 3], True, [7] * 4)
    # Sure enough on average (0.1475), but position 3 has changed its mind:
    assert revise(0.04, 0.2)[2] is True
    agreed = jnp.array([[0, 1, 2, 3]])
    assert revise(0.04, 0.2, before=agreed) == ([0, 1, 2, 3], [], False, [0, 1, 2, 3])
    assert revise(0.04, 0.14, before=agreed)[2] is True
    assert revise(0.04, 0.0, steps=4) == ([0, 1, 2, 3], [], False, [0, 1, 2, 3])  # the last round


@pytest.mark.exhaustive(every=4)
def test_a_canvas_is_the_canvas_alone_and_seeds_differ(toy_cfg, toy_params):
    together = run(toy_params, toy_cfg, CANVAS, seeds=[7, 8, 9, 10], batch_size=8)
    alone = run(toy_params, toy_cfg, CANVAS, [PROMPTS[1]], seeds=[8])
    assert alone.tokens[0, -12:].tolist() == together.tokens[1, -12:].tolist()
    assert int(alone.num_forwards[0]) == int(together.num_forwards[1])
    again = run(toy_params, toy_cfg, CANVAS, [PROMPTS[1]], seeds=[9])
    assert again.tokens[0, -12:].tolist() != alone.tokens[0, -12:].tolist()


def test_models_without_mask_are_sampled_from_noise(toy_cfg, toy_params):
    cfg = dataclasses.replace(toy_cfg, mask_token_id=None)
    state = run(toy_params, cfg, CANVAS)
    assert bool(state.has_stopped.all())
    with pytest.raises(ValueError, match=r"take inputs that show noise"):
        init_state(cfg, DiffusionMethod(), [[1]], gen_len=4)


def test_annealed_samples_follow_their_temperature(toy_cfg, toy_params):
    """One position, first and last round of two: softmax(z / first), softmax(z / last)."""
    n, cfg = 2048, toy_cfg
    for first in (0.5, 2.0):
        method = DiffusionMethod(
            FixedBlocks(1), confidence=Annealed(first, 1.0, steps=2), rule=Threshold(0.0)
        )
        state = run(toy_params, cfg, method, [[3, 1]] * n, gen_len=1, seeds=list(range(n)))
        model = Model(toy_params, cfg)
        z = model.logits(model.run([3, 1, cfg.mask_token_id], range(3))[0][-1]) / first
        z[cfg.mask_token_id] = -np.inf
        p = np.exp(z - z.max())
        p /= p.sum()
        counts = np.bincount(np.asarray(state.tokens[:, -1]), minlength=len(p))
        large = p * n >= 5
        assert ((counts - p * n)[large] ** 2 / (p * n)[large]).sum() < 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(inputs=Smoothing(start=2.0)), r"start=2 must be in \[0, 1\]"),
        (dict(inputs=UniformNoise(-1.0)), r"self_condition=-1 must be in \[0, 1\]"),
        (dict(inputs=Smoothing(), lookahead=2), "Smoothing does not allow"),
        (dict(confidence=Annealed(0.0)), "first=0 must be above 0"),
        (dict(confidence=Annealed(), temperature=1.0), "Annealed sets the temperature itself"),
        (dict(reviser=Renoise(steps=0)), "steps=0 must be at least 1 rounds"),
        (
            dict(
                scheduler=FixedBlocks(4, aligned=True), cache=BlockCausal(4), inputs=UniformNoise()
            ),
            "BlockCausal shows MASK",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(toy_cfg, change, message):
    with pytest.raises(ValueError, match=message):
        init_state(toy_cfg, DiffusionMethod(**change), [[1]], gen_len=4)
