"""The training loop: `run(config, workdir)` takes settings to a finished model.

A run starts from, in this order: the last checkpoint in its own workdir, the model in
`train.init_from`, fresh parameters. So the same command starts a run and resumes it, and a resumed
run is bit for bit the run that was never stopped (on the same machine and mesh).

What is learned is the model, or a `train.trainable` beside a model that stays as it is.

The randomness of step i depends on (`train.seed`, i) and on nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import config_dict

from dlm import lm, tasks
from dlm.config import ModelConfig
from dlm.params import Params, init_from_specs, num_params
from dlm.sharding import make_mesh
from dlm.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, word_tokenizer
from dlm.trainable import Learned, Trainable
from train import checkpoint, data
from train.config import ConfigError, RunConfig, build, from_config_dict
from train.metrics import NonFiniteError, Reporter, is_due, read_metrics
from train.objectives import Objective
from train.train_state import (
    EVERYTHING,
    abstract_state,
    first_state,
    jit_train_step,
    state_shardings,
    valid_step,
)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What `run` returns.

    Attributes:
      step: steps done; fewer than `train.num_steps` if the run was stopped by SIGTERM.
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
      ConfigError: the settings cannot be run, or the workdir belongs to other ones.
      NonFiniteError: training diverged. Nothing saved before is touched.
    """
    settings = from_config_dict(config)
    num_steps = settings.train.num_steps
    folder = pathlib.Path(workdir)
    checkpoint.check_writable(folder)
    start = checkpoint.latest_step(folder)
    if start is not None:
        checkpoint.check_same_run(folder, settings, start)
        if start == num_steps == checkpoint.exported_step(folder):
            return _result(folder, start, folder / "model")  # nothing is left to do
    with contextlib.ExitStack() as stack:
        mesh = _make_mesh(settings)
        stack.enter_context(jax.set_mesh(mesh))

        # -- Model and data
        objective: Objective = build(settings.train.objective, "train.objective")
        if objective.needs_teacher and not settings.optim.ema_decay:
            raise ConfigError(
                "optim.ema_decay=0 must be positive: the objective compares the model with the "
                "moving average of itself"
            )
        trainable: Trainable = EVERYTHING
        if settings.train.trainable is not None:
            trainable = build(settings.train.trainable, "train.trainable")
        task, valid_task = _build_tasks(settings)
        given: Params | None = None
        if start is not None:
            logging.info("Resuming %s after step %d.", folder, start)
            cfg, tokenizer = checkpoint.read_model(folder)
            if trainable is not EVERYTHING:
                given = _load_model(settings, mesh)[2]
        elif settings.train.init_from:
            logging.info("Starting from the model in %s.", settings.train.init_from)
            cfg, tokenizer, given = _load_model(settings, mesh)
        else:
            logging.info("Starting from fresh parameters.")
            tokenizer = _make_tokenizer(settings, task)
            cfg = _model_config(settings, tokenizer)
        frozen: Learned | None = None
        if trainable is not EVERYTHING:
            assert given is not None
            given = jax.tree.map(lambda x: x.astype(cfg.jnp_dtype), given)
            frozen, given = Learned(given, beside=trainable.beside(cfg, mesh)), None
        specs = trainable.specs(cfg)
        logging.info("Learning %s of %s parameters: %s", *_counts(specs, cfg), cfg)
        num_shards = settings.mesh.data * settings.mesh.fsdp
        iterator = data.train_iterator(task, tokenizer, settings.data, num_shards)
        stack.callback(iterator.close)
        valid = data.valid_batches(
            valid_task, tokenizer, settings.data, settings.train.num_eval_batches, num_shards
        )

        # -- State
        manager = stack.enter_context(checkpoint.open_manager(folder, settings.checkpoint))
        optim = dataclasses.replace(
            settings.optim, decay_steps=settings.optim.decay_steps or num_steps
        )
        master_dtype = jnp.dtype(settings.train.master_dtype)
        shardings = state_shardings(specs, optim, mesh)
        init_key, train_key, valid_key = (
            jax.random.fold_in(jax.random.key(settings.train.seed), i) for i in range(3)
        )
        if start is None:
            if frozen is not None:
                fresh = jax.jit(
                    functools.partial(init_from_specs, init_key, specs, master_dtype),
                    out_shardings=shardings.params,
                )
                given = trainable.start(cfg, frozen.target, fresh())
            state = first_state(init_key, given, specs, master_dtype, optim, shardings)
        else:
            abstract = abstract_state(specs, master_dtype, optim, shardings)
            state = checkpoint.restore(manager, start, abstract, iterator, settings.data.packing)
        del given
        if jax.process_index() == 0:
            checkpoint.write_settings(folder, settings, cfg, tokenizer)

        # -- Training
        static = {"cfg": cfg, "objective": objective, "trainable": trainable}
        jitted_train_step = jit_train_step(shardings)
        jitted_valid_step = jax.jit(valid_step, static_argnames=tuple(static))

        def validate(own: Params) -> dict[str, jax.Array]:
            results = [
                jitted_valid_step(
                    own,
                    data.to_global(batch, mesh),
                    jax.random.fold_in(valid_key, i),  # the same masks every time
                    frozen,
                    **static,
                )
                for i, batch in enumerate(valid)
            ]
            means = jax.tree.map(lambda *values: sum(values) / len(values), *results)
            if "nll_bound" in means:
                means["perplexity_bound"] = jnp.exp(means["nll_bound"])
            return means

        reporter = stack.enter_context(Reporter(settings, folder, start or 0, description))
        is_stopping = stack.enter_context(_stop_on_sigterm(manager))
        step, is_stopped = start or 0, False
        before: list[Any] = []  # where the iterator stood before the last two steps
        try:
            while step < num_steps and not is_stopped:
                before = [*before[-1:], iterator.get_state()]
                local = next(iterator)
                batch = data.to_global(local, mesh)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = jitted_train_step(
                        state, batch, train_key, frozen, optim=optim, **static
                    )
                step += 1
                # The device works on this step while the host reads the numbers of the one before.
                reporter.flush()
                num_tokens = batch["prompt"].size + batch["completion"].size
                reporter.add(step, metrics, local["index"], num_tokens)
                is_stopped = is_stopping(step)
                if valid and is_due(step, settings.train.eval_every, num_steps):
                    own = state.params if state.ema is None else state.ema
                    reporter.flush(functools.partial(validate, own))
                if is_stopped or is_due(step, settings.checkpoint.every, num_steps):
                    reporter.flush()  # raises unless the step was finite
                    checkpoint.save(manager, step, state, iterator)
        except NonFiniteError as error:
            # The state stayed as it was before the bad step, which may not be the last one made.
            good = int(state.step)
            iterator.set_state(before[good - step])
            if good not in manager.all_steps():
                checkpoint.save(
                    manager, good, state.replace(is_finite=jnp.ones_like(state.is_finite)), iterator
                )
            manager.wait_until_finished()
            where = f"the state before it is saved as step {good} in {manager.directory}"
            raise NonFiniteError(f"{error}; {where}") from None
        manager.wait_until_finished()

        # -- Result
        model_path = None
        if step == num_steps:
            model_path = folder / "model"
            own = state.params if state.ema is None else state.ema
            _export(folder, trainable, own, frozen, cfg, tokenizer)
            if jax.process_index() == 0:
                checkpoint.write_exported(folder, step)
    return _result(folder, step, model_path)


