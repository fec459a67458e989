"""PS-KD against its method card: targets, their gradient, and where the teacher comes from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm import vocab
from dlm.params import ParamSpec
from dlm.trainable import Learned, Trainable
from tests.lib import toys
from tests.lib.certainty import batch_of, by_card, easy, shown
from tests.lib.models import spread
from tests.lib.objectives import (
    Recorder,
    assert_gradient_is_that_of_differences,
    make_batch,
)
from tests.lib.oracle import Model
from tests.lib.runs import toy_config
from tests.lib.weights import init_params
from train import loop
from train import step as step_lib
from train.config import ConfigError, OptimConfig
from train.losses import CHUNK, soft_cross_entropy
from train.objectives import Context, Predictions, TokenObjective
from train.objectives.causal import Causal
from train.objectives.certainty_forcing import CertaintyForcing
from train.objectives.masked_diffusion import MaskedDiffusion
from train.objectives.ps_kd import PsKd

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(TokenObjective):
    """Cross-entropy of logits that are themselves the parameters."""

    def predict(self, params, cfg, batch, context):
        return Predictions(params["logits"], batch["completion"], batch["weight"])

    def score(self, params, said):
        log_prob = vocab.score(vocab.head(params), said.hidden, said.targets).log_prob
        loss = -(said.weight * log_prob).sum()
        return loss, {"loss": loss}


def table(logits):
    """Parameters of `Table`, whose vocabulary is as large as the logits are long."""
    logits = np.asarray(logits, np.float32)
    return {"logits": logits, "unembed": np.eye(logits.shape[-1], dtype=np.float32)}


@dataclasses.dataclass(frozen=True)
class TableLogits(Trainable):
    """Trains the logits of a table of [2, 3] tokens."""

    def specs(self, cfg):
        return {"logits": ParamSpec((2, 3, 7), (None, None, None))}

    def attach(self, cfg, frozen, own):
        return Learned({**own, "unembed": jnp.eye(7)})


def random_table(seed):
    """Parameters for [2, 3] tokens of seven, a teacher's, and a batch."""
    rng = np.random.default_rng(seed)
    batch = {
        "completion": rng.integers(0, 7, (2, 3)).astype(np.int32),
        "weight": rng.uniform(0.1, 1.0, (2, 3)).astype(np.float32),
    }
    return *(table(2 * rng.normal(size=(2, 3, 7))) for _ in range(2)), batch


