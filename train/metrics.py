"""Numbers of a run: `metrics.jsonl` always, TensorBoard and W&B if wanted, and a progress bar.

`metrics.jsonl` has one JSON object per logged step, in order, each step once, also after a run was
killed and resumed. All values but "tokens_per_s" are functions of the config alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import jax
import tqdm
from absl import logging

from dlm.written import naming, write_text
from train.config import ConfigError, LogConfig, RunConfig, to_json

FILE_NAME = "metrics.jsonl"
WANDB_ID = "wandb_id.txt"
_MOST_NAMED = 1024  # examples of a batch that went wrong


class NonFiniteError(FloatingPointError):
    """The loss or the gradient of a step is infinite or not a number."""


def is_due(step: int, every: int, num_steps: int) -> bool:
    """Whether something done every so many steps (0: never), and at the end, is due."""
    return step == num_steps or (every > 0 and step % every == 0)


class Reporter:
    """Takes the metrics of every step, and writes those that are to be logged.

    Metrics stay on the device until `flush`, which is called once the next step is running.
    """

    def __init__(
        self, settings: RunConfig, workdir: pathlib.Path, step: int, description: str
    ) -> None:
        """Opens files and progress bar.

        Args:
          settings: of the run.
          workdir: its folder.
          step: steps already done.
          description: title of the progress bar.

        Raises:
          ConfigError: an optional package is missing.
        """
        is_first = jax.process_index() == 0
        self._settings = settings
        self._pending: tuple[int, Mapping[str, jax.Array], Sequence[int], int] | None = None
        self._clock: float | None = None  # time of the last line, in seconds
        self._num_tokens = 0  # since then
        self._writer = (
            MetricWriter(workdir, settings.log, step, to_json(settings)) if is_first else None
        )
        self._bar = tqdm.tqdm(
            total=settings.train.num_steps,
            initial=step,
            desc=description,
            unit="step",
            # None: only if standard error is a terminal.
            disable=None if is_first and settings.log.progress else True,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def add(
        self, step: int, metrics: Mapping[str, jax.Array], index: Sequence[int], num_tokens: int
    ) -> None:
        """Takes the metrics of `step`, which may not have been computed yet.

        Args:
          step: steps done, this one included.
          metrics: scalars.
          index: the examples it was made with, to be named if it went wrong.
          num_tokens: in its batch, padding included.
        """
        self._pending = (step, metrics, index, num_tokens)

    def flush(
        self, validate: Callable[[], Mapping[str, jax.Array]] | None = None
    ) -> dict[str, float]:
        """Waits for the metrics taken last, checks them, and writes them if they are due.

        Args:
          validate: gives metrics of held-out data; called after the check.

        Returns:
          What was written; {} if nothing was due.

        Raises:
          NonFiniteError: the loss or the gradient was not finite. Nothing is written.
        """
        if self._pending is None:
            return {}
        step, metrics, index, num_tokens = self._pending
        self._pending = None
        fetched = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values = {"loss": fetched.pop("loss"), **fetched}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                named = ", ".join(map(str, index[:_MOST_NAMED]))
                if len(index) > _MOST_NAMED:
                    named += f" and {len(index) - _MOST_NAMED} more"
                raise NonFiniteError(
                    f"{name} is {values[name]} at step {step}, made with examples {named} of "
                    "data.train"
                )
        self._bar.update()
        num_steps = self._settings.train.num_steps
        self._num_tokens += num_tokens
        if validate is None and not is_due(step, self._settings.log.every, num_steps):
            if self._clock is None:  # the first step compiles
                self._clock, self._num_tokens = time.perf_counter(), 0
            return {}
        if self._clock is not None:
            values["tokens_per_s"] = self._num_tokens / (time.perf_counter() - self._clock)
        if validate is not None:
            results = jax.device_get(validate())
            values.update({f"valid/{name}": float(value) for name, value in results.items()})
        self._clock, self._num_tokens = time.perf_counter(), 0
        if self._writer is not None:
            self._writer.write(step, values)
        shown = {"loss": f"{values['loss']:.3f}"}
        if "tokens_per_s" in values:
            shown["tokens/s"] = f"{values['tokens_per_s']:,.0f}"
        self._bar.set_postfix(shown)
        return values


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`, oldest first.

    A last line that is being written, or that an interruption cut short, is not among them.

    Raises:
      FileNotFoundError: there is no such file.
      ConfigError: another line is damaged.
    """
    file = pathlib.Path(workdir) / FILE_NAME
    *lines, _ = file.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{file}, line {number} is damaged ({error}): delete the line"
            ) from error
        found.append(values)
    return found


class MetricWriter:
    """Writes a run's metrics; one process of a run has one."""

    def __init__(
        self, workdir: pathlib.Path, log: LogConfig, step: int, settings: Mapping[str, Any]
    ) -> None:
        """Opens the files.

        Args:
          workdir: the run's folder.
          log: which files.
          step: last step that is already part of the run; later lines are dropped.
          settings: of the run, for W&B.

        Raises:
          ConfigError: an optional package is missing; the message names the extra.
        """
        self._file = _open_after(workdir / FILE_NAME, step)
        self._tensorboard = self._wandb = None
        if log.tensorboard:
            try:
                import tensorboardX
            except ImportError as error:
                raise ConfigError(
                    "log.tensorboard=True needs tensorboardX: pip install "
                    "'jax-parallel-decoding[log]'"
                ) from error
            self._tensorboard = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"), purge_step=step + 1
            )
        if log.wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise ConfigError(
                    f"log.wandb_project={log.wandb_project!r} needs wandb: pip install "
                    "'jax-parallel-decoding[log]'"
                ) from error
            name = workdir / WANDB_ID  # with which a resumed run goes on as the same one
            if not name.exists():
                write_text(name, uuid.uuid4().hex)
            self._wandb = wandb.init(
                project=log.wandb_project, dir=str(workdir), config=dict(settings),
                id=name.read_text(encoding="utf-8"), resume="allow",
            )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one step, at once: nothing of it is lost if the process is killed.

        Raises:
          OSError: it cannot be written.
        """
        with naming(self._file.name):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what could not be written before
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_after(path: pathlib.Path, step: int) -> TextIO:
    """Opens a metrics file for appending, without lines of steps after `step`."""
    kept, num_broken = [], 0
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                is_kept = json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError, RecursionError):
                is_kept = False  # the process or the machine went down while it was written
                num_broken += 1
            if is_kept:
                kept.append(line + "\n")
    if num_broken:
        logging.warning("Dropped %d broken lines of %s.", num_broken, path)
    partial = path.with_name(path.name + ".partial")
    write_text(partial, "".join(kept))
    partial.replace(path)
    return path.open("a", encoding="utf-8")