def _result(folder: pathlib.Path, step: int, model_path: pathlib.Path | None) -> RunResult:
    lines = read_metrics(folder)
    return RunResult(step=step, metrics=lines[-1] if lines else {}, model_path=model_path)


def _counts(specs: Params, cfg: ModelConfig) -> tuple[str, str]:
    """Parameters that are learned, and those of the model, as text."""
    own = sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs))
    return f"{own:,}", f"{num_params(cfg):,}"


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


def _build_tasks(settings: RunConfig) -> tuple[tasks.Task, tasks.Task | None]:
    """The training task, and the validation task if there is one."""
    spec, valid = settings.data.task, settings.data.valid
    task = build({**spec, **settings.data.train}, "data.train")
    return task, None if valid is None else build({**spec, **valid}, "data.valid")


def _make_tokenizer(settings: RunConfig, task: tasks.Task) -> Tokenizer:
    name = settings.data.tokenizer
    if name == "byte":
        return byte_tokenizer()
    if name == "word":
        pieces = getattr(task, "pieces", None)
        if pieces is None:
            raise ConfigError(
                f"data.tokenizer='word' needs a task with `pieces`, which "
                f"{type(task).__name__} has not; use 'byte' or a folder with a tokenizer"
            )
        return word_tokenizer(pieces)
    try:
        return load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.tokenizer={name!r}: {error}") from error


def _model_config(settings: RunConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model section, completed by what the tokenizer knows."""
    try:
        cfg = ModelConfig(
            **settings.model,
            vocab_size=tokenizer.vocab_size,
            mask_token_id=tokenizer.mask_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error
    return _check_length(cfg, settings)


def _load_model(settings: RunConfig, mesh: Mesh) -> tuple[ModelConfig, Tokenizer, Params]:
    """The model in `train.init_from`; of the model section only `dtype` is used."""
    path = settings.train.init_from
    try:
        model = lm.load(path, mesh=mesh)
    except (OSError, ValueError) as error:
        raise ConfigError(f"train.init_from={path!r}: {error}") from error
    if model.tokenizer is None:
        raise ConfigError(f"train.init_from={path!r} must be a model with a tokenizer")
    cfg = dataclasses.replace(model.cfg, dtype=settings.model.get("dtype", model.cfg.dtype))
    return _check_length(cfg, settings), model.tokenizer, model.params


def _check_length(cfg: ModelConfig, settings: RunConfig) -> ModelConfig:
    length = settings.data.prompt_len + settings.data.completion_len
    if length > cfg.max_seq_len:
        raise ConfigError(
            f"model.max_seq_len={cfg.max_seq_len} must be at least data.prompt_len + "
            f"data.completion_len = {length}"
        )
    return cfg


@contextlib.contextmanager
def _stop_on_sigterm(manager: ocp.CheckpointManager) -> Iterator[Callable[[int], bool]]:
    """Gives a function that tells after each step whether the run has been asked to stop."""
    if jax.process_count() > 1:  # all processes must stop after the same step
        yield manager.reached_preemption
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # only the main thread may handle signals
        return
    received = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def _export(
    folder: pathlib.Path,
    trainable: Trainable,
    own: Params,
    frozen: Learned | None,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
) -> None:
    """Writes what was learned, in place of what was written before."""
    if jax.process_count() > 1:
        own, frozen = multihost_utils.process_allgather((own, frozen), tiled=True)
    if jax.process_index() == 0:
        shutil.rmtree(folder / "model", ignore_errors=True)
        params = {} if frozen is None else frozen.target
        trainable.export(folder, lm.LanguageModel(params, cfg, tokenizer), own)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("exported")
    logging.info("The model is in %s.", folder / "model")