def softmax(z):
    p = np.exp(np.asarray(z, np.float64) - np.max(z, axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def run_table(params, teacher, batch, *, alpha, progress):
    """Loss, metrics, and gradients of the logits and of the teacher's."""

    def loss(logits, theirs):
        learned = Learned({**params, "logits": logits}, None, {**teacher, "logits": theirs})
        return PsKd(of=Table(), alpha=alpha).loss(learned, None, batch, Context(KEY, progress))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, metrics), gradients = run(params["logits"], teacher["logits"])
    return value, metrics, *gradients


# ---- Targets ----------------------------------------------------------------------------------


def test_loss_by_hand():
    """alpha_s = 0.8 / 4 = 0.2. The model says 1/4, 3/4, the teacher 1/2, 1/2, of token 0."""
    params, teacher = table([[np.log([1.0, 3.0])]]), table([[[0.0, 0.0]]])
    batch = {"completion": np.array([[0]]), "weight": np.array([[2.0]], np.float32)}
    loss, metrics, _, _ = run_table(params, teacher, batch, alpha=0.8, progress=0.25)
    # The target is 0.8 (1, 0) + 0.2 (1/2, 1/2) = (0.9, 0.1).
    expected = 2 * (0.9 * np.log(4) + 0.1 * np.log(4 / 3))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics["loss"] == loss and loss.dtype == jnp.float32
    soft = 0.5 * np.log(4) + 0.5 * np.log(4 / 3)
    np.testing.assert_allclose(metrics["soft_cross_entropy"], soft, rtol=1e-6)


@pytest.mark.parametrize(("alpha", "progress"), [(1.0, 1.0), (0.6, 0.5), (0.5, 0.0)])
def test_targets_are_distributions(alpha, progress):
    """The gradient of a logit is weight (p - target), from which the target can be read."""
    params, teacher, batch = random_table(1)
    _, _, gradient, to_teacher = run_table(params, teacher, batch, alpha=alpha, progress=progress)
    target = softmax(params["logits"]) - gradient / batch["weight"][..., None]
    np.testing.assert_allclose(target.sum(axis=-1), 1, rtol=1e-6)
    assert target.min() > -1e-6
    share = alpha * progress
    expected = (1 - share) * np.eye(7)[batch["completion"]] + share * softmax(teacher["logits"])
    np.testing.assert_allclose(target, expected, atol=1e-6)
    assert (np.asarray(to_teacher) == 0).all()


def test_alpha_zero_is_plain_cross_entropy_bit_for_bit():
    params, teacher, batch = random_table(2)
    loss, _, gradient, _ = run_table(params, teacher, batch, alpha=0.0, progress=1.0)
    plain, plain_gradient = jax.jit(
        jax.value_and_grad(
            lambda z: Table().loss(Learned({**params, "logits": z}), None, batch, Context(KEY))[0]
        )
    )(params["logits"])
    assert loss == plain
    np.testing.assert_array_equal(gradient, plain_gradient)


def test_nothing_scored_is_not_nan():
    params, teacher, batch = random_table(3)
    batch["weight"] *= 0
    loss, metrics, *_ = run_table(params, teacher, batch, alpha=0.5, progress=1.0)
    assert loss == 0 and metrics["soft_cross_entropy"] == 0


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, CHUNK), (3, 5), (2, CHUNK // 2 + 9), (2, CHUNK), (5, CHUNK - 3)]
)
def test_soft_cross_entropy_of_many_rows(shape):
    rng = np.random.default_rng(0)
    ours, theirs = (rng.normal(size=(*shape, 4)).astype(np.float32) for _ in range(2))
    heads = rng.normal(size=(2, 9, 4)).astype(np.float32)

    @jax.jit
    def run(hidden, weight):
        soft = soft_cross_entropy(heads[0], hidden, heads[1], theirs)
        return (soft * weight).sum(), soft

    weight = rng.normal(size=shape).astype(np.float32)
    gradient, soft = jax.jit(jax.grad(run, has_aux=True))(ours, weight)
    z, target = ours.astype(np.float64) @ heads[0].T, softmax(theirs @ heads[1].T)
    expected = np.log(np.exp(z).sum(-1)) - (target * z).sum(-1)
    assert soft.shape == shape and soft.dtype == jnp.float32
    np.testing.assert_allclose(soft, expected, rtol=2e-5)
    expected = weight[..., None] * ((softmax(z) - target) @ heads[0])
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-5)


