"""What a round costs on this device, by width: the table that a controller chooses by.

Rounds of the very program that decodes are timed, one choice after the other, so nothing else is
compiled. What the narrowest round with drafts takes longer than one without is shared out among the
forwards of the drafter's own in it; those in wider ones are taken off. The table lies beside JAX's
compilation cache, if there is one, under all that it depends on: device, model, method and shapes,
and the sources of this library.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
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
    method = _with(method, [1.0] * num, 0.0, 0.0)
    name = _name(params, cfg, method, start)
    found = _measured.get(name)
    if found is None and jax.process_count() == 1:  # or else some might know, and others not
        found = _read(_file()).get(name)
    if found is None:
        found = measure(params, cfg, method, start(method))
        _keep(name, found)
    _measured[name] = found
    return _with(method, found[:num], *found[num:])


def measure(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> list[float]:
    """What `Controller` says of `costs`, K + 1 numbers, of `draft_cost` and of `draft_forwards`.

    Args:
      params, cfg: the target.
      method: with a controller that has any costs.
      state: before the first round; it is given away.
    """
    controller = method.controller
    assert controller is not None and controller.costs is not None
    first = jax.device_get((state.length, state.has_stopped, state.draft_forwards))
    seconds: list[list[float]] = [[] for _ in controller.costs]
    forwards: list[list[int]] = [[] for _ in controller.costs]
    for repeat in range(-1, REPEATS):  # the first time is for compiling
        for choice, times in enumerate(seconds):
            length, has_stopped, made = map(jnp.array, first)
            state = state.replace(length=length, has_stopped=has_stopped, draft_forwards=made)
            fixed = method.replace(controller=dataclasses.replace(controller, fixed=choice))
            jax.block_until_ready(state)
            began = time.perf_counter()
            state = jax.block_until_ready(decode(params, cfg, fixed, state, 1, FOREVER))
            if repeat >= 0:
                times.append(time.perf_counter() - began)
                forwards[choice].append(int((state.draft_forwards - jnp.array(first[2])).max()))
    found = without_forwards(np.median(seconds, axis=1), np.median(forwards, axis=1))
    if jax.process_count() > 1:  # all must choose alike
        found = multihost_utils.broadcast_one_to_all(found)
    return [float(x) for x in found]


def without_forwards(seconds: np.ndarray, forwards: np.ndarray) -> np.ndarray:
    """Costs but for the drafter's own forwards, what one of these takes, and how many there were.

    Args:
      seconds: [K + 1], of a round without drafts, and by width.
      forwards: [K + 1], of the drafter's own, in each.

    Returns:
      [K + 3].
    """
    each = max(seconds[1] - seconds[0], 0.0) / forwards[1] if forwards[1] else 0.0
    costs = np.maximum(seconds - each * forwards, min(seconds))
    return np.array([*costs, each, forwards[1]])


def _with(
    method: SpeculativeMethod, costs: Sequence[float], draft_cost: float, draft_forwards: float
) -> SpeculativeMethod:
    assert method.controller is not None
    known = dataclasses.replace(
        method.controller,
        costs=jnp.asarray(costs, jnp.float32),
        draft_cost=jnp.asarray(draft_cost, jnp.float32),
        draft_forwards=jnp.asarray(draft_forwards, jnp.float32),
    )
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
    about = _sources(), jax.__version__, machine, cfg, shapes
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


@functools.cache
def _sources() -> str:
    """Of what runs in a round: another version may be faster."""
    digest, root = hashlib.sha256(), pathlib.Path(__file__).parents[2]
    for package in ("decode", "dlm", "kernels_pallas"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


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
