"""BD3-LM's loss against one forward per block in float64, and against decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import BlockCausal, EntropyThreshold, FixedBlocks
from decode.diffusion.loop import DiffusionMethod, decode, init_state
from dlm.models import decoder
from dlm.trainable import Learned
from tests.lib.objectives import (
    Recorder,
    assert_gradient_is_that_of_differences,
    make_batch,
)
from tests.lib.oracle import Model
from train.objectives import Context
from train.objectives.block_diffusion import BlockDiffusion
from train.objectives.causal import Causal

P, G, C = 5, 7, 4
L = 12  # P + G in whole blocks


def batch_of(cfg, seed=0):
    """Four rows with prompts of 5, 3, 1 and no tokens, or 4 for a model that needs one."""
    batch = jax.device_get(make_batch(cfg, completion_len=G, seed=seed))
    start = np.array([0, 2, 4, 1 if cfg.shifted_logits else 5], np.int32)
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
    """Per row its noisy and its clean tokens, from the start of the prompt to the last one."""
    for row, start in enumerate(batch["prompt_start"]):
        noisy, clean = np.split(tokens[row], 2)
        yield row, P - start, noisy[: P + G - start], clean[: P + G - start]


# ---- The loss ---------------------------------------------------------------------------------


def test_loss_is_that_of_one_forward_per_block(toy_model):
    """Block b is predicted from the clean blocks before it and itself, as masked as it is."""
    cfg, params = toy_model
    batch, model, shift = batch_of(cfg), Model(params, cfg), int(cfg.shifted_logits)
    objective = BlockDiffusion(block_len=C, eps=0.3)
    for seed in range(3):
        (loss, metrics), said, tokens, _ = jax.device_get(
            run(params, batch, jax.random.key(seed), objective=objective, cfg=cfg)
        )
        total, rights = 0.0, []
        for row, prompt_len, noisy, clean in rows_of(batch, tokens):
            block = np.arange(len(clean)) // C
            for b in range(block[-1] + 1):
                canvas = np.where(block < b, clean, noisy)[: (b + 1) * C]
                seen = block[: len(canvas)]
                allowed = seen[:, None] >= seen[None]
                hidden, _ = model.run(canvas, range(len(canvas)), allowed=allowed)
                for i in np.flatnonzero(seen == b):
                    if noisy[i] == cfg.mask_token_id:
                        z, y = model.logits(hidden[i - shift]), clean[i]
                        nll = np.log(np.exp(z).sum()) - z[y]
                        total += said.weight[row, i - prompt_len] * nll
                        rights.append(z.argmax() == y)
        assert total > 0.5
        np.testing.assert_allclose(loss, total, rtol=2e-5)
        np.testing.assert_allclose(metrics["masked_accuracy"], np.mean(rights), rtol=1e-6)
        assert metrics["loss"] == loss and loss.dtype == jnp.float32


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
    batch = batch_of(cfg) | {"completion_len": np.full(4, G, np.int32)}

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


def test_decoding_sees_the_states_of_training(toy_dream):
    """A block per forward is decoded; trained on all MASK, the model says just the same of it."""
    cfg, params = toy_dream
    batch = batch_of(cfg)
    prompts = [
        batch["prompt"][row, start:].tolist() for row, start in enumerate(batch["prompt_start"])
    ]
    method = DiffusionMethod(
        FixedBlocks(C, aligned=True), BlockCausal(C), rule=EntropyThreshold(100.0)
    )
    state = init_state(cfg, method, prompts, gen_len=G, prompt_len=P)
    state = jax.device_get(decode(params, cfg, method, state))
    batch["completion"] = state.tokens[:, P:]
    said, tokens = jax.device_get(
        run(
            params,
            batch,
            jax.random.key(0),
            objective=BlockDiffusion(block_len=C, eps=1 - 1e-6),
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
    def loss(cfg, prompt_len):
        batch = make_batch(cfg, prompt_len=prompt_len)
        return BlockDiffusion(block_len=C).loss(Learned({}), cfg, batch, Context(jax.random.key(0)))

    with pytest.raises(ValueError, match="mask_token_id=None"):
        loss(dataclasses.replace(toy_cfg, mask_token_id=None), 5)
    with pytest.raises(ValueError, match="prompt_len=0"):
        loss(dataclasses.replace(toy_cfg, shifted_logits=True), 0)
    with pytest.raises(ValueError, match="block_len=0 must be at least 1"):
        BlockDiffusion(block_len=0)
    for eps in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"eps={eps} must be in"):
            BlockDiffusion(eps=eps)
    with pytest.raises(ValueError, match="weight_power=2"):
        BlockDiffusion(weight_power=2.0)
