import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm import vocab
from dlm.models import decoder
from tests.lib.jitted import as_one_program
from tests.lib.objectives import (
    Recorder,
    judge,
    loss_and_canvas,
    make_batch,
    mask_and_canvas,
    mixing_forward,
    value,
)
from tests.lib.oracle import Model
from tests.lib.tiers import more
from tests.lib.weights import init_params
from train.losses import weighted_loss
from train.objectives import Context, masked_diffusion
from train.objectives.masked_diffusion import MaskedDiffusion


def test_loss_by_hand():
    # Two rows of two tokens, V = 2. Logits (0, ln 3) give probabilities 1/4 and 3/4.
    z = jnp.array([0.0, np.log(3.0)])
    logits = jnp.stack([jnp.stack([z, z]), jnp.stack([z, z])])
    completion = jnp.array([[0, 1], [1, 1]])
    is_masked = jnp.array([[True, True], [False, True]])
    p = jnp.array([0.5, 0.25])
    loss, metrics = weighted_loss(*judge(logits, completion), is_masked, p)
    row0 = (np.log(4) + np.log(4 / 3)) / 0.5 / 2
    row1 = np.log(4 / 3) / 0.25 / 2
    np.testing.assert_allclose(loss, (row0 + row1) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["masked_accuracy"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["mask_fraction"], 3 / 4)


def test_no_masked_token_gives_zero():
    none = jnp.zeros((2, 3), bool)
    loss, metrics = weighted_loss(jnp.full((2, 3), -1.0), none, none, jnp.ones(2))
    assert loss == 0 and metrics["masked_accuracy"] == 0


@as_one_program
def logits(params, cfg, window):
    return vocab.logits(vocab.head(params), decoder.forward(params, cfg, window).hidden)


@pytest.mark.exhaustive(every=4)
def test_loss_is_that_of_the_masked_canvas(toy_cfg, toy_params, monkeypatch):
    """The whole loss against a plain loop over the tokens that the model was shown."""
    recorder = Recorder(monkeypatch)
    batch = make_batch(toy_cfg)
    objective = MaskedDiffusion(eps=0.1)
    loss, metrics = value(objective, toy_params, toy_cfg, batch, Context(jax.random.key(3)))
    (window,) = recorder.calls
    assert window.attention == "full"
    tokens, z = window.tokens, logits(toy_params, toy_cfg, window)
    log_probs = jax.device_get(jax.nn.log_softmax(z))
    tokens = jax.device_get(tokens)
    t_key, _ = jax.random.split(jax.random.key(3))
    p = 0.9 * masked_diffusion._draw_t(t_key, 4, True) + 0.1
    total = 0.0
    for row in range(4):
        for i in range(6):
            if tokens[row, 5 + i] == toy_cfg.mask_token_id:
                right = batch["completion"][row, i]
                total -= float(log_probs[row, 5 + i, right]) / float(p[row]) / 6 / 4
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    assert metrics["loss"] == loss
    assert loss.dtype == jnp.float32


@pytest.mark.exhaustive(every=4)
def test_prompt_is_never_masked_and_completion_is(toy_cfg, toy_params, monkeypatch):
    def forward(params, cfg, window, **kwargs):
        return decoder.ForwardOutput(jnp.zeros((*window.tokens.shape, cfg.d_model)), None)

    recorder = Recorder(monkeypatch, forward)
    batch = make_batch(toy_cfg, rows=16)
    for seed in range(4):
        value(MaskedDiffusion(), toy_params, toy_cfg, batch, Context(jax.random.key(seed)))
    num_masked = 0
    for window in recorder.calls:
        tokens = window.tokens
        np.testing.assert_array_equal(tokens[:, :5], batch["prompt"])
        is_masked = tokens[:, 5:] == toy_cfg.mask_token_id
        unmasked = jnp.where(is_masked, batch["completion"], tokens[:, 5:])
        np.testing.assert_array_equal(unmasked, batch["completion"])
        num_masked += int(is_masked.sum())
        # EOS padding is masked like any other token.
        assert is_masked[batch["completion"] == toy_cfg.eos_token_id].any()
        np.testing.assert_array_equal(window.range[:, 0], batch["prompt_start"])
        first = np.asarray(batch["prompt_start"])
        np.testing.assert_array_equal(window.positions[np.arange(16), first], 0)
    assert 0.3 < num_masked / (4 * 16 * 6) < 0.7


@pytest.mark.parametrize("stratified", [False, True])
def test_weights_are_unbiased(stratified):
    """With a loss of 1 per token, masked or not, the expected loss is 1."""

    def one(key):
        t_key, mask_key = jax.random.split(key)
        p = 0.9 * masked_diffusion._draw_t(t_key, 8, stratified) + 0.1
        is_masked = jax.random.uniform(mask_key, (8, 4)) < p[:, None]
        # Two equal logits: every token costs ln 2.
        return weighted_loss(jnp.full((8, 4), -jnp.log(2.0)), is_masked, is_masked, p)[0]

    losses = jax.vmap(one)(jax.random.split(jax.random.key(0), 4096)) / np.log(2)
    error = losses.std() / np.sqrt(4096)
    assert abs(losses.mean() - 1) < 4 * error
    assert error < 0.01


def test_as_many_tokens_are_masked_as_their_weights_say():
    corrupt = jax.jit(MaskedDiffusion(eps=0.1)._corrupt, static_argnums=0)
    is_masked, p = (np.asarray(x, float) for x in corrupt((64, 4000), jax.random.key(0)))
    assert (np.abs(is_masked.mean(axis=1) - p) < 4.5 * np.sqrt(p * (1 - p) / 4000)).all()
    np.testing.assert_allclose(np.sort(p), 0.1 + 0.9 * np.arange(0.5, 64) / 64, atol=0.01)


def test_stratified_levels_are_uniform_and_spread():
    keys = jax.random.split(jax.random.key(0), 2000)
    t = jax.vmap(lambda key: masked_diffusion._draw_t(key, 8, True))(keys)
    assert ((t >= 0) & (t < 1)).all()
    np.testing.assert_allclose(jnp.diff(jnp.sort(t, axis=1), axis=1), 1 / 8, atol=1e-6)
    for row in (0, 5):
        counts = np.histogram(t[:, row], bins=10, range=(0, 1))[0]
        chi_square = ((counts - 200) ** 2 / 200).sum()
        assert chi_square < 27.9  # 99.9 % of chi-square with 9 degrees of freedom


@pytest.mark.exhaustive(every=4)
def test_empty_prompt_is_pre_training(toy_cfg, toy_params, monkeypatch):
    """Without a prompt every token may be masked, and the divisor is all tokens (card, Sec. 2)."""
    recorder = Recorder(monkeypatch)
    batch = make_batch(toy_cfg, prompt_len=0, completion_len=8)
    loss, _ = value(MaskedDiffusion(), toy_params, toy_cfg, batch, Context(jax.random.key(1)))
    (window,) = recorder.calls
    tokens = window.tokens
    assert tokens.shape == (4, 8)
    y = batch["completion"]
    z = logits(toy_params, toy_cfg, window)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], axis=-1)[..., 0]
    t_key, _ = jax.random.split(jax.random.key(1))
    p = (1 - 1e-3) * masked_diffusion._draw_t(t_key, 4, True) + 1e-3
    is_masked = tokens == toy_cfg.mask_token_id
    expected = (jnp.where(is_masked, nll, 0) / p[:, None]).sum() / (4 * 8)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_padding_does_not_matter(toy_cfg, toy_params):
    """Two more pads on the left: the same masks are drawn, so the same loss."""
    batch = make_batch(toy_cfg)
    wider = dict(batch)
    pads = jnp.full((4, 2), toy_cfg.pad_token_id, jnp.int32)
    wider["prompt"] = jnp.concatenate([pads, batch["prompt"]], axis=1)
    wider["prompt_start"] = batch["prompt_start"] + 2
    key = jax.random.key(0)
    losses = [
        value(MaskedDiffusion(), toy_params, toy_cfg, b, Context(key))[0] for b in (batch, wider)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_shifted_logits_are_read_one_earlier(toy_cfg, toy_params, monkeypatch):
    recorder = Recorder(monkeypatch)
    batch = make_batch(toy_cfg)
    shifted = dataclasses.replace(toy_cfg, shifted_logits=True)
    loss, _ = value(MaskedDiffusion(), toy_params, shifted, batch, Context(jax.random.key(0)))
    (window,) = recorder.calls
    tokens = window.tokens
    hidden = decoder.forward(toy_params, toy_cfg, window).hidden[:, 4:-1]
    t_key, _ = jax.random.split(jax.random.key(0))
    p = (1 - 1e-3) * masked_diffusion._draw_t(t_key, 4, True) + 1e-3
    is_masked = tokens[:, 5:] == toy_cfg.mask_token_id
    logits = vocab.logits(vocab.head(toy_params), hidden)
    expected, _ = weighted_loss(*judge(logits, batch["completion"]), is_masked, p)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_refusals(toy_cfg, toy_params):
    batch = make_batch(toy_cfg)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="mask_token_id=None"):
        cfg = dataclasses.replace(toy_cfg, mask_token_id=None)
        value(MaskedDiffusion(), toy_params, cfg, batch, Context(key))
    with pytest.raises(ValueError, match="prompt_len=0"):
        cfg = dataclasses.replace(toy_cfg, shifted_logits=True)
        value(MaskedDiffusion(), toy_params, cfg, make_batch(toy_cfg, prompt_len=0), Context(key))
    with pytest.raises(ValueError, match="eps=0"):
        MaskedDiffusion(eps=0.0)


