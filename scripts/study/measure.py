"""Every system at every setting, and which of them is reported.

Each system is decoded at several settings. Which one is reported is decided on `--num_pick`
held-out examples, the rest of which are reported: of the settings within one point of the base
model's one-token-per-step accuracy, the one with the fewest forwards; if there is none, the most
accurate. So the base model's threshold is tuned as carefully as everything else. Published settings
are reported as well.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

import dlm
from decode.diffusion.components import (
    EntropyThreshold,
    Eos,
    Eotp,
    FixedBlocks,
    LearnedFilter,
    MultiBlock,
    Quota,
    Threshold,
)
from decode.diffusion.loop import DiffusionMethod
from decode.evaluation.job import Job, Point, make_job, measure_points
from dlm.heads.learn2pd import load_filter
from dlm.tasks.presets import TASKS

BASELINE = "base, one token per step"
# System -> what it is compared with; in the order of the table.
SYSTEMS = {
    "base + threshold": "confidence threshold on the base model",
    "base + entropy": "entropy threshold on the base model",
    "Learn2PD": "the filter on the base model",
    "Learn2PD + EoTP": "the filter, and the canvas cut at the end of the text",
    "dParallel": "entropy threshold on the certainty-forced model",
    "d3LLM": "entropy threshold on several blocks at once, on the pseudo-trajectory model",
}
PUBLISHED = {
    "base + threshold": "0.9",
    "base + entropy": "0.5",
    "Learn2PD": "0.96",
    "Learn2PD + EoTP": "0.96",
    "dParallel": "0.5",
    "d3LLM": "0.5",
}
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
ENTROPIES = (0.1, 0.3, 0.5, 0.7, 1.0, 1.5)
TAUS = (0.5, 0.7, 0.8, 0.9, 0.96, 0.99)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One system at one setting, on one seed.

    Attributes:
      system: key of `SYSTEMS`, or `BASELINE`.
      setting: its threshold, as text.
      score: per example, in [0, 1].
      forwards: per example.
      tokens: per example, up to end-of-text.
    """

    system: str
    setting: str
    score: np.ndarray
    forwards: np.ndarray
    tokens: np.ndarray

    def part(self, examples: slice) -> tuple[float, float]:
        """Accuracy in per cent and mean forwards over some examples."""
        return 100 * float(self.score[examples].mean()), float(self.forwards[examples].mean())


def points(system: str, block_len: int, lm: dlm.LanguageModel, folder: pathlib.Path) -> list[Point]:
    """A system at all its settings."""
    method = DiffusionMethod(FixedBlocks(block_len), stopper=Eos())
    rules: dict[str, Any]
    if system == BASELINE:
        return [Point(BASELINE, BASELINE, method.replace(rule=Quota(block_len)))]
    if system == "base + threshold":
        rules = {f"{t:g}": Threshold(t) for t in THRESHOLDS}
    elif system.startswith("Learn2PD"):
        learned = load_filter(folder / "learn2pd" / "model", lm)
        rules = {f"{t:g}": LearnedFilter(learned, t) for t in TAUS}
        if system.endswith("EoTP"):
            method = method.replace(stopper=Eotp())
    else:
        rules = {f"{t:g}": EntropyThreshold(t) for t in ENTROPIES}
        if system == "d3LLM":
            method = method.replace(scheduler=MultiBlock(block_len, 4, 0.5))
    return [Point(setting, system, method.replace(rule=rule)) for setting, rule in rules.items()]


def measure(task: str, folder: pathlib.Path, num_examples: int) -> list[Measured]:
    """All systems at all settings, on the same held-out examples."""
    models = {"dParallel": "dparallel", "d3LLM": "d3llm"}
    found = []
    jobs: dict[str, Job] = {}
    block_len = TASKS[task].block_len
    for system in (BASELINE, *SYSTEMS):
        model = models.get(system, "base")
        if model not in jobs:
            jobs[model] = make_job(
                dlm.load(folder / model / "model"),
                TASKS[task],
                num_examples=num_examples,
                block_len=block_len,
            )
        job = jobs[model]
        settings = points(system, block_len, job.lm, folder)
        for point in settings:
            point.method.validate(job.lm.cfg)
        records = measure_points(job, settings, folder / "measured.jsonl")
        for point, record in zip(settings, records, strict=True):
            per_example = record["score"], record["forwards"], record["tokens"]
            arrays = (np.asarray(values, float) for values in per_example)
            found.append(Measured(system, point.label, *arrays))
    return found


def pick(measured: Sequence[Measured], num_pick: int) -> dict[str, Measured]:
    """Per system, the setting to report, decided on the first `num_pick` examples."""
    examples = slice(num_pick)
    base = next(m for m in measured if m.system == BASELINE)
    needed = base.part(examples)[0] - 1
    picked = {BASELINE: base}
    for system in SYSTEMS:
        own = [m for m in measured if m.system == system]
        good = [m for m in own if m.part(examples)[0] >= needed]
        if good:
            picked[system] = min(good, key=lambda m: m.part(examples)[1])
        else:
            picked[system] = max(own, key=lambda m: m.part(examples)[0])
    return picked
