"""Each benchmark from its flags to what is printed."""

from __future__ import annotations

import dataclasses
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
    prompts,
    refill,
    search,
    spec,
    spec_bench,
    spec_report,
    train,
    windows,
)
from scripts.bench.timing import table
from scripts.compare_hf.decoders import NUM_DRAFTS, beside
from scripts.smollm2 import drafters
from train.host import set_up_process

Flags = Any  # absl's, by name


def _show(results: Iterable[dict[str, Any]], columns: dict[str, list[str]]) -> None:
    """Every result when it is there, and a table per case in the end."""
    found = []
    for result in results:
        print(json.dumps(result), flush=True)
        found.append(result)
    for case, of_case in columns.items():
        print("\n" + table(found, case, of_case))


def bench_decode(flags: Flags) -> None:
    cfg = models.model(flags.preset, flags.dtype)
    batches = [int(b) for b in flags.batch]
    results = decode.bench_decode(
        cfg, batches, flags.prompt_len, flags.gen_len, flags.block_len, flags.repeats
    )
    _show(results, {"step": decode.STEP_COLUMNS, "decode": decode.DECODE_COLUMNS})


def bench_train(flags: Flags) -> None:
    cfg = models.model(flags.preset, flags.dtype)
    sizes = max(int(b) for b in flags.batch), flags.prompt_len, flags.gen_len
    results = train.bench_train(flags.preset, cfg, sizes, flags.repeats)
    _show(results, {"train": train.COLUMNS})


def bench_spec(flags: Flags) -> None:
    cfg = dataclasses.replace(models.model(flags.preset, flags.dtype), mask_token_id=None)
    draft = models.draft_of(flags.preset, cfg)
    batches = [int(b) for b in flags.batch]
    results = spec.bench_spec(cfg, draft, batches, flags.prompt_len, flags.repeats)
    _show(results, {"spec": spec.COLUMNS})


def bench_windows(flags: Flags) -> None:
    cfg = dataclasses.replace(models.model(flags.preset, flags.dtype), mask_token_id=None)
    lm = models.load(flags.checkpoint, cfg, flags.dtype)
    _show(windows.bench_windows(lm, flags.repeats), {"windows": windows.COLUMNS})


def bench_refill(flags: Flags) -> None:
    try:
        lm = dlm.load(flags.checkpoint or "smollm2", dtype=flags.dtype or "float32")
        asked, gen_len = prompts.some_prompts(
            lm, flags.task, flags.prompts, flags.num_prompts, flags.gen_len, flags.block_len
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    method = refill.method_of(lm, flags.block_len)
    result = refill.bench_refill(lm, method, asked, gen_len, flags.rows, flags.repeats)
    _show([result], {"refill": refill.COLUMNS})


def bench_search(flags: Flags) -> None:
    try:
        lm = dlm.load(flags.checkpoint or "smollm2", dtype=flags.dtype or None)
        asked, _ = prompts.some_prompts(
            lm, flags.task, flags.prompts, flags.num_prompts, flags.gen_len
        )
        results = search.bench_search(
            lm, search.methods_of(flags.methods), asked, flags.gen_len, flags.repeats, flags.pythons
        )
        _show(results, {"search": search.COLUMNS})
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def bench_diffusion(flags: Flags) -> None:
    cfg = models.model(flags.preset, flags.dtype)
    try:
        results = [
            *diffusion.bench_diffusion(
                cfg, flags.code, flags.prompt_len, flags.gen_len, flags.block_len, flags.repeats
            )
        ]
    except ImportError as error:
        sys.exit(
            f"error: {error}: --code={flags.code!r} must be a folder with generate.py and model/, "
            "and the extra be installed, pip install -e '.[parity]'"
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    _show(results, {"diffusion": diffusion.COLUMNS})


def bench_kernels(flags: Flags) -> None:
    kernels.run(flags.toy, flags.calls, flags.only, flags.out, flags.repeats)


def bench_spec_bench(flags: Flags) -> None:
    set_up_process()  # programs are kept: there are many
    try:
        path = pathlib.Path(flags.checkpoint or "smollm2")
        lm = dlm.load(flags.checkpoint or "smollm2", dtype=flags.dtype or None)
        questions = prompts.read_questions(flags.prompts)
        asked = prompts.sample_prompts(lm, questions, flags.num_prompts, flags.gen_len)
        methods = spec_bench.methods_of(flags.drafters, flags.controller)
        if "input_guided" in flags.drafters and lm.tokenizer is not None:
            copies = InputGuided.between(lm.tokenizer, OPENING, CLOSING)
            methods |= spec_bench.both("input_guided", SpeculativeMethod(copies), flags.controller)
        as_many = NUM_DRAFTS | {"prompt lookup": PromptLookup().num_drafts}
        small = dlm.load(flags.draft, dtype=flags.dtype or None) if flags.draft else None
        if small is not None:
            dlm.check_same_tokens(small, lm)
            drafter = DraftModel(small.params, small.cfg, num_drafts=as_many["draft model"])
            methods |= spec_bench.both("draft model", SpeculativeMethod(drafter), flags.controller)
        if flags.trained:
            folder = pathlib.Path(flags.trained)
            if small is not None:
                raise ValueError(
                    f"--draft={flags.draft} and --trained={folder} may both have a draft model: "
                    "give one of them"
                )
            for name, trained in drafters.everything(lm, folder):
                methods |= spec_bench.both(name, SpeculativeMethod(trained), flags.controller)
            small = drafters.draft_of(lm, folder)
            as_many["draft model"] = drafters.CHAIN.depth
        others = beside(lm, small, flags.gen_len, as_many) if flags.transformers else {}
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}: install the extra, pip install -e '.[parity]'")
    found = []
    try:
        for m in spec_bench.measure(
            lm, methods, asked, flags.gen_len, flags.repeats, others, flags.log or None
        ):
            print(json.dumps(dataclasses.asdict(m)), flush=True)
            found.append(m)
    except (OSError, ValueError) as error:  # of the log; of transformers' process
        sys.exit(f"error: {error}")
    minutes = sum(m.took_s for m in found) / 60
    rows, num = spec_report.summary(found, asked), sum(map(len, asked.values()))
    page = [
        f"{path.name}, {num_params(lm.cfg) / 1e6:.0f} M parameters, {lm.cfg.dtype}, {device()}, "
        f"jax {jax.__version__}; {num} prompts of {pathlib.Path(flags.prompts).name}, first turns, "
        f"batch 1, greedy, at most {flags.gen_len} tokens; medians of {flags.repeats}; "
        f"{minutes:.0f} minutes.",
        spec_report.table(rows),
        *(f"- {sentence}" for sentence in spec_report.divergences(found)),
    ]
    print("\n" + "\n\n".join(page))
    if flags.out:
        out = pathlib.Path(flags.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "spec_bench.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        spec_report.draw(rows, out / "spec_bench.png")
        (out / "spec_bench.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


ALL: dict[str, Callable[[Flags], None]] = {
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