@pytest.mark.exhaustive(every=4)
def test_loss_gradient_against_finite_differences_in_float64():
    with jax.enable_x64(True):
        logits = jax.random.normal(jax.random.key(0), (2, 3, 5), jnp.float64)
        completion = jnp.array([[0, 4, 2], [1, 1, 3]])
        is_masked = jnp.array([[True, False, True], [False, True, True]])
        p = jnp.array([0.3, 0.8])

        def loss(z):
            return weighted_loss(*judge(z, completion), is_masked, p)[0]

        gradient = np.asarray(jax.grad(loss)(logits))
        steps = 1e-6 * jnp.eye(logits.size).reshape(-1, *logits.shape)
        differences = jax.vmap(lambda step: loss(logits + step) - loss(logits - step))(steps)
        np.testing.assert_allclose(gradient.ravel(), differences / 2e-6, atol=1e-9)
        assert (gradient[~np.asarray(is_masked)] == 0).all()


@pytest.mark.exhaustive(every=4)
def test_whole_gradient_along_random_directions_in_float64(toy_cfg):
    """Norms are float32 in every model, so differences are taken over a step that allows for it."""
    with jax.enable_x64(True):
        cfg = dataclasses.replace(toy_cfg, dtype="float64")
        params = init_params(jax.random.key(0), cfg)
        batch = make_batch(cfg)

        @jax.jit
        def loss(params):
            return value(MaskedDiffusion(), params, cfg, batch, Context(jax.random.key(1)))[0]

        gradient = jax.jit(jax.grad(loss))(params)
        leaves, tree = jax.tree.flatten(params)
        rng = np.random.default_rng(0)
        for i, leaf in enumerate(leaves):
            direction = rng.normal(size=leaf.shape)
            step = 1e-3 * direction / np.linalg.norm(direction)
            up, down = (
                loss(tree.unflatten([*leaves[:i], leaf + sign * step, *leaves[i + 1 :]]))
                for sign in (1, -1)
            )
            slope = np.vdot(jax.tree.leaves(gradient)[i], direction) / np.linalg.norm(direction)
            np.testing.assert_allclose((up - down) / 2e-3, slope, rtol=2e-2, atol=2e-3)


