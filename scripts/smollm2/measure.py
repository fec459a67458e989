"""Spec-Bench's prompts, with the drafters there are for SmolLM2, and a page about it.

Where torch and transformers are installed their `generate` decodes the same prompts in the same
turns: plainly, with prompt lookup, and assisted by the trained draft model, with as many drafts.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax

import dlm
from decode.evaluation.run import device
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.loop import SpeculativeMethod
from scripts.bench import spec_bench, spec_report
from scripts.bench.prompts import read_questions, sample_prompts
from scripts.compare_hf.decoders import beside
from scripts.smollm2 import training
from scripts.smollm2.drafters import CHAIN, draft_of, trained

UNTRAINED = ["prompt_lookup", "suffix", "token_recycling"]
GEN_LEN = 64  # tokens
TRAINING = """## Training

Tokens per forward of the target that chains of drafts would give, its own one included, on answers
that were held back: every token begins a round, of as many drafts as one makes (masks three, DFlash
seven, others four).

![Tokens per forward by training steps](smollm2_training.png)"""


def measure(
    lm: dlm.LanguageModel, folder: pathlib.Path, prompts: str, num: int, repeats: int, out: str
) -> None:
    """Measures, prints, and writes smollm2.md and .json and their figures into `out`.

    Args:
      lm: SmolLM2.
      folder: of the trained drafters; its measured.jsonl has what was measured, so that a run
        that is interrupted goes on.
      prompts: folder of question*.jsonl.
      num: prompts per category.
      repeats: timed runs of each.
      out: folder of the page.

    Raises:
      ValueError: there are no such prompts, or a drafter was trained for another model.
    """
    asked = sample_prompts(lm, read_questions(prompts), num, GEN_LEN)
    methods = spec_bench.methods_of(UNTRAINED, ["off", "on"])
    for name, drafter in trained(lm, folder):
        methods |= spec_bench.both(name, SpeculativeMethod(drafter), ["off", "on"])
    try:
        as_many = {"draft model": CHAIN.depth, "prompt lookup": PromptLookup().num_drafts}
        others = beside(lm, draft_of(lm, folder), GEN_LEN, as_many)
    except ImportError as error:
        print(f"transformers is left out: {error}; it is in the extra, pip install -e '.[parity]'")
        others = {}
    found = []
    for m in spec_bench.measure(
        lm, methods, asked, GEN_LEN, repeats, others, folder / "measured.jsonl"
    ):
        print(json.dumps(dataclasses.asdict(m)), flush=True)
        found.append(m)
    minutes = sum(m.took_s for m in found) / 60
    rows = spec_report.summary(found, asked)
    root = pathlib.Path(out)
    root.mkdir(parents=True, exist_ok=True)
    (root / "smollm2.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    spec_report.draw(rows, root / "smollm2.png")
    page = _page(lm, rows, spec_report.divergences(found), num, repeats, minutes)
    if curves := training.curves(folder):
        (root / "smollm2_training.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
        training.draw(curves, root / "smollm2_training.png")
        page += f"\n{TRAINING}\n\n{training.table(folder)}\n"
    (root / "smollm2.md").write_text(page, encoding="utf-8")
    print("\n" + page)


def _page(
    lm: dlm.LanguageModel, rows: list[dict[str, Any]], partings: list[str], num: int, repeats: int,
    minutes: float,
) -> str:  # fmt: skip
    about = (
        f"SmolLM2-135M-Instruct, {lm.cfg.dtype}, {device()}, jax {jax.__version__}; {num} prompts "
        f"of each of Spec-Bench's categories, first turns, batch 1, greedy, at most {GEN_LEN} "
        f"tokens; timed runs of each: {repeats}; measured in {minutes:.0f} minutes."
    )
    return "\n\n".join(
        [
            "# Drafters for SmolLM2",
            "Written by `python -m scripts.smollm2 --steps=measure`; its docstring says how the "
            "drafters were made, `configs/smollm2.py` how they were trained, and "
            "`scripts/bench/spec_report.py` what the columns mean.",
            about,
            "![Share of plain decoding by drafter and category](smollm2.png)",
            "## Over all categories",
            spec_report.table([row for row in rows if row["category"] == "all"]),
            "\n".join(f"- {sentence}" for sentence in partings) or "All texts are the same.",
            "## By category",
            "Tokens per forward, and behind the colon the share of plain decoding's speed.",
            spec_report.by_category(rows, controlled=False),
            "With a controller:",
            spec_report.by_category(rows, controlled=True),
        ]
    ) + "\n"  # fmt: skip