# ---- Over the objectives ----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("of", "cfg"))
def run_model(params, teacher, batch, progress, *, of, cfg):
    """With alpha 1, so that the share of the teacher is the progress."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        context = Context(jax.random.key(1), progress)
        learned = Learned(params, beside=teacher)
        loss, metrics = PsKd(of=of, alpha=1.0).loss(learned, cfg, batch, context)
    return loss, metrics, [window.tokens for window in recorder.calls]


@pytest.fixture(scope="module")
def teacher(toy_cfg):
    return easy(spread(init_params(jax.random.key(7), toy_cfg)))


def rows_of(params, teacher, cfg, batch, tokens, causal=False):
    """Per row of `tokens` [., T]: -log p and the cross-entropy under the teacher, [., T, V]."""
    for row, start in enumerate(batch["prompt_start"]):
        n = tokens.shape[1] - start
        allowed = np.tri(n, dtype=bool) if causal else None
        nll = []
        for weights in (params, teacher):
            model = Model(weights, cfg)
            z = model.logits(model.run(tokens[row, start:], range(n), allowed=allowed)[0])
            nll.append(np.log(np.exp(z).sum(-1, keepdims=True)) - z)
        soft = (np.exp(-nll[1]) * nll[0]).sum(-1)
        pad = lambda x, start=start: np.pad(x, [(start, 0)] + [(0, 0)] * (x.ndim - 1))
        yield pad(nll[0]), pad(soft)


def check(of, params, teacher, cfg, batch, expected):
    """The loss at two shares of the teacher; `expected(tokens)` gives it at 0 and at 1."""
    for progress in (0.0, 0.25):
        loss, _, canvases = jax.device_get(
            run_model(params, teacher, batch, progress, of=of, cfg=cfg)
        )
        for tokens in canvases[1:]:  # the teacher sees what the model sees
            np.testing.assert_array_equal(tokens, canvases[0])
        hard, soft = expected(canvases[0])
        np.testing.assert_allclose(loss, hard + progress * (soft - hard), rtol=2e-5)


def test_over_masked_diffusion(toy_cfg, toy_params, teacher):
    params, batch = easy(toy_params), batch_of(toy_cfg, 6)

    def expected(tokens):
        hard = soft = 0.0
        for row, (nll, under) in enumerate(rows_of(params, teacher, toy_cfg, batch, tokens)):
            for i in np.flatnonzero(tokens[row, 5:] == toy_cfg.mask_token_id):
                hard += nll[5 + i, batch["completion"][row, i]] / (4 * 6)
                soft += under[5 + i] / (4 * 6)
        return hard, soft

    of = MaskedDiffusion(weight_power=0.0)  # every masked token counts the same
    check(of, params, teacher, toy_cfg, batch, expected)


def test_over_causal(toy_cfg, toy_params, teacher):
    params, batch = easy(toy_params), batch_of(toy_cfg, 6)
    batch["completion_len"] = np.array([6, 2, 4, 3], np.int32)

    def expected(tokens):
        hard, soft = [], []
        rows = rows_of(params, teacher, toy_cfg, batch, tokens, causal=True)
        for row, (nll, under) in enumerate(rows):
            for i in range(int(batch["completion_len"][row])):
                if 5 + i > batch["prompt_start"][row]:
                    hard.append(nll[4 + i, batch["completion"][row, i]])
                    soft.append(under[4 + i])
        return np.mean(hard), np.mean(soft)

    check(Causal(), params, teacher, toy_cfg, batch, expected)


@pytest.mark.exhaustive(every=4)
def test_over_certainty_forcing(toy_cfg, toy_params, teacher):
    """Cross-entropies are softened, the entropy stays."""
    params, batch = easy(toy_params), batch_of(toy_cfg, 10)

    def expected(tokens):
        ce, ent, _ = by_card(params, toy_cfg, batch, tokens, 0.5)
        first, second = shown(toy_cfg, tokens)
        soft = 0.0
        for view, scored in zip(
            np.split(tokens, 2), (first & ~second, second & ~first), strict=True
        ):
            for row, (_, under) in enumerate(rows_of(params, teacher, toy_cfg, batch, view)):
                if scored[row].any():
                    soft += under[5:][scored[row]].mean() / 4
        entropy = 2 * ent.sum()
        return ce.sum() + entropy, soft + entropy

    check(CertaintyForcing(block_len=4), params, teacher, toy_cfg, batch, expected)


@pytest.mark.exhaustive(every=4)
def test_without_a_difference_there_is_no_gradient(toy_cfg, toy_params):
    """Card: the teacher says what the model says, alpha = 1. At progress 0 it is the plain loss."""
    batch = make_batch(toy_cfg)

    def loss(params, objective, progress, teacher):
        learned = Learned(params, beside=teacher)
        return objective.loss(learned, toy_cfg, batch, Context(KEY, progress))[0]

    softened = PsKd(of=MaskedDiffusion(), alpha=1.0)
    run = jax.jit(jax.value_and_grad(loss), static_argnames="objective")
    norm = lambda tree: np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(tree)))
    _, none = run(toy_params, softened, 1.0, toy_params)
    value, gradient = run(toy_params, softened, 0.0, toy_params)
    assert norm(none) < 2e-6 * norm(gradient)
    plain = jax.jit(loss, static_argnames="objective")
    assert value == plain(toy_params, MaskedDiffusion(), 0.0, None)


@pytest.mark.exhaustive(every=4)
def test_gradient_against_finite_differences_in_float64(toy_cfg):
    rng = np.random.default_rng(1)
    teacher = {name: rng.normal(size=(toy_cfg.vocab_size, 6)) for name in ("embed", "unembed")}
    assert_gradient_is_that_of_differences(
        PsKd(of=CertaintyForcing(block_len=4, beta=0.5), alpha=0.8),
        toy_cfg,
        batch_of(toy_cfg, 10),
        Context(jax.random.key(2), 0.5),
        teacher,
    )


# ---- In the loop ------------------------------------------------------------------------------


def test_the_teacher_is_the_moving_average_of_the_steps_before(toy_cfg):
    """The share of the teacher grows with the steps, and validation is at the end of it."""
    params, _, batch = random_table(4)
    optim = OptimConfig(learning_rate=0.3, decay_steps=8, ema_decay=0.9)
    objective = PsKd(of=Table(), alpha=0.5)
    state = step_lib.init_state({"logits": jnp.asarray(params["logits"])}, optim=optim)
    static = {"cfg": toy_cfg, "objective": objective, "trainable": TableLogits()}
    step = jax.jit(functools.partial(step_lib.train_step, optim=optim, **static))
    cross = lambda target, p: -(target * np.log(p)).sum(-1)
    weight = batch["weight"]
    law = lambda own: softmax(own["logits"])

    for i in range(5):
        p, before = law(state.params), law(state.ema)
        hard = (weight * cross(np.eye(7)[batch["completion"]], p)).sum()
        soft = (weight * cross(before, p)).sum()
        state, metrics = step(state, batch, KEY)
        share = 0.5 * i / 8
        np.testing.assert_allclose(metrics["loss"], (1 - share) * hard + share * soft, rtol=1e-5)
        np.testing.assert_allclose(metrics["soft_cross_entropy"], soft / weight.sum(), rtol=1e-5)
    assert np.abs(before - p).max() > 0.02
    p = law(state.ema)
    metrics = jax.jit(functools.partial(step_lib.valid_step, **static))(state.ema, batch, KEY)
    entropy = (weight * cross(p, p)).sum()
    hard = (weight * cross(np.eye(7)[batch["completion"]], p)).sum()
    said = metrics["soft_cross_entropy"]
    np.testing.assert_allclose(said, entropy / weight.sum(), atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], (hard + entropy) / 2, rtol=1e-5)


def test_without_a_moving_average_it_is_refused(tmp_path):
    spec = {
        "make": "train.objectives.ps_kd:PsKd",
        "of": {"make": "train.objectives.masked_diffusion:MaskedDiffusion"},
    }
    with pytest.raises(ConfigError, match=r"optim\.ema_decay=0 must be positive"):
        loop.run(toy_config(train__objective=spec), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_objectives_from_settings():
    spec = {"make": "train.objectives.causal:Causal", "on_prompt": True}
    objective = PsKd(of=spec, alpha=0.5)
    assert objective == PsKd(of=Causal(on_prompt=True), alpha=0.5)
    assert hash(objective) == hash(PsKd(of=Causal(on_prompt=True), alpha=0.5))
    assert objective.needs_teacher and not objective.of.needs_teacher


def test_refusals():
    with pytest.raises(ValueError, match="of=Diverging must be a TokenObjective"):
        PsKd(of=toys.Diverging())
    with pytest.raises(ValueError, match="of=Diverging must be a TokenObjective"):
        PsKd(of={"make": "tests.lib.toys:Diverging"})
    with pytest.raises(ConfigError, match=r"train\.objective\.of\.make='nowhere'"):
        PsKd(of={"make": "nowhere"})
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"alpha={alpha} must be in"):
            PsKd(of=Causal(), alpha=alpha)
