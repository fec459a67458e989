"""A run's folder: what it holds, when it may be resumed, and its checkpoints.

config.json     the settings, all defaults filled in
model.json      fields of the model's `ModelConfig`
data.json       what `train.data.describe` says of the examples
frozen.json     the fingerprint of a model that something is learned beside
versions.json   Python, packages and git revision that last wrote here
tokenizer/      the tokenizer
generation_config.json  how the model it began with is meant to generate, see `dlm.hf.generation`
metrics.jsonl   see `train.metrics`
wandb_id.txt    which run of W&B it is, if it is one
lock.json       who is in the folder, while someone is
checkpoints/    Orbax checkpoints: training state and data iterator
model/          the finished model, as `dlm.load` reads it
exported.json   the step whose model that is
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging

from dlm.config import ModelConfig
from dlm.hf.generation import read_generation, write_generation
from dlm.hf.tokenizer import load_tokenizer
from dlm.tokenizer import Tokenizer
from train import config as config_lib
from train.config import CheckpointConfig, ConfigError, RunConfig
from train.step import TrainState
from train.workdir import check_not_beyond, check_same, read_json, write_json

# What may differ between a run and its resumption: it changes how long, how often and where, but
# not what a step does. (`train.num_steps` does move what depends on the share that is done: the
# learning rate if `optim.decay_steps` is 0, and schedules of objectives.)
MAY_CHANGE = (
    "train.num_steps",
    "train.eval_every",
    "train.num_eval_batches",
    "data.valid",
    "data.num_threads",
    "data.prefetch",
    "checkpoint",
    "log",
    "mesh",
)

# What there is in a run's folder, as said above.
_FILES = (
    "config.json", "model.json", "data.json", "frozen.json", "versions.json",
    "generation_config.json", "metrics.jsonl", "lock.json", "exported.json",
    "wandb_id.txt",
)  # fmt: skip
_FOLDERS = ("tokenizer", "checkpoints", "model")

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def check_kinds(workdir: pathlib.Path) -> None:
    """Raises ConfigError if a folder is where a run has a file, or the other way round."""
    for name in (*_FILES, *_FOLDERS):
        path = workdir / name
        if path.exists() and path.is_dir() != (name in _FOLDERS):
            wanted, found = ("folder", "file") if name in _FOLDERS else ("file", "folder")
            raise ConfigError(
                f"{path} must be a {wanted}, which a run writes, and is a {found}: move it away or "
                "choose another folder"
            )


def check_is_run(workdir: pathlib.Path) -> None:
    """Raises ConfigError if a folder without checkpoints has the settings of something else."""
    path = workdir / "config.json"
    if path.exists():
        found = read_json(path)
        if lacking := sorted({"model", *config_lib.SECTIONS} - set(found)):
            raise ConfigError(
                f"workdir={str(workdir)!r} is not a run's: its config.json has no {lacking[0]!r}; "
                "choose another folder"
            )


def check_same_run(workdir: pathlib.Path, settings: RunConfig, step: int) -> None:
    """Makes sure that the run in `workdir`, saved at `step`, can go on with `settings`.

    Raises:
      ConfigError: it is of another config (the message has all fields that differ), or it has gone
        further already.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ConfigError(
            f"workdir={str(workdir)!r} has checkpoints but no config.json; choose another folder"
        )
    now = config_lib.to_json(settings)
    check_same(path, now, "checkpoints", MAY_CHANGE, config_lib.defaults())
    check_not_beyond(workdir, "train.num_steps", settings.train.num_steps, step)


def write_settings(
    workdir: pathlib.Path,
    settings: RunConfig,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    generation: Mapping[str, Any],
) -> None:
    """Writes config.json, model.json, generation_config.json, versions.json and tokenizer/."""
    write_json(workdir / "config.json", config_lib.to_json(settings))
    write_json(workdir / "model.json", dataclasses.asdict(cfg))
    write_json(workdir / "generation_config.json", write_generation(generation))
    write_json(
        workdir / "versions.json",
        {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
            "git_revision": _git_revision(),
        },
    )
    tokenizer.save(workdir / "tokenizer")


