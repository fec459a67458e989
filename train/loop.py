"""The training loop: `run(config, workdir)` takes settings to a finished model.

A run starts from, in this order: the last checkpoint in its own workdir, the model in
`train.init_from`, fresh parameters. So the same command starts a run and resumes it, and a resumed
run is bit for bit the run that was never stopped (on the same machine and mesh).

What is learned is the model, or a `train.trainable` beside a model that stays as it is: an adapter,
draft heads, a filter.

The randomness of step i depends on (`train.seed`, i) and on nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import config_dict

from dlm import lm, tasks
from dlm.params import Params, init_from_specs
from dlm.sharding import make_mesh
from dlm.tokenizer import Tokenizer
from dlm.trainable import Trainable
from train import checkpoint, data
from train.config import ConfigError, OptimConfig, RunConfig, build, from_config_dict
from train.metrics import FILE_NAME, NonFiniteError, Reporter, is_due, read_metrics
from train.model import RunModel, open_model
from train.objectives import Objective
from train.step import (
    EVERYTHING,
    TrainState,
    abstract_state,
    first_state,
    jit_keep_best,
    jit_train_step,
    state_shardings,
    valid_step,
)
from train.workdir import hold, open_folder


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What `run` returns.

    Attributes:
      step: steps done; fewer than `train.num_steps` if the run was stopped by a signal.
      metrics: the last line of `metrics.jsonl`; {} if there is none.
      model_path: the finished model, for `dlm.load`; None if the run was stopped.
    """

    step: int
    metrics: dict[str, float]
    model_path: pathlib.Path | None


