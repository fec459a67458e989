"""dParallel's loss against its method card, computed in float64 from the tokens shown."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import EntropyThreshold, FixedBlocks
from decode.diffusion.loop import DiffusionMethod, decode, init_state
from dlm.models import decoder
from dlm.trainable import Learned
from tests.lib.certainty import P, batch_of, by_card, easy, shown
from tests.lib.models import dream_toy
from tests.lib.objectives import (
    assert_gradient_is_that_of_differences,
    loss_and_canvas,
    make_batch,
)
from tests.lib.oracle import Model
from tests.lib.weights import init_params
from train import step as step_lib
from train.config import OptimConfig
from train.objectives import Context, Predictions
from train.objectives.certainty_forcing import (
    CertaintyForcing,
    certainty_loss,
    draw_block,
    predict_views,
)

# ---- The loss ---------------------------------------------------------------------------------


def test_loss_by_hand(toy_cfg, monkeypatch):
    """Two rows, logits given: blocks [1, 4) and [0, 2) of five positions, each read in its view."""
    a = np.log([1.0, 3.0, 4.0])  # 1/8, 3/8, 1/2; at T = 1/2 1/26, 9/26, 16/26
    b = np.log([2.0, 1.0, 1.0])  # 1/2, 1/4, 1/4; at T = 1/2 4/6, 1/6, 1/6
    no = np.array([90.0, 0.0, -90.0])  # must not be read
    table = np.array(
        [
            [no, no, no, a, a, no, no],  # row 0, first view: positions 1 and 2
            [no, no, no, no, no, no, no],  # row 1, first view: nothing
            [no, no, no, no, no, b, no],  # row 0, second view: position 3
            [no, no, b, a, no, no, no],  # row 1, second view: positions 0 and 1
        ]
    )
    canvas = []

    def forward(params, cfg, window, **kwargs):
        canvas.append(window.tokens)
        return decoder.ForwardOutput(jnp.asarray(table, jnp.float32), None)

    monkeypatch.setattr(decoder, "forward", forward)
    batch = {
        "prompt": np.array([[7, 8], [9, 9]], np.int32),
        "prompt_start": np.array([0, 0], np.int32),
        "completion": np.array([[0, 2, 1, 0, 1], [1, 2, 0, 0, 0]], np.int32),
    }
    params = {"unembed": jnp.eye(3)}
    is_masked = jnp.array([[True, True, False], [False, False, True]])

    @jax.jit
    def run(start, stop):
        said = predict_views(params, toy_cfg, batch, start, stop, is_masked, remat=False)
        return *certainty_loss(jnp.eye(3), said, said.extra, beta=3.0, temperature=0.5), *canvas

    loss, metrics, *canvas = run(jnp.array([1, 0]), jnp.array([4, 2]))
    m = toy_cfg.mask_token_id
    np.testing.assert_array_equal(
        canvas[0],
        [
            [7, 8, 0, m, m, 0, m],
            [9, 9, 1, 2, m, m, m],
            [7, 8, 0, 2, 1, m, m],
            [9, 9, m, m, m, m, m],
        ],
    )
    assert len(canvas) == 1
    # Row 0: `a` says 2, right at position 1 and wrong at position 2 (y = 1); `b` is right at 3.
    # Row 1: `b` is wrong at position 0 (y = 1), `a` right at 1.
    entropy_a = np.log(26) - (9 * np.log(9) + 16 * np.log(16)) / 26
    entropy_b = np.log(6) - 4 * np.log(4) / 6
    ce_1 = ((np.log(2) + np.log(8 / 3)) / 2 + 0) / 2
    ce_2 = (np.log(2) + (np.log(4) + np.log(2)) / 2) / 2
    ent_1 = (entropy_a + 0) / 2
    ent_2 = (entropy_b + entropy_a) / 2
    np.testing.assert_allclose(metrics["cross_entropy"], ce_1 + ce_2, rtol=1e-6)
    np.testing.assert_allclose(metrics["entropy"], ent_1 + ent_2, rtol=1e-6)
    np.testing.assert_allclose(loss, ce_1 + ce_2 + 3 * (ent_1 + ent_2), rtol=1e-6)
    np.testing.assert_allclose(metrics["masked_accuracy"], 3 / 5, rtol=1e-6)
    assert metrics["loss"] == loss and loss.dtype == jnp.float32


@pytest.mark.parametrize(
    ("is_dream", "block_len", "completion_len"), [(False, 4, 10), (True, 4, 8), (True, None, 6)]
)
def test_loss_is_that_of_the_card(toy_cfg, toy_params, is_dream, block_len, completion_len):
    """The last block is a part of one, nothing, or all there is; logits are shifted or not."""
    cfg, params = dream_toy() if is_dream else (toy_cfg, toy_params)
    params, batch = easy(params), batch_of(cfg, completion_len)
    objective = CertaintyForcing(block_len=block_len, beta=1.5, temperature=0.7, eps=0.2)
    starts, rights, entropies = set(), [], []
    for seed in range(4):
        loss, metrics, tokens = jax.device_get(
            loss_and_canvas(
                params, batch, Context(jax.random.key(seed)), objective=objective, cfg=cfg
            )
        )
        ce, ent, is_right = by_card(params, cfg, batch, tokens, 0.7)
        np.testing.assert_allclose(metrics["cross_entropy"], ce.sum(), rtol=2e-5)
        np.testing.assert_allclose(metrics["entropy"], ent.sum(), rtol=2e-5)
        np.testing.assert_allclose(loss, ce.sum() + 1.5 * ent.sum(), rtol=2e-5)
        np.testing.assert_allclose(metrics["masked_accuracy"], is_right, rtol=1e-6)
        first, second = shown(cfg, tokens)
        starts |= {tuple(np.flatnonzero(row)[:1]) for row in first ^ second}
        rights.append(is_right)
        entropies.append(ent)
    assert 0 < np.mean(rights) < 1 and (np.max(entropies, axis=0) > 0.02).all()
    if block_len is None:
        assert (first ^ second).all()
    else:
        # Eight positions are two blocks and an empty one.
        assert starts == ({(0,), (4,), (8,)} if completion_len == 10 else {(0,), (4,), ()})


def test_all_masked_without_entropy_is_plain_cross_entropy(toy_cfg, toy_params):
    """Check 2 of the card: beta = 0, q = 1."""
    params, batch = easy(toy_params), batch_of(toy_cfg, 10)
    objective = CertaintyForcing(block_len=4, beta=0.0, eps=1.0)
    loss, _, tokens = jax.device_get(
        loss_and_canvas(params, batch, Context(jax.random.key(1)), objective=objective, cfg=toy_cfg)
    )
    first, second = shown(toy_cfg, tokens)
    model, losses = Model(params, toy_cfg), []
    for row, start in enumerate(batch["prompt_start"]):
        # Everything from the block on is MASK; the second view shows the block, and scores nothing.
        low = int(first[row].argmax())
        high = min(low + 4, 10)
        assert first[row].tolist() == [i >= low for i in range(10)]
        assert second[row].tolist() == [i >= high for i in range(10)]
        seen = [*batch["prompt"][row, start:], *batch["completion"][row, :low]]
        seen += [toy_cfg.mask_token_id] * (10 - low)
        z = model.logits(model.run(seen, range(len(seen)))[0])[P - start :]
        right = z[np.arange(low, high), batch["completion"][row, low:high]]
        losses.append((np.log(np.exp(z[low:high]).sum(-1)) - right).mean())
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


# ---- What is shown ----------------------------------------------------------------------------


def test_views_are_complements_of_one_block(toy_cfg, toy_params):
    """Check 1 of the card, and that every row draws its own block and its own masks."""
    params, batch = easy(toy_params), batch_of(toy_cfg, 10)
    objective = CertaintyForcing(block_len=4, beta=1.5, temperature=0.7, eps=0.2)
    lows, shares, agree = [], [], []
    for seed in range(100):
        _, _, tokens = jax.device_get(
            loss_and_canvas(
                params, batch, Context(jax.random.key(seed)), objective=objective, cfg=toy_cfg
            )
        )
        for view in np.split(tokens, 2):
            np.testing.assert_array_equal(view[:, :P], batch["prompt"])
            is_masked = view[:, P:] == toy_cfg.mask_token_id
            np.testing.assert_array_equal(view[:, P:][~is_masked], batch["completion"][~is_masked])
        first, second = shown(toy_cfg, tokens)
        active = first ^ second
        for row in range(4):
            (inside,) = np.flatnonzero(active[row])[None]
            low, high = inside[0], inside[-1] + 1
            assert low % 4 == 0 and high == min(low + 4, 10) and len(inside) == high - low
            assert (first & second)[row].tolist() == [i >= high for i in range(10)]
        lows.append(active.argmax(axis=1))
        shares.append(first[active])
        if len({*lows[-1]}) == 1:
            agree.append(len(np.unique(first, axis=0)))
    lows, in_first = np.array(lows), np.concatenate(shares)
    # q = 0.8 / 2 + 0.2
    assert abs(in_first.mean() - 0.6) < 4 * np.sqrt(0.6 * 0.4 / len(in_first))
    for row in range(4):
        counts = np.bincount(lows[:, row] // 4, minlength=3)
        assert ((counts - 100 / 3) ** 2 / (100 / 3)).sum() < 13.8  # 99.9 % of 2 degrees of freedom
        for other in range(row):
            same = (lows[:, row] == lows[:, other]).mean()
            assert abs(same - 1 / 3) < 4 * np.sqrt(2 / 9 / 100)
    assert not agree or max(agree) > 1


def test_blocks_are_uniform_and_the_last_is_what_is_left():
    low, high = jax.device_get(draw_block(jax.random.key(0), 3000, 10, 4))
    assert {*zip(low.tolist(), high.tolist(), strict=True)} == {(0, 4), (4, 8), (8, 10)}
    counts = np.bincount(low // 4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 13.8  # 99.9 % of 2 degrees of freedom
    low, high = jax.device_get(draw_block(jax.random.key(0), 3000, 8, 4))
    assert {*zip(low.tolist(), high.tolist(), strict=True)} == {(0, 4), (4, 8), (8, 8)}
    low, high = jax.device_get(draw_block(jax.random.key(0), 3000, 6, 32))
    assert (low == 0).all() and (high == 6).all()


# ---- Gradients --------------------------------------------------------------------------------


def test_what_is_wrong_gets_no_gradient_from_the_entropy():
    """Check 3 of the card: neither analytically nor by differences; what is right gets some."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logits, head = rng.normal(size=(2, 3, 5)), np.eye(5)
        best = logits.argmax(-1)
        targets = np.where(rng.random((2, 3)) < 0.5, best, (best + 1) % 5).astype(np.int32)
        in_view = np.array([[[1, 1, 0], [0, 1, 1]], [[0, 0, 1], [1, 0, 0]]], bool)
        is_right = best == targets
        assert 1 < is_right.sum() < 5

        @jax.jit
        def entropy(hidden):
            weight = jnp.ones((2, 3))
            said = Predictions(hidden, jnp.asarray(targets), weight)
            return certainty_loss(head, said, in_view, 2.0, 0.5)[1]["entropy"]

        gradient = np.asarray(jax.jit(jax.grad(entropy))(logits))
        assert (gradient[~is_right] == 0).all()
        assert (np.abs(gradient[is_right]).max(axis=-1) > 1e-3).all()
        for index in np.ndindex(logits.shape):
            step = np.zeros_like(logits)
            step[index] = 1e-5
            difference = (entropy(logits + step) - entropy(logits - step)) / 2e-5
            np.testing.assert_allclose(gradient[index], difference, atol=1e-8)


