"""The laws that every objective obeys: whoever is in `train.objectives` is tried here.

A step has a finite loss, and moves all that is learned and nothing else; rows do not see each
other, nor anybody what stands before a prompt or, of an autoregressive text, behind its end; a run
that was interrupted goes on as if it had not been; what a docstring rules out is refused. What an
objective is, its own tests say.
"""

import dataclasses
import functools

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dlm import lm
from dlm.heads.draft_lm import DraftLM
from dlm.heads.specdec_pp import StopHead
from dlm.lora import Lora
from dlm.sharding import make_mesh
from dlm.trainable import Everything, Learned
from scripts.docs_tables.tables import objective_kinds
from tests.lib.certainty import easy
from tests.lib.docs import check_refusals
from tests.lib.tiers import more, often
from tests.lib.weights import init_from_specs, noisy
from train.config import OptimConfig
from train.objectives import Context, Objective
from train.objectives.adaspec import AdaSpec
from train.objectives.dflash import DPaceLoss
from train.objectives.specdec_pp import StopLoss
from train.step import init_state, train_step

KINDS = objective_kinds()
TRAINABLES = sorted({kind.goes_with or Everything for kind in KINDS}, key=str)
# Of those that choose or weigh among all tokens of a batch: settings with which they do not.
BY_ROW = {
    AdaSpec: dict(share=1.0), DPaceLoss: dict(smoothing=1.0), StopLoss: dict(weight=1.0),
}  # fmt: skip
P, G = 5, 6
# What is learned from rounds of decoding has batches, and tests, of its own.
OF_TEXTS = [kind for kind in KINDS if kind.reads == Objective.reads]
of_texts = pytest.mark.parametrize("kind", often(*OF_TEXTS))


@dataclasses.dataclass(frozen=True)
class Run:
    """An objective, what is learned, and from where."""

    cfg: object
    objective: object
    trainable: object
    frozen: Learned
    own: dict

    def learn(self, batch):
        """The loss, and its gradients for what is learned and what stays beside."""
        return _learn(
            self.own, self.frozen, batch, cfg=self.cfg, objective=self.objective,
            trainable=self.trainable,
        )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("cfg", "objective", "trainable"))
def _learn(own, frozen, batch, *, cfg, objective, trainable):
    def loss(own, beside):
        learned = trainable.attach(cfg, frozen.replace(beside=beside), own)
        if objective.needs_teacher:
            learned = learned.replace(beside=beside)
        value, metrics = objective.loss(learned, cfg, batch, Context(jax.random.key(3), 0.5))
        return value, metrics

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(own, frozen.beside)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_cfg, toy_params):
    """A draft model, as a checkpoint."""
    path = tmp_path_factory.mktemp("laws") / "draft"
    cfg = dataclasses.replace(toy_cfg, n_layers=1)
    params = toy_params | {"layers": jax.tree.map(lambda x: x[:1], toy_params["layers"])}
    lm.save(path, lm.LanguageModel(params, cfg, None))
    return str(path)


def trainable_of(kind, folder):
    kind = kind.goes_with or Everything
    needs = {DraftLM: ("checkpoint", "reference"), StopHead: ("target",)}
    return kind(**dict.fromkeys(needs.get(kind, ()), folder))


@pytest.fixture(scope="module")
def run_of(toy_cfg, toy_params, folder):
    """Of an objective's kind: its run, made once. The model is often right about `batch_of`."""
    params = easy(toy_params)

    @functools.cache
    def make(kind):
        objective, trainable = kind.example(), trainable_of(kind, folder)
        if isinstance(trainable, Everything):
            beside = jax.tree.map(lambda x: 0.9 * x, params)
            return Run(toy_cfg, objective, trainable, Learned({}, beside=beside), params)
        frozen = Learned(params, beside=trainable.beside(toy_cfg, make_mesh()))
        own = init_from_specs(jax.random.key(1), trainable.specs(toy_cfg), toy_cfg.jnp_dtype)
        own = trainable.start(toy_cfg, params, own)
        own = noisy(jax.random.key(2), own)  # neither the reference nor zero
        return Run(toy_cfg, objective, trainable, frozen, own)

    return make


def batch_of(cfg, seed=0):
    """Rows whose prompts and completions have the same lengths whatever the seed."""
    rng, ids, B = np.random.default_rng(seed), 4, 4
    start, length = np.array([1, 0, 3, P]), np.array([G, 5, 4, 2])
    before = np.arange(P)[None] < start[:, None]
    behind = np.arange(G)[None] >= length[:, None] - 1
    batch = {
        "prompt": np.where(before, cfg.pad_token_id, rng.integers(0, ids, (B, P))),
        "prompt_start": start,
        "completion": np.where(behind, cfg.eos_token_id, rng.integers(0, ids, (B, G))),
        "completion_len": length,
        "step_map": np.argsort(rng.random((B, G)), axis=1),
    }
    return {name: value.astype(np.int32) for name, value in batch.items()}


