"""BD3-LM's loss against one forward per block in float64, and against decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import (
    BlockCausal,
    CausalContext,
    EntropyThreshold,
    FixedBlocks,
)
from decode.diffusion.loop import DiffusionMethod, decode, init_state
from dlm.models import decoder
from dlm.trainable import Learned
from tests.lib.objectives import (
    Recorder,
    assert_gradient_is_that_of_differences,
    loss_of,
    make_batch,
)
from tests.lib.oracle import Model
from tests.lib.tiers import more
from train.objectives import Context
from train.objectives.block_diffusion import BlockDiffusion
from train.objectives.causal import Causal

P, G, C = 5, 7, 4
L = 12  # P + G in whole blocks


def batch_of(cfg, seed=0, shortest=0):
    """Four rows with prompts of 5, 3, 1 and `shortest` tokens."""
    batch = jax.device_get(make_batch(cfg, completion_len=G, seed=seed))
    start = np.array([0, 2, 4, P - shortest], np.int32)
    batch["prompt"] = np.random.default_rng(seed).integers(0, 20, (4, P)).astype(np.int32)
    batch["prompt"][np.arange(P) < start[:, None]] = cfg.pad_token_id
    return batch | {"prompt_start": start}


@functools.partial(jax.jit, static_argnames=("objective", "cfg", "fake"))
def run(params, batch, key, *, objective, cfg, fake=False):
    """Loss, metrics, predictions, and [noisy ; clean] with its positions."""

    def forward(params, cfg, window, **kwargs):
        return decoder.ForwardOutput(jnp.zeros((*window.tokens.shape, cfg.d_model)), None)

    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch, *([forward] if fake else []))
        said = objective.predict(params, cfg, batch, Context(key))
        loss = None if fake else objective.loss(Learned(params), cfg, batch, Context(key))
    window = recorder.calls[0]
    return loss, said, window.tokens, window.positions


def rows_of(batch, tokens):
    """Per row and noisy copy that and its clean tokens, from the start of the prompt on."""
    for row, start in enumerate(batch["prompt_start"]):
        *copies, clean = (x[: P + G - start] for x in np.split(tokens[row], len(tokens[row]) // L))
        for noisy in copies:
            yield row, P - start, noisy, clean


# ---- The loss ---------------------------------------------------------------------------------


OBJECTIVES = {
    "plain": BlockDiffusion(block_len=C, eps=0.3),
    "complementary": BlockDiffusion(block_len=C, eps=0.2, complementary=True),
    "causal": BlockDiffusion(
        block_len=C, eps=0.2, complementary=True, causal_context=True, next_token=0.7
    ),
}


@pytest.mark.parametrize("name", ["plain", "causal", *more("complementary")])
def test_loss_is_that_of_one_forward_per_block(toy_model, name):
    """Block b is predicted from the clean blocks before it and itself, as masked as it is."""
    cfg, params = toy_model
    batch, model, shift = batch_of(cfg), Model(params, cfg), int(cfg.shifted_logits)
    objective = OBJECTIVES[name]
    num = 1 + objective.complementary
    for seed in range(3):
        (loss, metrics), said, tokens, _ = jax.device_get(
            run(params, batch, jax.random.key(seed), objective=objective, cfg=cfg)
        )
        total, bound, rights = 0.0, 0.0, []
        for row, prompt_len, noisy, clean in rows_of(batch, tokens):
            block = np.arange(len(clean)) // C
            for b in range(block[-1] + 1):
                canvas = np.where(block < b, clean, noisy)[: (b + 1) * C]
                seen = block[: len(canvas)]
                allowed = seen[:, None] >= seen[None]
                if objective.causal_context:
                    allowed &= (seen == b)[:, None] | np.tri(len(canvas), dtype=bool)
                hidden, _ = model.run(canvas, range(len(canvas)), allowed=allowed)
                for i in np.flatnonzero(seen == b):
                    if noisy[i] == cfg.mask_token_id:
                        z, g = model.logits(hidden[i - shift]), i - prompt_len
                        nll = np.log(np.exp(z).sum()) - z[clean[i]]
                        total += said.weight[row, g] * nll
                        counts = g < batch["completion_len"][row] and i > 0
                        bound += counts * nll / said.extra.level[row, g]
                        if counts:
                            rights.append(z.argmax() == clean[i])
        assert total > 0.5
        num_tokens = said.extra.counts.sum()
        if objective.next_token:
            nlls = list(next_token_nlls(model, batch, tokens))
            assert len(nlls) == num_tokens
            np.testing.assert_allclose(metrics["nll_next_token"], np.mean(nlls), rtol=2e-5)
            total += 0.7 * np.mean(nlls)
        np.testing.assert_allclose(loss, total, rtol=2e-5)
        np.testing.assert_allclose(metrics["nll_bound"], bound / num_tokens / num, rtol=2e-5)
        np.testing.assert_allclose(metrics["masked_accuracy"], np.mean(rights), rtol=1e-6)
        assert metrics["loss"] == loss and loss.dtype == jnp.float32


def next_token_nlls(model, batch, tokens):
    """Of each token up to the end of its completion, as a causal model says it."""
    for row, length in enumerate(batch["completion_len"]):
        start = batch["prompt_start"][row]
        clean = tokens[row, -L:][: P + G - start]
        hidden, _ = model.run(clean, range(len(clean)), allowed=np.tri(len(clean), dtype=bool))
        for i in range(max(P - start, 1), P - start + length):
            z = model.logits(hidden[i - 1])
            yield np.log(np.exp(z).sum()) - z[clean[i]]


def test_copies_are_masked_where_the_other_one_is_not(toy_cfg):
    """Every token once, at the level p or 1 - p of its block; the loss is the mean of both."""
    batch, objective = batch_of(toy_cfg), OBJECTIVES["complementary"]
    levels = []
    for seed in range(20):
        key = jax.random.key(seed)
        _, said, tokens, positions = jax.device_get(
            run({}, batch, key, objective=objective, cfg=toy_cfg, fake=True)
        )
        np.testing.assert_array_equal(positions, np.tile(np.arange(L), (4, 3)))
        assert said.extra.is_masked.all()
        np.testing.assert_allclose(said.weight * said.extra.level * 4 * G, 0.5, rtol=1e-6)
        assert said.extra.level.min() >= 0.2 - 1e-6 and said.extra.level.max() <= 0.8 + 1e-6
        rows = list(rows_of(batch, tokens))
        for (row, prompt_len, one, clean), (_, _, other, _) in zip(
            rows[::2], rows[1::2], strict=True
        ):
            first, second = (x[prompt_len:] == toy_cfg.mask_token_id for x in (one, other))
            np.testing.assert_array_equal(first, ~second)
            np.testing.assert_array_equal(one[:prompt_len], clean[:prompt_len])
            p = np.where(first, said.extra.level[row], 1 - said.extra.level[row])
            block = (prompt_len + np.arange(G)) // C
            for b in np.unique(block):
                np.testing.assert_allclose(p[block == b], p[block == b][0], rtol=1e-5)
            levels.append((p.mean(), first.mean()))
    p, share = np.mean(levels, axis=0)
    assert abs(p - 0.5) < 0.05 and abs(share - p) < 0.05


@pytest.mark.parametrize(("progress", "block_len"), [(0.49, 2), (0.5, 4), (1.0, 4)])
def test_shorter_blocks_come_first(toy_dream, progress, block_len):
    cfg, params = toy_dream
    batch, context = batch_of(cfg), Context(jax.random.key(1), progress)
    scheduled, fixed = (
        loss_of(objective, Learned(params), cfg, batch, context)
        for objective in (
            BlockDiffusion(block_len=4, schedule=(2,), eps=0.3),
            BlockDiffusion(block_len=block_len, eps=0.3),
        )
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), scheduled, fixed)


def test_held_out_texts_are_read_from_left_to_right_too(toy_dream):
    """Whether or not that is learned, where the clean copy is causal: as `Causal` does."""
    cfg, params = toy_dream
    batch = batch_of(cfg)

    @jax.jit
    def metrics(params):
        context = Context(jax.random.key(0), 1.0, True)
        objectives = [BlockDiffusion(block_len=C, causal_context=x) for x in (False, True)]
        return [x.loss(Learned(params), cfg, batch, context) for x in (*objectives, Causal())]

    (loss, block), (same, causal), (expected, _) = metrics(params)
    assert "nll_next_token" not in block and loss == block["loss"]
    np.testing.assert_allclose(causal["nll_next_token"], expected, rtol=1e-5)
    assert same == causal["loss"]


def test_prompts_are_shown_and_completions_masked(toy_cfg):
    """Rows start where the prompt does; nothing but completion tokens is masked or scored."""
    batch = batch_of(toy_cfg)
    objective = BlockDiffusion(block_len=C, eps=0.3)
    for seed in range(20):
        key = jax.random.key(seed)
        _, said, tokens, positions = jax.device_get(
            run({}, batch, key, objective=objective, cfg=toy_cfg, fake=True)
        )
        np.testing.assert_array_equal(positions, np.tile(np.arange(L), (4, 2)))
        np.testing.assert_array_equal(said.targets, batch["completion"])
        for row, prompt_len, noisy, clean in rows_of(batch, tokens):
            prompt = batch["prompt"][row, P - prompt_len :]
            np.testing.assert_array_equal(clean, [*prompt, *batch["completion"][row]])
            is_masked = noisy == toy_cfg.mask_token_id
            assert not is_masked[:prompt_len].any()
            np.testing.assert_array_equal(noisy[~is_masked], clean[~is_masked])
            np.testing.assert_array_equal(said.weight[row] > 0, is_masked[prompt_len:])


def test_weights_are_inverse_probabilities_drawn_per_block(toy_cfg):
    batch, num = batch_of(toy_cfg), 300
    objective = BlockDiffusion(block_len=C, eps=0.3)
    weights = []  # of a mean over rows and tokens
    for seed in range(num):
        key = jax.random.key(seed)
        out = run({}, batch, key, objective=objective, cfg=toy_cfg, fake=True)
        weights.append(np.asarray(out[1].weight) * 4 * G)
    weights = np.stack(weights)  # [num, B, G]
    is_masked = weights > 0
    # Every token is masked with probability 0.3 + 0.7 / 2, and with a loss of 1 it costs 1.
    assert (abs(is_masked.mean(axis=0) - 0.65) < 4 * np.sqrt(0.65 * 0.35 / num)).all()
    assert (abs(weights.mean(axis=0) - 1) < 4 * weights.std(axis=0) / np.sqrt(num)).all()
    assert weights.max() < 1 / 0.3 + 1e-5 and weights[is_masked].min() >= 1
    assert weights.max() > 3.2 and weights[is_masked].min() < 1.02
    for row, start in enumerate(batch["prompt_start"]):
        block = (P - start + np.arange(G)) // C
        levels = []
        for b in np.unique(block):
            inside, hit = weights[:, row, block == b], is_masked[:, row, block == b]
            most = inside.max(axis=1)
            np.testing.assert_allclose(inside, np.where(hit, most[:, None], 0), rtol=1e-6)
            levels.append(np.where(most > 0, most, np.nan))
        both = ~np.isnan(levels[0] + levels[1])
        correlation = np.corrcoef(levels[0][both], levels[1][both])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(both.sum())


def test_weight_power(toy_cfg):
    batch, key = batch_of(toy_cfg), jax.random.key(0)
    full, half = (
        np.asarray(run({}, batch, key, objective=objective, cfg=toy_cfg, fake=True)[1].weight)
        for objective in (
            BlockDiffusion(block_len=C, eps=0.3),
            BlockDiffusion(block_len=C, eps=0.3, weight_power=0.5),
        )
    )
    np.testing.assert_allclose((half * 4 * G) ** 2, full * 4 * G, rtol=1e-5)


def test_blocks_of_one_with_shifted_logits_are_the_causal_model(toy_dream):
    """Each token is predicted by the clean one before it, which has seen the clean ones before."""
    cfg, params = toy_dream
    batch = batch_of(cfg, shortest=1) | {"completion_len": np.full(4, G, np.int32)}

    @jax.jit
    def predictions(params):
        context = Context(jax.random.key(0))
        return [
            objective.predict(params, cfg, batch, context)
            for objective in (BlockDiffusion(block_len=1), Causal())
        ]

    ours, causal = predictions(params)
    np.testing.assert_array_equal(ours.targets, causal.targets)
    np.testing.assert_allclose(ours.hidden, causal.hidden, atol=2e-5)


def test_blocks_of_one_see_what_is_before_them(toy_cfg, toy_params):
    """Without a shift: MASK, or the token itself, behind clean tokens."""
    batch, model = batch_of(toy_cfg), Model(toy_params, toy_cfg)
    _, said, tokens, _ = jax.device_get(
        run(
            toy_params,
            batch,
            jax.random.key(0),
            objective=BlockDiffusion(block_len=1, eps=0.3),
            cfg=toy_cfg,
        )
    )
    for row, prompt_len, noisy, clean in rows_of(batch, tokens):
        for i in range(prompt_len, prompt_len + G):
            allowed = np.tri(i + 1, dtype=bool)
            hidden, _ = model.run([*clean[:i], noisy[i]], range(i + 1), allowed=allowed)
            np.testing.assert_allclose(said.hidden[row, i - prompt_len], hidden[-1], atol=2e-5)


# ---- With decoding ----------------------------------------------------------------------------


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    ("cache", "causal_context"), [(CausalContext(C), True), *more((BlockCausal(C), False))]
)
def test_decoding_sees_the_states_of_training(toy_dream, cache, causal_context):
    """A block per forward is decoded; trained on all MASK, the model says just the same of it."""
    cfg, params = toy_dream
    batch = batch_of(cfg, shortest=1)
    prompts = [
        batch["prompt"][row, start:].tolist() for row, start in enumerate(batch["prompt_start"])
    ]
    method = DiffusionMethod(FixedBlocks(C, aligned=True), cache, rule=EntropyThreshold(100.0))
    state = init_state(cfg, method, prompts, gen_len=G, prompt_len=P)
    state = jax.device_get(decode(params, cfg, method, state))
    batch["completion"] = state.tokens[:, P:]
    said, tokens = jax.device_get(
        run(
            params,
            batch,
            jax.random.key(0),
            objective=BlockDiffusion(block_len=C, eps=1 - 1e-6, causal_context=causal_context),
            cfg=cfg,
        )
    )[1:3]
    for row, prompt_len, noisy, _ in rows_of(batch, tokens):
        assert (noisy[prompt_len:] == cfg.mask_token_id).all()
        z = said.hidden[row] @ np.asarray(params["unembed"]).T
        z[:, cfg.mask_token_id] = -np.inf  # never decoded
        assert z.argmax(axis=1).tolist() == batch["completion"][row].tolist()
        log_prob = z.max(axis=1) - np.log(np.exp(z).sum(axis=1))
        np.testing.assert_allclose(log_prob, state.log_prob[row], atol=5e-5)
        first = (prompt_len + np.arange(G)) // C
        assert state.step_map[row].tolist() == (first - first[0]).tolist()


# ---- Gradients and refusals -------------------------------------------------------------------


def test_gradient_against_finite_differences_in_float64(toy_cfg):
    cfg = dataclasses.replace(toy_cfg, shifted_logits=True)
    assert_gradient_is_that_of_differences(
        BlockDiffusion(block_len=C, eps=0.3), cfg, batch_of(cfg), Context(jax.random.key(0))
    )


def test_refusals(toy_cfg):
    cfg = dataclasses.replace(toy_cfg, mask_token_id=None)
    with pytest.raises(ValueError, match="mask_token_id=None"):
        BlockDiffusion().loss(Learned({}), cfg, make_batch(cfg), Context(jax.random.key(0)))
    with pytest.raises(ValueError, match="block_len=0 must be at least 1"):
        BlockDiffusion(block_len=0)
    for eps in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"eps={eps} must be in"):
            BlockDiffusion(eps=eps)
    with pytest.raises(ValueError, match="weight_power=2"):
        BlockDiffusion(weight_power=2.0)
    with pytest.raises(ValueError, match=r"eps=0.5 must be in \(0, 0.5\) with complementary=True"):
        BlockDiffusion(eps=0.5, complementary=True)
    with pytest.raises(ValueError, match=r"schedule=\(4, 0\) must be lengths of at least 1"):
        BlockDiffusion(schedule=(4, 0))
    with pytest.raises(ValueError, match=r"next_token=0.3 needs causal_context=True"):
        BlockDiffusion(next_token=0.3)
