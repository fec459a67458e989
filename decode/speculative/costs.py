"""What a round costs on this device, by width: the table that a controller chooses by.

Rounds of the very program that decodes are timed, one choice after the other, so nothing else is
compiled. The table lies beside JAX's compilation cache, if there is one, under all that it depends
on: device, model, method and shapes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from decode.core.loop import FOREVER
from decode.speculative.loop import SpeculativeMethod, SpeculativeState, decode
from dlm.config import ModelConfig
from dlm.params import Params

FILE = "speculation_costs.json"
REPEATS = 5  # of every choice, in turn; the median counts
_measured: dict[str, list[float]] = {}  # by this process: as programs are kept, so is this


def with_costs(
    params: Params,
    cfg: ModelConfig,
    method: SpeculativeMethod,
    start: Callable[[SpeculativeMethod], SpeculativeState],
) -> SpeculativeMethod:
    """The method, whose controller knows what rounds cost; as it is if it knows, or there is none.

    Example:
      >>> method = SpeculativeMethod(Suffix(), controller=Controller())
      >>> method = with_costs(params, cfg, method, start)  # start(method): after `prefill`

    Args:
      params, cfg: the target.
      method: how to decode.
      start: a first state, whose shapes are those that will be decoded.
    """
    if method.controller is None or method.controller.costs is not None:
        return method
    num = 1 + len(method.controller.widths_of(method.drafter))
    method = _with(method, np.ones(num))
    name = _name(params, cfg, method, start)
    costs = _measured.get(name)
    if costs is None and jax.process_count() == 1:  # or else some might know, and others not
        costs = _read(_file()).get(name)
    if costs is None:
        costs = measure(params, cfg, method, start(method))
        _keep(name, costs)
    _measured[name] = costs
    return _with(method, np.array(costs))


def measure(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> list[float]:
    """Seconds [K + 1] of a round, by choice.

    Args:
      params, cfg: the target.
      method: with a controller that has any costs.
      state: before the first round; it is given away.
    """
    controller = method.controller
    assert controller is not None and controller.costs is not None
    first = jax.device_get((state.length, state.has_stopped))
    seconds: list[list[float]] = [[] for _ in controller.costs]
    for repeat in range(-1, REPEATS):  # the first time is for compiling
        for choice, times in enumerate(seconds):
            length, has_stopped = map(jnp.array, first)
            state = state.replace(length=length, has_stopped=has_stopped)
            fixed = method.replace(controller=dataclasses.replace(controller, fixed=choice))
            jax.block_until_ready(state)
            began = time.perf_counter()
            state = jax.block_until_ready(decode(params, cfg, fixed, state, 1, FOREVER))
            if repeat >= 0:
                times.append(time.perf_counter() - began)
    costs = np.median(seconds, axis=1)
    if jax.process_count() > 1:  # all must choose alike
        costs = multihost_utils.broadcast_one_to_all(costs)
    return [float(x) for x in costs]


def _with(method: SpeculativeMethod, costs: np.ndarray) -> SpeculativeMethod:
    assert method.controller is not None
    known = dataclasses.replace(method.controller, costs=jnp.asarray(costs, jnp.float32))
    return method.replace(controller=known)


def _name(
    params: Params,
    cfg: ModelConfig,
    method: SpeculativeMethod,
    start: Callable[[SpeculativeMethod], SpeculativeState],
) -> str:
    """All that costs depend on, as a short word."""
    shapes = jax.tree.map(
        lambda x: (np.shape(x), str(np.result_type(x))),
        (params, method, jax.eval_shape(lambda: start(method))),
    )
    device, mesh = jax.devices()[0], jax.sharding.get_abstract_mesh()
    machine = device.platform, device.device_kind, os.cpu_count(), mesh
    about = jax.__version__, machine, cfg, shapes
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def _file() -> pathlib.Path | None:
    folder = jax.config.values["jax_compilation_cache_dir"]
    return pathlib.Path(folder) / FILE if folder and "://" not in folder else None


def _read(file: pathlib.Path | None) -> dict[str, list[float]]:
    if file is None or not file.is_file():
        return {}
    try:
        found: dict[str, list[float]] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # damaged: what it held is measured again
        return {}
    return found


def _keep(name: str, costs: list[float]) -> None:
    """Adds to the file, if there is one."""
    file = _file()
    if file is None or jax.process_index() != 0:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = _read(file) | {name: costs}
    beside = file.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(known, indent=1), encoding="utf-8")
    beside.replace(file)