@pytest.mark.exhaustive(every=4)
def test_recomputing_activations_changes_nothing(toy_cfg, toy_params):
    batch, key = make_batch(toy_cfg), jax.random.key(1)
    gradients = [
        jax.jit(jax.grad(lambda p, o=o: value(o, p, toy_cfg, batch, Context(key))[0]))(toy_params)
        for o in (MaskedDiffusion(), MaskedDiffusion(remat=True))
    ]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_weight_power_zero_counts_every_masked_token_alike(toy_cfg, toy_params):
    batch, context = make_batch(toy_cfg), Context(jax.random.key(1))
    published, flat = (
        value(MaskedDiffusion(eps=0.1, weight_power=power), toy_params, toy_cfg, batch, context)[0]
        for power in (1.0, 0.0)
    )
    assert published > flat > 0
    with pytest.raises(ValueError, match="weight_power=2"):
        MaskedDiffusion(weight_power=2.0)


# ---- From causal to full attention ------------------------------------------------------------


@pytest.fixture(scope="module")
def anneal(toy_cfg):
    """Gives, for a progress and a seed, what attends to what [6, 35, 35] and what is masked."""
    objective = MaskedDiffusion(anneal=0.5)
    batch = jax.device_get(make_batch(toy_cfg, rows=6, completion_len=30))

    def draw(progress, seed):
        context = Context(jax.random.key(seed), progress)
        bits, window_range, tokens = jax.device_get(
            mask_and_canvas(batch, context, objective, toy_cfg)
        )
        np.testing.assert_array_equal(window_range[:, 0], batch["prompt_start"])
        np.testing.assert_array_equal(window_range[:, 1], 35)
        key = np.arange(35)
        words = bits[..., key // 32]
        is_open = (words >> (key % 32).astype(np.uint32)) & 1 == 1
        return is_open, tokens[:, 5:] == toy_cfg.mask_token_id

    return draw


EARLIER = np.tri(35, dtype=bool)  # a position sees itself and what is before it


def test_annealed_attention_starts_causal_and_ends_full(anneal):
    for seed in range(3):
        assert (anneal(0.0, seed)[0] == EARLIER).all()
        for progress in (0.5, 0.7, 1.0):
            assert anneal(progress, seed)[0].all()


@pytest.mark.parametrize("progress", [0.1, 0.4])
def test_annealing_opens_each_later_pair_with_its_probability(anneal, progress):
    draws = np.stack([anneal(progress, seed)[0] for seed in range(20)])  # [steps, B, T, T]
    assert draws[:, :, EARLIER].all()
    is_open = draws[:, :, ~EARLIER]
    share = progress / 0.5
    deviation = np.sqrt(share * (1 - share))
    assert abs(is_open.mean() - share) < 4 * deviation / np.sqrt(is_open.size)
    # Every pair on its own, in every row and step: none is always open, no two rows agree.
    assert abs(is_open.mean(axis=(0, 1)) - share).max() < 5 * deviation / np.sqrt(20 * 6)
    agree = is_open[:, 0] == is_open[:, 1]
    assert abs(agree.mean() - share**2 - (1 - share) ** 2) < 2 / np.sqrt(agree.size)


def test_annealing_and_masking_are_independent(anneal):
    """What is open says nothing about what is masked: they share no random numbers."""
    draws = [anneal(0.25, seed) for seed in range(20)]
    is_masked = np.stack([masked.ravel() for _, masked in draws])
    num = is_masked.shape[1]
    first = np.stack([is_open.ravel()[:num] for is_open, _ in draws])
    is_drawn = np.broadcast_to(~EARLIER, (6, 35, 35)).ravel()[:num]
    pairs = np.corrcoef(is_masked[:, is_drawn].ravel(), first[:, is_drawn].ravel())
    assert abs(pairs[0, 1]) < 4 / np.sqrt(20 * is_drawn.sum())


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_the_annealed_loss_is_that_of_a_causal_and_of_a_full_model(toy_cfg, toy_params, progress):
    """Against the plain model in float64, one row at a time; every masked token counts the same."""
    objective = MaskedDiffusion(anneal=0.5, weight_power=0.0)
    batch = make_batch(toy_cfg)
    loss, _, tokens = jax.device_get(
        loss_and_canvas(
            toy_params,
            batch,
            Context(jax.random.key(0), progress),
            objective=objective,
            cfg=toy_cfg,
        )
    )
    model, total = Model(toy_params, toy_cfg), 0.0
    for row, start in enumerate(np.asarray(batch["prompt_start"])):
        n = 11 - start
        allowed = np.tri(n, dtype=bool) if progress == 0 else None
        z = model.logits(model.run(tokens[row, start:], range(n), allowed=allowed)[0])
        for i in np.flatnonzero(tokens[row, 5:] == toy_cfg.mask_token_id):
            right = batch["completion"][row, i]
            total += np.log(np.exp(z[5 - start + i]).sum()) - z[5 - start + i, right]
    np.testing.assert_allclose(loss, total / (4 * 6), rtol=1e-5)


def test_without_annealing_attention_is_full(toy_cfg, monkeypatch):
    recorder = Recorder(monkeypatch, mixing_forward)
    params = {"embed": jnp.zeros((toy_cfg.vocab_size, toy_cfg.d_model))}
    context = Context(jax.random.key(0))
    jax.eval_shape(lambda: MaskedDiffusion().predict(params, toy_cfg, make_batch(toy_cfg), context))
    assert recorder.calls[0].attention == "full"
    for anneal in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"anneal={anneal} must be in"):
            MaskedDiffusion(anneal=anneal)


@pytest.mark.parametrize("stratified", [True, *more(False)])
@pytest.mark.parametrize("weight_power", [0.0, 1.0])
def test_the_bound_is_reported_whatever_the_weights(toy_cfg, toy_params, weight_power, stratified):
    """Per key it is the published loss; on average, for a model that knows nothing, ln V."""
    batch = make_batch(toy_cfg)
    objective = MaskedDiffusion(eps=0.05, weight_power=weight_power, stratified=stratified)
    published = dataclasses.replace(objective, weight_power=1.0)
    context = Context(jax.random.key(1))
    bound = value(objective, toy_params, toy_cfg, batch, context)[1]["nll_bound"]
    loss = value(published, toy_params, toy_cfg, batch, context)[0]
    np.testing.assert_allclose(bound, loss, rtol=1e-6)

    knows_nothing = {**toy_params, "unembed": jnp.zeros_like(toy_params["unembed"])}

    @jax.jit
    @jax.vmap
    def bounds(key):
        return value(objective, knows_nothing, toy_cfg, batch, Context(key))[1]["nll_bound"]

    values = np.asarray(bounds(jax.random.split(jax.random.key(0), 1024)))
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean() - np.log(toy_cfg.vocab_size)) < 4 * error < 0.3
