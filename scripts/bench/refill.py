"""Batches that stay full, against batches that wait for their slowest row.

Both decode the same prompts in the same number of rows, in the order in which they are asked:
`static` one batch after the other, `full` in a batch whose rows are replaced as they finish
(`decode.core.refill`). Seconds are wall time of everything but compiling: reading prompts, rounds,
swaps, texts. `occupancy` is the share of all rows' rounds in which a row had something to decode.

Prompts are those of `scripts.bench.prompts`. Diffusion checkpoints decode with `Threshold(0.9)`,
autoregressive ones with prompt lookup.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from decode.core.results import Completion
from decode.diffusion.components import Eos, FixedBlocks, Threshold
from decode.diffusion.loop import DiffusionMethod
from decode.evaluation.run import Answered, Method, answered, device
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.loop import SpeculativeMethod
from dlm.lm import LanguageModel

COLUMNS = ["method", "prompts", "rows", "same_answers", "forwards", "static_rounds", "full_rounds",
           "static_occupancy", "occupancy", "static_tokens_per_s", "tokens_per_s", "gain",
           "compile_s"]  # fmt: skip
NUM_DRAFTS = 3  # a window of 4, which on CPUs takes little longer than a token


def method_of(lm: LanguageModel, block_len: int) -> Method:
    """How a checkpoint is decoded."""
    if lm.cfg.never_causal or not lm.cfg.shifted_logits:
        return DiffusionMethod(FixedBlocks(block_len), rule=Threshold(0.9), stopper=Eos())
    return SpeculativeMethod(PromptLookup(num_drafts=NUM_DRAFTS))


def bench_refill(
    lm: LanguageModel,
    method: Method,
    prompts: list[list[int]],
    gen_len: int,
    rows: int,
    repeats: int,
) -> dict[str, Any]:
    """Both ways, in turn."""
    parts = {"static": range(0, len(prompts), rows), "full": range(1)}
    size = {"static": rows, "full": len(prompts)}
    found: dict[str, list[Answered]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    compile_s = 0.0
    for repeat in range(repeats + 1):
        for name in parts:
            found[name] = [
                answered(
                    lm, method, prompts[i : i + size[name]], gen_len=gen_len, seeds=i,
                    batch_size=rows,
                )
                for i in parts[name]
            ]  # fmt: skip
            took = sum(part.seconds for part in found[name])
            print(f"run {repeat} of {repeats}, {name}: {took:.1f} s", flush=True)
            compile_s += sum(part.compile_s for part in found[name])
            if repeat:  # the first one warms up
                seconds[name].append(took)
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    answers: dict[str, list[Completion]] = {
        name: [completion for part in of_parts for completion in part.completions]
        for name, of_parts in found.items()
    }
    rounds = {name: sum(part.rounds for part in of_parts) for name, of_parts in found.items()}
    tokens = sum(len(completion.tokens) for completion in answers["full"])
    forwards = [completion.num_forwards for completion in answers["full"]]
    is_same = all(
        a.canvas.tolist() == b.canvas.tolist() and a.num_forwards == b.num_forwards
        for a, b in zip(answers["full"], answers["static"], strict=True)
    )
    return {
        "case": "refill", "device": device(), "jax": jax.__version__, "dtype": lm.cfg.dtype,
        "method": "threshold 0.9"
        if isinstance(method, DiffusionMethod)
        else f"prompt lookup, {NUM_DRAFTS} drafts",
        "prompts": len(prompts), "gen_len": gen_len, "rows": rows, "same_answers": is_same,
        "forwards": round(float(np.mean(forwards)), 2),
        "static_rounds": rounds["static"], "full_rounds": rounds["full"],
        "static_occupancy": round(sum(forwards) / rows / rounds["static"], 3),
        "occupancy": round(sum(forwards) / rows / rounds["full"], 3),
        "static_tokens_per_s": round(tokens / median["static"], 1),
        "tokens_per_s": round(tokens / median["full"], 1),
        "gain": round(median["static"] / median["full"], 2),
        "seconds": seconds, "compile_s": round(compile_s, 2),
    }  # fmt: skip