@of_texts
def test_what_is_learned_has_a_gradient_and_nothing_else(run_of, kind):
    """Finite, in every parameter; what stays beside has none."""
    run = run_of(kind)
    (loss, metrics), (own, beside) = run.learn(batch_of(run.cfg))
    assert np.isfinite(loss) and loss == metrics["loss"]
    assert all(np.shape(x) == () and np.isfinite(x) for x in metrics.values())
    for path, gradient in jax.tree_util.tree_leaves_with_path(own):
        assert np.isfinite(gradient).all() and np.any(gradient), jax.tree_util.keystr(path)
    assert not any(np.any(x) for x in jax.tree.leaves(beside))


@of_texts
def test_rows_do_not_see_each_other(run_of, kind):
    """Other first rows change the loss by as much, whatever the rows behind them are."""
    run = run_of(kind)
    run = dataclasses.replace(
        run, objective=dataclasses.replace(run.objective, **BY_ROW.get(kind, {}))
    )
    first = [batch_of(run.cfg, seed) for seed in (1, 2)]
    others = [batch_of(run.cfg, seed) for seed in (3, 4)]
    join = lambda a, b: {name: np.concatenate([a[name][:2], b[name][2:]]) for name in a}
    loss = np.array([[run.learn(join(a, b))[0][0] for b in others] for a in first])
    assert np.abs(loss[0] - loss[1]).min() > 1e-3 and np.abs(loss[:, 0] - loss[:, 1]).min() > 1e-3
    np.testing.assert_allclose(loss[0, 0] - loss[1, 0], loss[0, 1] - loss[1, 1], atol=2e-5)


@of_texts
def test_padding_is_not_seen(run_of, kind):
    """Neither before prompts, nor, where texts are autoregressive, behind their ends."""
    run = run_of(kind)
    batch = batch_of(run.cfg)
    (expected, _), _ = run.learn(batch)
    before = np.arange(P)[None] < batch["prompt_start"][:, None]
    other = batch | {"prompt": np.where(before, 7, batch["prompt"])}
    if not is_diffusion(run):
        behind = np.arange(G)[None] >= batch["completion_len"][:, None]
        assert behind.any()
        other["completion"] = np.where(behind, 7, batch["completion"])
    assert before.any()
    np.testing.assert_allclose(run.learn(other)[0][0], expected, rtol=1e-6)


def is_diffusion(run):
    """Whether it needs a MASK in the model: its completions are learned with their padding."""
    blind = dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, mask_token_id=None))
    try:
        jax.eval_shape(blind.learn, batch_of(run.cfg))
    except ValueError as error:
        return "mask_token_id=None" in str(error)
    return False


@pytest.mark.parametrize("kind", more(*OF_TEXTS))
def test_interrupted_is_not_interrupted(run_of, tmp_path, kind):
    """Two steps, with or without a checkpoint between them, to the bit."""
    run = run_of(kind)
    optim = OptimConfig(learning_rate=1e-2, decay_steps=4, ema_decay=0.9)
    frozen = None if isinstance(run.trainable, Everything) else run.frozen
    step = jax.jit(
        functools.partial(
            train_step, cfg=run.cfg, objective=run.objective, optim=optim, trainable=run.trainable
        )
    )
    advance = lambda state, i: step(state, batch_of(run.cfg, i), jax.random.key(5), frozen)[0]
    first = advance(init_state(run.own, optim=optim), 0)
    assert first.is_finite and first.step == 1
    for old, new in zip(jax.tree.leaves(run.own), jax.tree.leaves(first.params), strict=True):
        assert np.any(np.asarray(old) != np.asarray(new))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", first)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", first)
    jax.tree.map(np.testing.assert_array_equal, advance(restored, 1), advance(first, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_goes_with(folder, kind):
    """It refuses whatever is learned but what it is written for."""
    others = [*TRAINABLES, Lora]
    for other in others:
        if other is DraftLM:
            trainable = DraftLM(checkpoint=folder, reference=folder)
        else:
            trainable = Lora(rank=2, alpha=1.0) if other is Lora else other()
        reason = kind.example().refuse(trainable)
        fits = trainable.is_model if kind.goes_with is None else other is kind.goes_with
        assert (reason is None) == fits
        assert (
            fits or f"train.trainable={'None' if other is Everything else other.__name__}" in reason
        )


@pytest.mark.parametrize("kind", KINDS)
def test_nonsense_is_refused(kind):
    check_refusals(kind.example(), lambda objective: objective)


@pytest.mark.parametrize("kind", [kind for kind in TRAINABLES if kind is not DraftLM])
def test_nonsense_of_what_is_learned_is_refused(kind):
    check_refusals(kind(), lambda trainable: trainable)
