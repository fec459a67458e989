"""Which methods are measured: by name, or from a methods file.

A methods file (.yaml, .json, or
.py with `get_config()`) is a list, or has one under "methods", of points that change fields of
them:

    - {name: threshold, label: threshold 0.8, rule: {threshold: 0.8}, scheduler: {block_len: 16}}
    - {name: klass, family: klass dual, cache: dual}
    - {name: threshold, family: learn2pd, filter: runs/filter/model, rule: {threshold: 0.96}}

The last one has a filter (`configs/filter_learn2pd.py`) as its commit rule.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import runpy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from ml_collections import ConfigDict

import dlm
from decode.diffusion.components import AdaBlock, LearnedFilter
from decode.diffusion.points import METHODS, family_of, named, override
from decode.evaluation.job import Job, Point
from dlm.heads.learn2pd import load_filter

BASELINE = "one_per_step"


def points_by_name(names: Iterable[str], block_len: int) -> list[Point]:
    """Points of `decode/diffusion/points.py`."""
    return [Point(name, family_of(name), named(name, block_len)) for name in dict.fromkeys(names)]


def points_from_file(path: str, block_len: int, lm: dlm.LanguageModel | None = None) -> list[Point]:
    """Points of a methods file, see the top of this file.

    Filters must belong to `lm`.

    Raises:
      ValueError: it is not a list of changes to known methods.
      OSError: it cannot be read.
    """
    entries: Any
    if path.endswith(".py"):
        entries = runpy.run_path(path)["get_config"]()
        entries = entries.to_dict() if isinstance(entries, ConfigDict) else entries
    else:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        try:
            entries = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    entries = entries.get("methods") if isinstance(entries, Mapping) else entries
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError(f"{path} must be a list of methods, or have one under 'methods'")
    points = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise ValueError(f"{path}, method {i}: {entry!r} must be fields, among them a name")
        changes = dict(entry)
        name, label, family = (changes.pop(key, None) for key in ("name", "label", "family"))
        learned = changes.pop("filter", None)
        try:
            method = named(name, block_len)
            if learned is not None:
                method = method.replace(rule=LearnedFilter(load_filter(learned, lm)))
            method = override(method, changes)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}, method {i} ({name}): {error}") from error
        flat = [
            f"{key}={value}"
            for axis, change in changes.items()
            for key, value in (change.items() if isinstance(change, Mapping) else [(axis, change)])
        ]
        points.append(
            Point(str(label or " ".join([name, *flat])), str(family or family_of(name)), method)
        )
    return points


def make_points(
    job: Job, methods: Sequence[str] = (), methods_file: str = "", delimiter: str = ""
) -> tuple[list[Point], list[str]]:
    """The points to measure, baseline first, and one sentence for each that cannot be.

    Only methods that nobody asked for by name are left out; others raise.
    """
    if methods and methods_file:
        raise ValueError("give --methods or --methods_file, not both")
    own = points_from_file(methods_file, job.block_len, job.lm) if methods_file else []
    names = [] if own else (methods or METHODS)
    points = {p.label: p for p in points_by_name([BASELINE, *names], job.block_len)}
    for point in own:
        if point.label in points and point.label != BASELINE:
            raise ValueError(f"{methods_file} has two methods labelled {point.label!r}")
        points[point.label] = point
    kept, left_out = [], []
    for point in points.values():
        method, blocks = point.method, point.method.scheduler
        if isinstance(blocks, AdaBlock) and delimiter and not np.size(blocks.delimiter_ids):
            assert job.lm.tokenizer is not None
            ids = tuple(job.lm.tokenizer.encode(delimiter))
            method = method.replace(scheduler=dataclasses.replace(blocks, delimiter_ids=ids))
        try:
            method.validate(job.lm.cfg)
        except ValueError as error:
            if methods or methods_file:
                raise ValueError(f"{point.label}: {error}") from error
            left_out.append(f"{point.label} is left out: {error}")
        else:
            kept.append(dataclasses.replace(point, method=method))
    return kept, left_out
