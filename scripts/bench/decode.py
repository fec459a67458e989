"""Decode steps of every cache against a bare forward of the same window, and whole decodes.

The bytes and operations a forward needs are counted from the shapes, so `roofline_share` says how
much of the time is unavoidable on this device.
"""

from __future__ import annotations

import functools
import resource
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from decode.diffusion.components import FixedBlocks, Quota, Threshold, by_name
from decode.diffusion.loop import DiffusionMethod, DiffusionState, init_state, step
from decode.evaluation.run import Programs, timed
from dlm import vocab
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.lm import LanguageModel
from dlm.models.decoder import forward
from dlm.params import Params, num_params
from dlm.window import Slots, Window
from scripts.bench.models import random_params
from scripts.bench.timing import Ceilings, forward_cost, measure_ceilings, paired_medians_s

STEP_COLUMNS = ["batch", "cache", "window", "step_ms", "bare_forward_ms", "step_over_bare", "bound",
                "roofline_share"]  # fmt: skip
DECODE_COLUMNS = ["batch", "cache", "rule", "compile_s", "seconds", "tokens_per_s",
                  "forwards_per_row", "peak_memory_mb"]  # fmt: skip

STEPS_PER_CALL = 4  # the loop's own overhead is part of a step; dispatch from Python is not


def bench_decode(
    cfg: ModelConfig,
    batches: list[int],
    prompt_len: int,
    gen_len: int,
    block_len: int,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """Results of every batch size.

    Args:
      cfg: the model, whose weights are random.
      batches: rows.
      prompt_len, gen_len, block_len: tokens.
      repeats: timed runs.
    """
    ceilings = measure_ceilings(cfg.dtype, repeats)
    for batch in tqdm(batches, desc="batch sizes"):
        yield from _bench_batch(cfg, batch, prompt_len, gen_len, block_len, repeats, ceilings)


def _bench_batch(
    cfg: ModelConfig,
    batch: int,
    prompt_len: int,
    gen_len: int,
    block_len: int,
    repeats: int,
    ceilings: Ceilings,
) -> list[dict[str, Any]]:
    """One step of every cache against a bare forward of the same window, and whole decodes."""
    params = random_params(cfg)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, cfg.vocab_size - 2, (batch, prompt_len)).tolist()
    canvas = prompt_len + gen_len
    about = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "dtype": cfg.dtype,
        "params_m": round(num_params(cfg) / 1e6, 1), "batch": batch, "prompt_len": prompt_len,
        "gen_len": gen_len, "block_len": block_len,
        "ceiling_gflops": round(ceilings.flops_per_s / 1e9, 1),
        "ceiling_gb_per_s": round(ceilings.bytes_per_s / 1e9, 1),
    }  # fmt: skip
    results = []
    windows = {"none": (canvas, 0), "prefix": (gen_len, prompt_len),
               "dual": (block_len, canvas - block_len)}  # fmt: skip
    for cache, (window, cached) in windows.items():
        method = DiffusionMethod(
            scheduler=FixedBlocks(block_len), cache=by_name("cache", cache), rule=Threshold(0.9)
        )
        state = init_state(cfg, method, prompts, gen_len=gen_len)
        if cache != "none":  # past the refresh, so that the timed step is a window forward
            state = jax.jit(step, static_argnames=("cfg",))(params, cfg, method, state)
        one_step = functools.partial(
            jax.jit(repeat_step, static_argnames=("cfg",)), params, cfg, method, state
        )
        bare = functools.partial(
            jax.jit(_repeat_bare, static_argnames=("cfg", "window", "judged")),
            params, cfg, state, None if cache == "none" else state.cache.kv, window=window,
            judged=block_len,
        )  # fmt: skip
        medians = paired_medians_s({"step": one_step, "bare": bare}, repeats)
        medians = {name: seconds / STEPS_PER_CALL for name, seconds in medians.items()}
        flops, num_bytes = forward_cost(cfg, batch, window, cached, block_len)
        floor_s = max(flops / ceilings.flops_per_s, num_bytes / ceilings.bytes_per_s)
        results.append(about | {
            "case": "step", "cache": cache, "window": window,
            "step_ms": round(1e3 * medians["step"], 3),
            "bare_forward_ms": round(1e3 * medians["bare"], 3),
            "step_over_bare": round(medians["step"] / medians["bare"], 3),
            "bound": "compute" if flops / ceilings.flops_per_s == floor_s else "bandwidth",
            "roofline_share": round(floor_s / medians["step"], 3),
        })  # fmt: skip
        # Random weights are never sure: a quota fixes the number of forwards instead.
        quota = method.replace(rule=Quota(block_len // 4))
        results.append(about | _bench_whole(params, cfg, quota, prompts, gen_len, cache, repeats))
    return results


def repeat_step(
    params: Params, cfg: ModelConfig, method: DiffusionMethod, state: DiffusionState
) -> jax.Array:
    """Decode steps; each starts from the same state, so all of them are window forwards."""

    def body(_: int, tokens: jax.Array) -> jax.Array:
        return step(params, cfg, method, state.replace(tokens=tokens)).tokens

    return jax.lax.fori_loop(0, STEPS_PER_CALL, body, state.tokens)


def _repeat_bare(
    params: Params, cfg: ModelConfig, state: DiffusionState, cache: KVCache | None, window: int,
    judged: int,
) -> jax.Array:  # fmt: skip
    """Forwards over a window of that size, with the arg-max of `judged` positions each."""
    P = state.prompt_len
    start = state.tokens.shape[1] - window if window != judged else P
    batch, canvas = state.tokens.shape
    slots = None
    if cache is not None:
        one = [[0, start]] if window != judged else [[0, start], [start + window, canvas]]
        slots = Slots(cache, jnp.array([one] * batch))

    def body(_: int, tokens: jax.Array) -> jax.Array:
        shown = Window.at(tokens[:, start : start + window], jnp.full(batch, start))
        hidden = forward(params, cfg, shown, slots).hidden[:, -judged:]
        best = vocab.read(vocab.head(params), hidden).token
        return tokens.at[:, start : start + judged].set(best)

    return jax.lax.fori_loop(0, STEPS_PER_CALL, body, state.tokens)


def _bench_whole(
    params: Params,
    cfg: ModelConfig,
    method: DiffusionMethod,
    prompts: list[list[int]],
    gen_len: int,
    cache: str,
    repeats: int,
) -> dict[str, Any]:
    lm = LanguageModel(params, cfg)
    programs: Programs = {}
    runs = [
        timed(lm, method, prompts, gen_len=gen_len, programs=programs) for _ in range(repeats + 1)
    ]
    seconds = float(np.median([run.seconds for run in runs[1:]]))
    forwards = [completion.num_forwards for completion in runs[-1].completions]
    return {
        "case": "decode", "cache": cache, "rule": type(method.rule).__name__.lower(),
        "compile_s": round(runs[0].compile_s, 2), "seconds": round(seconds, 4),
        "tokens_per_s": round(len(prompts) * gen_len / seconds, 1),
        "forwards_per_row": round(float(np.mean(forwards)), 2),
        "peak_memory_mb": round(_peak_bytes() / 2**20, 1),
    }  # fmt: skip


def _peak_bytes() -> float:
    """Of the device where it says so, else of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