def test_gradient_against_finite_differences_in_float64(toy_cfg):
    cfg = dataclasses.replace(toy_cfg, shifted_logits=True)
    objective = CertaintyForcing(block_len=4, beta=1.5, temperature=0.7)
    assert_gradient_is_that_of_differences(
        objective, cfg, batch_of(cfg, 10), Context(jax.random.key(2))
    )


# ---- Learning ---------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_one_sample_is_learned_by_heart_and_decoded_a_block_per_forward(toy_cfg):
    """Check 5 of the card."""
    prompt, completion = [3, 1, 2], [5, 0, 7, 7, 2, 9, 4, 1]
    rows = 4  # of the same sample: each draws its own block
    batch = {
        "prompt": np.tile(np.int32(prompt), (rows, 1)),
        "prompt_start": np.zeros(rows, np.int32),
        "completion": np.tile(np.int32(completion), (rows, 1)),
    }
    optim = OptimConfig(learning_rate=2e-2, decay_steps=250, warmup_steps=5, end_factor=0.3)
    step = functools.partial(
        step_lib.train_step, cfg=toy_cfg, objective=CertaintyForcing(block_len=4), optim=optim
    )

    @jax.jit
    def train(params):
        state = step_lib.init_state(params, optim=optim)
        key = jax.random.key(1)
        return jax.lax.fori_loop(0, 250, lambda _, state: step(state, batch, key)[0], state).params

    params = train(init_params(jax.random.key(0), toy_cfg))
    model = Model(params, toy_cfg)
    for low in (0, 4):
        seen = prompt + completion[:low] + [toy_cfg.mask_token_id] * (8 - low)
        z = model.logits(model.run(seen, range(11))[0])[3 + low : 7 + low]
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        assert (-(p * np.log(p + 1e-12)).sum(-1)).max() < 0.01
    method = DiffusionMethod(FixedBlocks(4), rule=EntropyThreshold(0.01))
    state = decode(params, toy_cfg, method, init_state(toy_cfg, method, [prompt], gen_len=8))
    assert state.tokens[0, 3:].tolist() == completion
    assert int(state.num_forwards[0]) == 2
    assert state.step_map[0].tolist() == [0] * 4 + [1] * 4


# ---- Refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_len": 0}, "block_len=0 must be at least 1, or None"),
        ({"beta": -1.0}, "beta=-1.0 must be at least 0"),
        ({"beta": float("nan")}, "beta=nan must be at least 0"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"eps": 1.5}, "eps=1.5 must be in"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CertaintyForcing(**fields)


def test_models_that_cannot_be_trained_so_are_refused(toy_cfg):
    def loss(cfg, prompt_len):
        batch = make_batch(cfg, prompt_len=prompt_len)
        return CertaintyForcing().loss(Learned({}), cfg, batch, Context(jax.random.key(0)))

    with pytest.raises(ValueError, match="mask_token_id=None"):
        jax.eval_shape(lambda: loss(dataclasses.replace(toy_cfg, mask_token_id=None), 5))
    with pytest.raises(ValueError, match="prompt_len=0"):
        jax.eval_shape(lambda: loss(dataclasses.replace(toy_cfg, shifted_logits=True), 0))