def run(
    config: config_dict.ConfigDict,
    workdir: str | os.PathLike[str],
    description: str = "training",
) -> RunResult:
    """Trains a model, or goes on training it.

    Example:
        >>> import tempfile, dlm
        >>> from configs import mdlm_scan
        >>> result = run(mdlm_scan.get_config("runlocal"), tempfile.mkdtemp())
        >>> result.step, dlm.load(result.model_path).cfg.n_layers
        (20, 2)

    Args:
      config: sections `model, data, optim, train, checkpoint, log, mesh`, see `train.config`.
      workdir: folder of this run, made if needed; see `train.checkpoint` for what it will hold.
      description: title of the progress bar.

    Returns:
      The last metrics and where the model is.

    Raises:
      ConfigError: the settings cannot be run, or the workdir belongs to other ones, to other data
        or to a run that has not ended.
      NonFiniteError: training diverged. Nothing saved before is touched.
      OSError: the workdir cannot be written to any more. Nothing saved before is touched.
    """
    settings = from_config_dict(config)
    num_steps = settings.train.num_steps
    folder = open_folder(workdir)
    checkpoint.check_kinds(folder)
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(hold(folder))
        start = checkpoint.latest_step(folder)
        if start is not None:
            checkpoint.check_same_run(folder, settings, start)
            if start == num_steps == checkpoint.exported_step(folder):
                return _result(folder, start, folder / "model")  # nothing is left to do
        else:
            checkpoint.check_is_run(folder)
        mesh = _make_mesh(settings)
        stack.enter_context(jax.set_mesh(mesh))

        # -- Model
        task, valid_task = _build_tasks(settings)
        recipe = _make_recipe(settings, task)
        model = open_model(settings, folder, start, recipe.trainable, task, mesh)

        frozen = model.fingerprint()
        if start is not None and frozen is not None:
            checkpoint.check_same_frozen(folder, frozen)

        # -- Data
        facts = data.describe(task)
        if start is not None:
            checkpoint.check_same_data(folder, facts)
        feed = _open_data(settings, task, valid_task, model.tokenizer, stack)

        # -- State
        manager = stack.enter_context(checkpoint.open_manager(folder, settings.checkpoint))
        start, state = _open_state(settings, start, recipe, model, feed, manager, mesh)
        if jax.process_index() == 0:
            checkpoint.write_settings(
                folder, settings, model.cfg, model.tokenizer, model.generation
            )
            checkpoint.write_data(folder, facts)
            if frozen is not None:
                checkpoint.write_frozen(folder, frozen)

        # -- Steps
        reporter = stack.enter_context(Reporter(settings, folder, start, description))
        is_stopping = stack.enter_context(_stop_on_signals(manager))
        step, state = _steps(
            settings, start, state, recipe, model, feed, manager, reporter, is_stopping, mesh
        )
        checkpoint.wait(manager)

        # -- Result
        model_path = None
        if step == num_steps:
            model_path = folder / "model"
            _export(folder, recipe.trainable, state.result, model)
            if jax.process_index() == 0:
                checkpoint.write_exported(folder, step)
    return _result(folder, step, model_path)


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What is minimised, over what, and how.

    Attributes:
      objective: see `train.objectives`.
      trainable: see `dlm.trainable`.
      optim: with `decay_steps` filled in.
    """

    objective: Objective
    trainable: Trainable
    optim: OptimConfig


@dataclasses.dataclass(frozen=True)
class _Feed:
    """Batches.

    Attributes:
      iterator: over those that are learned from.
      valid: the held-out ones; empty: no validation.
    """

    iterator: grain.DatasetIterator
    valid: Sequence[data.Batch]


def _make_recipe(settings: RunConfig, task: tasks.Task) -> _Recipe:
    objective: Objective = build(settings.train.objective, "train.objective")
    if objective.needs_teacher and not settings.optim.ema_decay:
        raise ConfigError(
            "optim.ema_decay=0 must be positive: the objective compares the model with the "
            "moving average of itself"
        )
    if settings.data.keep_apart and not objective.keeps_apart:
        raise ConfigError(
            f"data.keep_apart=True must be False with train.objective="
            f"{settings.train.objective['make']!r}, which lets packed texts see each other"
        )
    trainable: Trainable = EVERYTHING
    if settings.train.trainable is not None:
        trainable = build(settings.train.trainable, "train.trainable")
        try:
            trainable = trainable.fitted(task)
        except ValueError as error:
            raise ConfigError(f"train.trainable: {error}") from error
    if reason := objective.refuse(trainable):
        raise ConfigError(reason)
    decay_steps = settings.optim.decay_steps or settings.train.num_steps
    return _Recipe(
        objective, trainable, dataclasses.replace(settings.optim, decay_steps=decay_steps)
    )


# ---- Data -------------------------------------------------------------------------------------


def _open_data(
    settings: RunConfig,
    task: tasks.Task,
    valid_task: tasks.Task | None,
    tokenizer: Tokenizer,
    stack: contextlib.ExitStack,
) -> _Feed:
    """Batches of the tasks; `stack` closes them."""
    num_shards = settings.mesh.data * settings.mesh.fsdp
    iterator = data.train_iterator(task, tokenizer, settings.data, num_shards)
    stack.callback(iterator.close)
    num_valid = settings.train.num_eval_batches
    valid = data.valid_batches(valid_task, tokenizer, settings.data, num_valid, num_shards)
    return _Feed(iterator, valid)


def _build_tasks(settings: RunConfig) -> tuple[tasks.Task, tasks.Task | None]:
    """The training task, and the validation task if there is one."""
    spec, valid = settings.data.task, settings.data.valid
    task = build({**spec, **settings.data.train}, "data.train")
    return task, None if valid is None else build({**spec, **valid}, "data.valid")


# ---- State ------------------------------------------------------------------------------------


def _keys(settings: RunConfig) -> Iterator[jax.Array]:
    """Of the first parameters, of training and of validation."""
    root = jax.random.key(settings.train.seed)
    return (jax.random.fold_in(root, i) for i in range(3))


def _open_state(
    settings: RunConfig,
    start: int | None,
    recipe: _Recipe,
    model: RunModel,
    feed: _Feed,
    manager: ocp.CheckpointManager,
    mesh: Mesh,
) -> tuple[int, TrainState]:
    """Steps done and the state: before the first one, or the last that was saved and can be read.

    `feed` is set to the batch that follows; the given parameters of `model` are let go.
    """
    trainable, cfg = recipe.trainable, model.cfg
    specs = trainable.specs(cfg)
    master_dtype = jnp.dtype(settings.train.master_dtype)
    shardings = state_shardings(specs, recipe.optim, mesh)
    if start is not None:
        abstract = abstract_state(specs, master_dtype, recipe.optim, shardings)
        return checkpoint.restore_newest(manager, abstract, feed.iterator, settings.data.packing)
    init_key, *_ = _keys(settings)
    given, model.given = model.given, None
    if model.frozen is not None:
        fresh = jax.jit(
            functools.partial(init_from_specs, init_key, specs, master_dtype),
            out_shardings=shardings.params,
        )
        try:
            given = trainable.start(cfg, model.frozen.target, fresh())
        except ValueError as error:
            raise ConfigError(f"train.trainable: {error}") from error
    return 0, first_state(init_key, given, specs, master_dtype, recipe.optim, shardings)


def _make_mesh(settings: RunConfig) -> Mesh:
    try:
        mesh = make_mesh(**dataclasses.asdict(settings.mesh))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if mesh.size < jax.device_count():
        logging.warning(
            "The mesh %s uses %d of %d devices.", dict(mesh.shape), mesh.size, jax.device_count()
        )
    return mesh


# ---- Steps ------------------------------------------------------------------------------------


def _steps(
    settings: RunConfig,
    step: int,
    state: TrainState,
    recipe: _Recipe,
    model: RunModel,
    feed: _Feed,
    manager: ocp.CheckpointManager,
    reporter: Reporter,
    is_stopping: Callable[[int], bool],
    mesh: Mesh,
) -> tuple[int, TrainState]:
    """Trains from `step` on until the end, or until the run is to stop: steps done, and the state.

    Raises:
      ConfigError: an example cannot be used; the state before its batch is saved.
      NonFiniteError: training diverged; the state before it is saved.
    """
    num_steps = settings.train.num_steps
    _, train_key, _ = _keys(settings)
    static = {"cfg": model.cfg, "objective": recipe.objective, "trainable": recipe.trainable}
    shardings = state_shardings(recipe.trainable.specs(model.cfg), recipe.optim, mesh)
    jitted_train_step, jitted_keep_best = jit_train_step(shardings), jit_keep_best(shardings)
    validate = _validator(settings, recipe, model, feed, mesh)
    is_stopped = False
    before: dict[int, dict[str, Any]] = {}  # steps done -> where the iterator stood; the last two
    try:
        while step < num_steps and not is_stopped:
            before = dict([*before.items()][-1:]) | {step: feed.iterator.get_state()}
            try:
                local = next(feed.iterator)
            except ConfigError:
                if jax.process_count() == 1 and step and step not in manager.all_steps():
                    reporter.flush()
                    checkpoint.save(manager, step, state, feed.iterator)  # which has not moved
                checkpoint.wait(manager)
                raise
            _check_batch(recipe.objective, local)
            batch = data.to_global(local, mesh)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = jitted_train_step(
                    state, batch, train_key, model.frozen, optim=recipe.optim, **static
                )
            step += 1
            # The device works on this step while the host reads the numbers of the one before.
            reporter.flush()
            num_tokens = recipe.objective.num_positions(batch)
            reporter.add(step, metrics, local["index"], num_tokens)
            is_stopped = is_stopping(step)
            if feed.valid and is_due(step, settings.train.eval_every, num_steps):
                found = reporter.flush(functools.partial(validate, state.averaged))
                if recipe.optim.keep_best:
                    state = jitted_keep_best(state, found["valid/loss"])
            if is_stopped or is_due(step, settings.checkpoint.every, num_steps):
                reporter.flush()  # raises unless the step was finite
                checkpoint.save(manager, step, state, feed.iterator)
    except NonFiniteError as error:
        # The state stayed as it was before the bad step, which may not be the last one made.
        good = int(state.step)
        feed.iterator.set_state(before[good])
        if good not in manager.all_steps():
            state = state.replace(is_finite=jnp.ones_like(state.is_finite))
            checkpoint.save(manager, good, state, feed.iterator)
        checkpoint.wait(manager)
        where = f"the state before it is saved as step {good} in {manager.directory}"
        raise NonFiniteError(f"{error}; {where}") from None
    return step, state


def _check_batch(objective: Objective, batch: data.Batch) -> None:
    if missing := sorted(objective.reads - batch.keys()):
        raise ConfigError(
            f"train.objective.make={type(objective).__name__} learns from {missing[0]!r}, and "
            f"data.task gives {', '.join(sorted(batch))}: choose a task or an objective that fits"
        )


def _validator(
    settings: RunConfig, recipe: _Recipe, model: RunModel, feed: _Feed, mesh: Mesh
) -> Callable[[Params], dict[str, jax.Array]]:
    """Gives the mean metrics of parameters over the held-out batches."""
    *_, key = _keys(settings)
    objective = recipe.objective.for_validation()
    static = {"cfg": model.cfg, "objective": objective, "trainable": recipe.trainable}
    jitted_valid_step = jax.jit(valid_step, static_argnames=tuple(static))

    def validate(own: Params) -> dict[str, jax.Array]:
        results = [
            jitted_valid_step(
                own,
                data.to_global(batch, mesh),
                jax.random.fold_in(key, i),  # the same masks every time
                model.frozen,
                **static,
            )
            for i, batch in enumerate(feed.valid)
        ]
        means = jax.tree.map(lambda *values: sum(values) / len(values), *results)
        for name in {"nll_bound", "nll_next_token"} & means.keys():
            means[name.replace("nll", "perplexity")] = jnp.exp(means[name])
        return means

    return validate


_STOPPING = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


@contextlib.contextmanager
def _stop_on_signals(manager: ocp.CheckpointManager) -> Iterator[Callable[[int], bool]]:
    """Gives a function that tells after each step whether the run has been asked to stop.

    SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal is gone), and SIGUSR1, SIGUSR2 and SIGXCPU (of
    batch systems) ask, unless the process was started to ignore them, as `nohup` does. A second
    SIGINT ends the run at once. Of several processes all stop after the same step, whichever is
    asked: SIGTERM is then JAX's, which tells the others.
    """
    is_alone = jax.process_count() == 1
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield (lambda step: False) if is_alone else manager.reached_preemption
        return
    received: list[str] = []

    def receive(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and name in received:
            raise KeyboardInterrupt
        received.append(name)
        if not is_alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def is_stopping(step: int) -> bool:
        if not (received if is_alone else manager.reached_preemption(step)):
            return False
        asked = f", as {received[0]} asked" if received else ""
        logging.info("Stopping after step %d%s.", step, asked)
        return True

    handled = [*_STOPPING, *([signal.SIGTERM] if is_alone else [])]
    previous = {
        number: signal.signal(number, receive)
        for number in handled
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield is_stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


# ---- Result -----------------------------------------------------------------------------------


def _export(folder: pathlib.Path, trainable: Trainable, own: Params, model: RunModel) -> None:
    """Writes what was learned, in place of what was written before."""
    frozen = {} if model.frozen is None else model.frozen.target
    if jax.process_count() > 1:
        own, frozen = multihost_utils.process_allgather((own, frozen), tiled=True)
    if jax.process_index() == 0:
        shutil.rmtree(folder / "model", ignore_errors=True)
        said = lm.LanguageModel(frozen, model.cfg, model.tokenizer, generation=model.generation)
        trainable.export(folder, said, own)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("exported")


def _result(folder: pathlib.Path, step: int, model_path: pathlib.Path | None) -> RunResult:
    lines = read_metrics(folder) if (folder / FILE_NAME).exists() else []
    return RunResult(step=step, metrics=lines[-1] if lines else {}, model_path=model_path)
