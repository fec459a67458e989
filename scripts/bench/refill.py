"""Batches that stay full, against batches that wait for their slowest row.

Both decode the same prompts in the same number of rows, in the order in which they are asked:
`static` one batch after the other, `full` in a batch whose rows are replaced as they finish
(`decode.core.refill`). Seconds are wall time of everything but compiling: reading prompts, rounds,
swaps, texts. `occupancy` is the share of all rows' rounds in which a row had something to decode.

Prompts are held-out examples of a task, questions from a folder (see `scripts.bench.prompts`), or
passages of Python's standard library, of 40 to 900 characters: questions about them, or how they go
on if the checkpoint has no chat template. Diffusion checkpoints decode with `Threshold(0.9)`,
autoregressive ones with three drafts of prompt lookup.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np

import dlm
from decode.core.results import Completion
from decode.diffusion.components import Eos, FixedBlocks, Threshold
from decode.diffusion.loop import DiffusionMethod
from decode.evaluation.job import make_job
from decode.evaluation.run import Answered, Method, answered, device
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.loop import SpeculativeMethod
from dlm.lm import LanguageModel
from dlm.tasks.presets import TASKS, TaskPreset
from dlm.tasks.python_source import PythonSource
from scripts.bench.prompts import read_questions, sample_prompts
from scripts.bench.timing import table

COLUMNS = ["method", "prompts", "rows", "same_answers", "forwards", "static_rounds", "full_rounds",
           "static_occupancy", "occupancy", "static_tokens_per_s", "tokens_per_s", "gain",
           "compile_s"]  # fmt: skip


def run(
    checkpoint: str, task: str, folder: str, num: int, gen_len: int, block_len: int, rows: int,
    repeats: int,
) -> None:  # fmt: skip
    """Measures, and prints a line and a table.

    Args:
      checkpoint: for `dlm.load`.
      task: which held-out examples; "": others.
      folder: of questions; "": passages.
      num: prompts.
      gen_len: most tokens of an answer; tasks have their own.
      block_len: positions per block of diffusion checkpoints.
      rows: decoded at once.
      repeats: timed runs.

    Raises:
      ValueError: the folder has no questions, or the checkpoint no tokenizer.
    """
    lm = dlm.load(checkpoint, dtype="float32")
    if task:
        prompts, gen_len = of_task(lm, TASKS[task], num, block_len)
    elif folder:
        prompts = of_questions(lm, folder, num, gen_len)
    else:
        prompts = of_passages(lm, num)
    result = bench_refill(lm, method_of(lm, block_len), prompts, gen_len, rows, repeats)
    print(json.dumps(result), flush=True)
    print("\n" + table([result], "refill", COLUMNS))


def method_of(lm: LanguageModel, block_len: int) -> Method:
    """How a checkpoint is decoded."""
    if lm.cfg.never_causal or not lm.cfg.shifted_logits:
        return DiffusionMethod(FixedBlocks(block_len), rule=Threshold(0.9), stopper=Eos())
    return SpeculativeMethod(PromptLookup(num_drafts=3))  # a window of 4: on CPUs nearly a token's


def of_task(
    lm: LanguageModel, preset: TaskPreset, num: int, block_len: int
) -> tuple[list[list[int]], int]:
    """Prompts of held-out examples, and the length of answers."""
    job = make_job(lm, preset, num_examples=num, block_len=block_len)
    return list(job.prompts), job.gen_len


def of_questions(lm: LanguageModel, folder: str, num: int, gen_len: int) -> list[list[int]]:
    """Prompts of all categories in like parts, in no order."""
    questions = read_questions(folder)
    found = sample_prompts(lm, questions, -(-num // len(questions)), gen_len)
    prompts = [prompt for some in found.values() for prompt in some]
    return [prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))[:num]]


def of_passages(lm: LanguageModel, num: int) -> list[list[int]]:
    """Prompts of very different lengths, in no order."""
    if lm.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer to read passages with")
    rng = np.random.default_rng(0)
    prompts: list[list[int]] = []
    for chars in np.geomspace(40, 900, num).astype(int)[rng.permutation(num)]:
        passages = PythonSource(prompt_chars=int(chars), split="test")
        text = passages[int(rng.integers(len(passages)))].prompt
        if lm.tokenizer.chat_template is not None:
            asked = f"What does this Python code do?\n\n{text}"
            text = lm.tokenizer.apply_chat_template([{"role": "user", "content": asked}])
        prompts.append(lm.tokenizer.encode(text, whole=True))
    return prompts


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
        "method": "threshold 0.9" if isinstance(method, DiffusionMethod) else "prompt lookup",
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