def write_data(workdir: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Notes what the examples are, of `train.data.describe`."""
    write_json(workdir / "data.json", facts)


def check_same_data(workdir: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Makes sure that a run goes on with the examples that it was begun with, if that is known.

    Raises:
      ConfigError: there are others.
    """
    path = workdir / "data.json"
    if not path.exists():
        return
    old = read_json(path)
    if old != facts:
        was, now = (
            f"{x.get('num_examples')} (SHA-256 {str(x.get('sha256'))[:12]}...)"
            for x in (old, facts)
        )
        raise ConfigError(
            f"the examples of data.train are not those that {str(workdir)!r} was begun with: "
            f"there were {was} and are {now}: put the old ones back, or delete {path} to go on "
            "with these"
        )


def write_frozen(workdir: pathlib.Path, fingerprint: str) -> None:
    """Notes what stays as it is, of `train.model.RunModel.fingerprint`."""
    write_json(workdir / "frozen.json", {"fingerprint": fingerprint})


def check_same_frozen(workdir: pathlib.Path, fingerprint: str) -> None:
    """Makes sure that what a run learns beside is what it was begun with, if that is known.

    Raises:
      ConfigError: it is something else.
    """
    path = workdir / "frozen.json"
    if not path.exists():
        return
    old = read_json(path).get("fingerprint")
    if old != fingerprint:
        raise ConfigError(
            f"the model of train.init_from, or another one that train.trainable reads, is not the "
            f"one that {str(workdir)!r} was begun with (fingerprint {old}, and now {fingerprint}): "
            f"put the old one back, or delete {path} to go on with this one"
        )


def read_model(workdir: pathlib.Path) -> tuple[ModelConfig, Tokenizer, Mapping[str, Any]]:
    """The model of the run in a folder, its tokenizer and how it is meant to generate."""
    path = workdir / "model.json"
    if not path.exists():
        raise ConfigError(f"{path} is missing: put it back, or choose another folder")
    try:
        cfg = ModelConfig(**read_json(path))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} does not say what the model is: {error}") from error
    try:
        generation = read_generation(workdir, {})
    except ValueError as error:
        raise ConfigError(
            f"{error}: it is damaged, so put back what was there, or choose another folder"
        ) from error
    try:
        return cfg, load_tokenizer(workdir / "tokenizer"), generation
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer of this run is damaged: {error}") from error


def latest_step(workdir: pathlib.Path) -> int | None:
    """The last step that was saved; None: there is none."""
    return max(_paths(workdir / "checkpoints"), default=None)


def _paths(root: pathlib.Path) -> dict[int, pathlib.Path]:
    """The folder of every step that was saved."""
    if not root.exists():
        return {}
    found = ocp.path.step.standard_name_format().find_all(root.absolute())
    return {metadata.step: pathlib.Path(metadata.path) for metadata in found}


def write_exported(workdir: pathlib.Path, step: int) -> None:
    """Notes that the model of a step is all there."""
    write_json(workdir / "exported.json", {"step": step})


def exported_step(workdir: pathlib.Path) -> int | None:
    """The step whose model is all there; None: there is none."""
    path = workdir / "exported.json"
    model = workdir / "model"
    if not path.is_file() or not model.is_dir() or not any(model.iterdir()):
        return None
    step: int | None = read_json(path).get("step")
    return step


def open_manager(workdir: pathlib.Path, config: CheckpointConfig) -> ocp.CheckpointManager:
    """The checkpoints of a run. What a killed process left half-written is removed."""
    return ocp.CheckpointManager(
        (workdir / "checkpoints").absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=config.keep, cleanup_tmp_directories=True),
    )


