"""Every drafter on the same held-out prompts."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import dlm
from decode.evaluation.run import answered, device
from decode.speculative.contracts import Drafter
from decode.speculative.loop import SpeculativeMethod
from scripts.quickstart_spec.drafters import GEN_LEN, drafters, held_out_prompts


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One drafter on all held-out prompts.

    Attributes:
      drafter: its name.
      nodes: of a tree, the root included.
      is_identical: whether every text is that of plain decoding.
      acceptance_length: tokens per forward of the target.
      accepted: share of the forwards that accepted 0, 1, .. drafts.
      forwards: of the target, per text.
      draft_forwards: of a draft model, per text.
      tokens_per_s: tokens of all texts over the median wall time.
      seconds: median wall time, reading the prompts included and compilation excluded.
      compile_s: compilation.
      speedup: seconds of plain decoding over these.
    """

    drafter: str
    nodes: int
    is_identical: bool
    acceptance_length: float
    accepted: list[float]
    forwards: float
    draft_forwards: float
    tokens_per_s: float
    seconds: float
    compile_s: float
    speedup: float = 1.0


def measure(
    lm: dlm.LanguageModel,
    drafter: Drafter,
    prompts: list[list[int]],
    gen_len: int,
    batch_size: int,
    repeats: int,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What is to be known of one drafter, and the texts."""
    runs = [
        answered(lm, SpeculativeMethod(drafter), prompts, gen_len=gen_len, batch_size=batch_size)
        for _ in range(repeats)
    ]
    completions, compile_s = runs[-1].completions, runs[0].compile_s
    seconds = [run.seconds for run in runs]
    histogram = np.sum([np.asarray(c.acceptance_histogram) for c in completions], axis=0)
    num_tokens = sum(len(c.canvas) for c in completions)
    return {
        "nodes": drafter.num_nodes,
        "acceptance_length": float(
            (histogram * np.arange(1, len(histogram) + 1)).sum() / histogram.sum()
        ),
        "accepted": (histogram / histogram.sum()).tolist(),
        "forwards": float(np.mean([c.num_forwards for c in completions])),
        "draft_forwards": float(np.mean([c.draft_forwards for c in completions])),
        "tokens_per_s": num_tokens / float(np.median(seconds)),
        "seconds": float(np.median(seconds)),
        "compile_s": compile_s,
    }, [c.canvas for c in completions]


def about_run(task: str, seed: int, num_prompts: int, batch_size: int) -> dict[str, Any]:
    """What has to be said beside the measurements of one text and seed."""
    return {
        "task": task, "seed": seed, "num_prompts": num_prompts, "batch": batch_size,
        "gen_len": GEN_LEN[task], "dtype": "float32", "device": device(), "jax": jax.__version__,
    }  # fmt: skip


def study(
    task: str,
    folder: pathlib.Path,
    heads: list[str],
    num_prompts: int,
    batch_size: int,
    repeats: int,
) -> list[Measurement]:
    """Every drafter on the same held-out prompts."""
    lm = dlm.load(folder / "target" / "model")
    prompts = held_out_prompts(lm, task, num_prompts)
    found: list[Measurement] = []
    plain: list[np.ndarray] | None = None
    for name, drafter in (bar := tqdm(drafters(lm, folder, heads), unit="drafter")):
        bar.set_description(name)
        values, texts = measure(lm, drafter, prompts, GEN_LEN[task], batch_size, repeats)
        plain = texts if plain is None else plain
        same = all(np.array_equal(a, b) for a, b in zip(texts, plain, strict=True))
        speedup = found[0].seconds / values["seconds"] if found else 1.0
        found.append(Measurement(drafter=name, is_identical=same, speedup=speedup, **values))
    return found
