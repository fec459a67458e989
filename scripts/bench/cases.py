"""Each benchmark from the flags that it reads, its arguments, to what is printed."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax

import dlm
from decode.evaluation.run import device
from decode.speculative.drafters.draft_model import DraftModel
from decode.speculative.drafters.input_guided import InputGuided
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.loop import SpeculativeMethod
from dlm.params import num_params
from dlm.tasks.rewriting import CLOSING, OPENING
from scripts.bench import (
    decode,
    diffusion,
    kernels,
    models,
    refill,
    search,
    spec,
    spec_bench,
    spec_report,
    train,
    windows,
)
from scripts.bench.prompts import read_questions, sample_prompts, some_prompts
from scripts.bench.timing import table
from scripts.compare_hf.decoders import NUM_DRAFTS, beside
from scripts.smollm2.drafters import CHAIN, draft_of, everything
from train.host import set_up_process


def _show(results: Iterable[dict[str, Any]], columns: dict[str, list[str]]) -> None:
    """Every result when it is there, and a table per case in the end."""
    found = []
    for result in results:
        print(json.dumps(result), flush=True)
        found.append(result)
    for case, of_case in columns.items():
        print("\n" + table(found, case, of_case))


def bench_decode(
    *, preset: str, dtype: str, batch: list[str], prompt_len: int, gen_len: int, block_len: int,
    repeats: int,
) -> None:  # fmt: skip
    cfg = models.model(preset, dtype)
    batches = [int(b) for b in batch]
    results = decode.bench_decode(cfg, batches, prompt_len, gen_len, block_len, repeats)
    _show(results, {"step": decode.STEP_COLUMNS, "decode": decode.DECODE_COLUMNS})


def bench_train(
    *, preset: str, dtype: str, batch: list[str], prompt_len: int, gen_len: int, repeats: int,
) -> None:  # fmt: skip
    cfg = models.model(preset, dtype)
    sizes = max(int(b) for b in batch), prompt_len, gen_len
    results = train.bench_train(preset, cfg, sizes, repeats)
    _show(results, {"train": train.COLUMNS})


def bench_spec(
    *, preset: str, dtype: str, batch: list[str], prompt_len: int, repeats: int,
) -> None:  # fmt: skip
    cfg = dataclasses.replace(models.model(preset, dtype), mask_token_id=None)
    draft = models.draft_of(preset, cfg)
    batches = [int(b) for b in batch]
    results = spec.bench_spec(cfg, draft, batches, prompt_len, repeats)
    _show(results, {"spec": spec.COLUMNS})


def bench_windows(
    *, preset: str, dtype: str, checkpoint: str, repeats: int,
) -> None:  # fmt: skip
    if checkpoint and preset != "bench":
        sys.exit(f"error: --checkpoint={checkpoint} and --preset={preset} both say the model")
    cfg = dataclasses.replace(models.model(preset, dtype), mask_token_id=None)
    lm = models.load(checkpoint, cfg, dtype)
    _show(windows.bench_windows(lm, repeats), {"windows": windows.COLUMNS})


def bench_refill(
    *, checkpoint: str, dtype: str, task: str, prompts: str, num_prompts: int, gen_len: int,
    block_len: int, rows: int, repeats: int,
) -> None:  # fmt: skip
    try:
        lm = dlm.load(checkpoint or "smollm2", dtype=dtype or "float32")
        asked, gen_len = some_prompts(lm, task, prompts, num_prompts, gen_len, block_len)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    method = refill.method_of(lm, block_len)
    result = refill.bench_refill(lm, method, asked, gen_len, rows, repeats)
    _show([result], {"refill": refill.COLUMNS})


def bench_search(
    *, checkpoint: str, dtype: str, task: str, prompts: str, num_prompts: int, gen_len: int,
    methods: list[str], pythons: list[str], repeats: int,
) -> None:  # fmt: skip
    try:
        lm = dlm.load(checkpoint or "smollm2", dtype=dtype or None)
        asked, _ = some_prompts(lm, task, prompts, num_prompts, gen_len)
        results = search.bench_search(
            lm, search.methods_of(methods), asked, gen_len, repeats, pythons
        )
        _show(results, {"search": search.COLUMNS})
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def bench_diffusion(
    *, preset: str, dtype: str, code: str, prompt_len: int, gen_len: int, block_len: int,
    repeats: int,
) -> None:  # fmt: skip
    cfg = models.model(preset, dtype)
    try:
        results = [*diffusion.bench_diffusion(cfg, code, prompt_len, gen_len, block_len, repeats)]
    except ImportError as error:
        sys.exit(
            f"error: {error}: --code={code!r} must be a folder with generate.py and model/, "
            "and the extra be installed, pip install -e '.[parity]'"
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    _show(results, {"diffusion": diffusion.COLUMNS})


def bench_kernels(
    *, toy: bool, calls: int, only: str, out: str | None, repeats: int,
) -> None:  # fmt: skip
    kernels.run(toy, calls, only, out, repeats)


def bench_spec_bench(
    *, checkpoint: str, dtype: str, prompts: str, num_prompts: int, gen_len: int,
    drafters: list[str], controller: list[str], draft: str, trained: str, transformers: bool,
    repeats: int, log: str, out: str | None,
) -> None:  # fmt: skip
    set_up_process()  # programs are kept: there are many
    try:
        path = pathlib.Path(checkpoint or "smollm2")
        lm = dlm.load(checkpoint or "smollm2", dtype=dtype or None)
        questions = read_questions(prompts)
        asked = sample_prompts(lm, questions, num_prompts, gen_len)
        methods = spec_bench.methods_of(drafters, controller)
        if "input_guided" in drafters and lm.tokenizer is not None:
            copies = InputGuided.between(lm.tokenizer, OPENING, CLOSING)
            methods |= spec_bench.both("input_guided", SpeculativeMethod(copies), controller)
        as_many = NUM_DRAFTS | {"prompt lookup": PromptLookup().num_drafts}
        small = dlm.load(draft, dtype=dtype or None) if draft else None
        if small is not None:
            dlm.check_same_tokens(small, lm)
            drafter = DraftModel(small.params, small.cfg, num_drafts=as_many["draft model"])
            methods |= spec_bench.both("draft model", SpeculativeMethod(drafter), controller)
        if trained:
            folder = pathlib.Path(trained)
            if small is not None:
                raise ValueError(
                    f"--draft={draft} and --trained={folder} may both have a draft model: "
                    "give one of them"
                )
            for name, ready in everything(lm, folder):
                methods |= spec_bench.both(name, SpeculativeMethod(ready), controller)
            small = draft_of(lm, folder)
            as_many["draft model"] = CHAIN.depth
        others = beside(lm, small, gen_len, as_many) if transformers else {}
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}: install the extra, pip install -e '.[parity]'")
    found = []
    try:
        for m in spec_bench.measure(lm, methods, asked, gen_len, repeats, others, log or None):
            print(json.dumps(dataclasses.asdict(m)), flush=True)
            found.append(m)
    except (OSError, ValueError) as error:  # of the log; of transformers' process
        sys.exit(f"error: {error}")
    minutes = sum(m.took_s for m in found) / 60
    rows, num = spec_report.summary(found, asked), sum(map(len, asked.values()))
    page = [
        f"{path.name}, {num_params(lm.cfg) / 1e6:.0f} M parameters, {lm.cfg.dtype}, {device()}, "
        f"jax {jax.__version__}; {num} prompts of {pathlib.Path(prompts).name}, first turns, "
        f"batch 1, greedy, at most {gen_len} tokens; medians of {repeats}; "
        f"{minutes:.0f} minutes.",
        spec_report.table(rows),
        *(f"- {sentence}" for sentence in spec_report.divergences(found)),
    ]
    print("\n" + "\n\n".join(page))
    if out:
        folder = pathlib.Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spec_bench.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        spec_report.draw(rows, folder / "spec_bench.png")
        (folder / "spec_bench.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


ALL: dict[str, Callable[..., None]] = {
    "decode": bench_decode,
    "train": bench_train,
    "spec": bench_spec,
    "spec_bench": bench_spec_bench,
    "windows": bench_windows,
    "refill": bench_refill,
    "search": bench_search,
    "diffusion": bench_diffusion,
    "kernels": bench_kernels,
}


def flags_of(*names: str) -> set[str]:
    """The flags that benchmarks read."""
    return {flag for name in names for flag in inspect.signature(ALL[name]).parameters}