def save(
    manager: ocp.CheckpointManager, step: int, state: TrainState, iterator: grain.DatasetIterator
) -> None:
    """Saves everything the steps after `step` depend on. The writing goes on in the background.

    Args:
      manager: of `open_manager`.
      step: number of steps done.
      state: a pytree of arrays.
      iterator: which has given exactly the batches of those steps.

    Raises:
      OSError: this step, or the one before, cannot be written.
    """
    with _telling(manager):
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(iterator)
            ),
            force=True,
        )


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits until all that was saved is written; OSError if it cannot be."""
    with _telling(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def _telling(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Says in one sentence that a step cannot be written."""
    try:
        yield
    except Exception as error:  # whatever Orbax and what is below it make of full disks
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise OSError(
            f"a step cannot be saved in {manager.directory}, where those before are as they were; "
            f"make room there, or mend what is wrong, and start the same command again ({said})"
        ) from error


def restore_newest(
    manager: ocp.CheckpointManager,
    abstract_state: Any,
    iterator: grain.DatasetIterator,
    is_packed: bool = False,
) -> tuple[int, Any]:
    """The newest step that can be read, and its state; `iterator` is set to the batch that follows.

    A damaged step is put aside as "STEP.damaged" if an older one can be read; not with several
    processes, of which only some might see the damage. Files that are missing or too short are
    seen; wrong numbers inside of them may not be.

    Args: as `restore`.

    Raises:
      ConfigError: there is no such step, the message says what to delete; or as `restore`.
    """
    root = pathlib.Path(manager.directory)
    paths = _paths(root)
    steps = sorted(paths, reverse=True)
    damaged: list[int] = []
    said = ""
    for step in steps:
        try:
            state = restore(manager, step, abstract_state, iterator, is_packed)
        except ConfigError:
            raise
        except Exception as error:  # whatever Orbax and what is below it make of broken files
            said = said or f"{type(error).__name__}: {error}".splitlines()[0][:200]
            damaged.append(step)
            if jax.process_count() > 1:
                break
            continue
        for bad in damaged:
            aside = root / f"{bad}.damaged"
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            paths[bad].rename(aside)
            logging.warning(
                "Step %d in %s is damaged (%s): going on from step %d.", bad, root, said, step
            )
        if damaged:
            manager.reload()
        return step, state
    older = [step for step in steps if step not in damaged]
    advice = f"delete {root} to start anew"
    if older:
        advice = f"delete {paths[damaged[0]]} to go on from step {older[0]}"
    raise ConfigError(
        f"step {', '.join(map(str, damaged))} in {root} cannot be read ({said}): {advice}"
    )


def restore(
    manager: ocp.CheckpointManager,
    step: int,
    abstract_state: TrainState,
    iterator: grain.DatasetIterator,
    is_packed: bool = False,
) -> TrainState:
    """The state saved at `step`; `iterator` is set to the batch that follows.

    Args:
      manager: of `open_manager`.
      step: one of its steps.
      abstract_state: `jax.ShapeDtypeStruct`s with the shardings that are wanted.
      iterator: a fresh one over the same data.
      is_packed: whether the data are packed: then every process has its own place in them.

    Raises:
      ConfigError: another number of processes saved places in packed data.
    """
    found = ocp.path.step.standard_name_format().find_step(manager.directory, step)
    places = sorted((found.path / "data").glob("process_*-of-*.json"))
    own = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    place = next((path for path in places if path.name == own), None)
    if place is None:
        count = places[0].stem.rpartition("-")[2]
        if is_packed:
            raise ConfigError(
                f"step {step} in {manager.directory} was saved by {count} processes, each with its "
                f"own packed texts: it can be resumed by {count} processes, not by "
                f"{jax.process_count()}"
            )
        place = places[0]  # all have seen as many batches
    restored = manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
    )
    iterator.set_state(json.loads(place.read_text()))
    state: TrainState = restored["state"]
    return state


def _git_revision() -> str | None:
    """The commit of the source tree, with "+changes" if files differ; None if it is no checkout."""
    here = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
