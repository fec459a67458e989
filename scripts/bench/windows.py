"""What a forward costs by the width of its window and by the length of the text behind it.

A token (width 1), what drafters ask (4, 8, 32), and reading a whole prompt; where transformers and
torch are installed (the extra `parity`), the same weights and windows there, in turn. A forward
ends with the most probable token at each of its positions; that of a prompt at its last, there, and
with none here. `floor_ms` is what the operations and the bytes that cannot be avoided take at the
device's best; `over_short` is the time over that behind the shortest text, measured in turn.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dlm
from decode.speculative.loop import SpeculativeMethod, init_state, prefill
from dlm import vocab
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.lm import LanguageModel
from dlm.models.decoder import forward
from dlm.params import Params
from dlm.window import Slots, Window
from scripts.bench.timing import forward_cost, measure_ceilings, paired_medians_s

WIDTHS, CONTEXTS = (1, 4, 8, 32), (100, 1000, 3000)
COLUMNS = [
    "window", "behind", "ms", "floor_ms", "over_short", "transformers_ms", "share", "compile_s",
]  # fmt: skip
FORWARDS_PER_CALL = 8  # dispatch from Python is no part of a round

Run = Callable[[], Any]


def bench_windows(lm: LanguageModel, repeats: int) -> Iterator[dict[str, Any]]:
    """A result per width, per length behind a token, and of the longest read as a prompt.

    Args:
      lm: an autoregressive model.
      repeats: timed runs.
    """
    cfg, ceilings = lm.cfg, measure_ceilings(lm.cfg.dtype, repeats)
    contexts = [n for n in CONTEXTS if n + max(WIDTHS) <= cfg.max_seq_len]
    cases = [*((width, contexts[0]) for width in WIDTHS), *((1, n) for n in contexts[1:])]
    prompt = np.random.default_rng(0).integers(0, cfg.vocab_size - 2, contexts[-1]).tolist()
    theirs = _Theirs(lm) if importlib.util.find_spec("transformers") else None

    def result(width: int, behind: int, runs: dict[str, Run], forwards: int) -> dict[str, Any]:
        began = time.perf_counter()
        jax.block_until_ready(runs["ours"]())
        compile_s = time.perf_counter() - began
        medians = paired_medians_s(runs, repeats)
        ours, other = medians["ours"] / forwards, medians.get("theirs")
        flops, num_bytes = forward_cost(cfg, 1, width, behind, width if behind else 0)
        floor_s = max(flops / ceilings.flops_per_s, num_bytes / ceilings.bytes_per_s)
        return {
            "case": "windows", "device": jax.devices()[0].device_kind, "jax": jax.__version__,
            "dtype": cfg.dtype, "ceiling_gflops": round(ceilings.flops_per_s / 1e9, 1),
            "ceiling_gb_per_s": round(ceilings.bytes_per_s / 1e9, 1),
            "window": width, "behind": behind, "ms": round(1e3 * ours, 1),
            "floor_ms": round(1e3 * floor_s, 1),
            "over_short": round(medians["ours"] / medians["short"], 3) if "short" in runs else None,
            "transformers_ms": None if other is None else round(1e3 * other, 1),
            "share": None if other is None else round(ours / other, 3),
            "compile_s": round(compile_s, 1),
        }  # fmt: skip

    short = _ours(lm.params, cfg, prompt[: contexts[0]], 1)
    for width, behind in cases:
        runs = {"ours": _ours(lm.params, cfg, prompt[:behind], width)}
        if behind > contexts[0]:
            runs["short"] = short
        if theirs is not None:
            runs["theirs"] = theirs.window(prompt[:behind], width)
        yield result(width, behind, runs, FORWARDS_PER_CALL)
    runs = {"ours": lambda: _read(lm, prompt)}
    if theirs is not None:
        runs["theirs"] = lambda: theirs.read(prompt)
    yield result(len(prompt), 0, runs, 1)


def _ours(params: Params, cfg: ModelConfig, text: list[int], width: int) -> Run:
    """`FORWARDS_PER_CALL` windows behind a text that is in the cache."""
    state = init_state(cfg, SpeculativeMethod(), [[*text, 0]], gen_len=width)
    cache = [prefill(params, cfg, SpeculativeMethod(), state).cache]
    tokens, start = jnp.zeros((1, width), jnp.int32), jnp.array([len(text)], jnp.int32)

    def run() -> jax.Array:
        found, cache[0] = _forwards(params, cfg, cache[0], tokens, start)
        return found

    return run


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("cache",))
def _forwards(
    params: Params, cfg: ModelConfig, cache: KVCache, tokens: jax.Array, start: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Windows one after the other, in the same place; each is what the one before found."""

    def body(_: int, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        tokens, cache = carry
        window = Window.at(tokens, start, is_causal=True)
        out = forward(params, cfg, window, Slots.append(cache, start))
        assert out.cache is not None
        return vocab.read(vocab.head(params), out.hidden).token, out.cache

    return jax.lax.fori_loop(0, FORWARDS_PER_CALL, body, (tokens, cache))


def _read(lm: LanguageModel, prompt: list[int]) -> jax.Array:
    """Reads a prompt into a fresh cache."""
    state = init_state(lm.cfg, SpeculativeMethod(), [[*prompt, 0]], gen_len=1)
    return prefill(lm.params, lm.cfg, SpeculativeMethod(), state).cache.k


class _Theirs:
    """The same weights in transformers, in a process of its own: threads would compete."""

    def __init__(self, lm: LanguageModel) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.folder = tempfile.TemporaryDirectory()
        dlm.save(f"{self.folder.name}/model", lm)
        arguments = there, f"{self.folder.name}/model", lm.cfg.dtype
        context.Process(target=_serve, args=arguments, daemon=True).start()

    def read(self, text: list[int]) -> None:
        """Makes the cache of a text."""
        self._ask(text)

    def window(self, text: list[int], width: int) -> Run:
        """One window behind a text that is in the cache."""
        self.read(text)
        return lambda: self._ask(width)

    def _ask(self, what: list[int] | int) -> None:
        self.pipe.send(what)
        self.pipe.recv()


def _serve(pipe: Connection, folder: str, dtype: str) -> None:
    """Reads texts that are sent, and windows of a width behind them, until nobody asks."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    cache = DynamicCache()
    with torch.inference_mode():
        while True:
            try:
                asked = pipe.recv()
            except EOFError:
                return
            if isinstance(asked, int):
                tokens = torch.zeros((1, asked), dtype=torch.long)
                model(tokens, past_key_values=cache, use_cache=True).logits.argmax(-1)
                cache.crop(-asked)
            else:
                cache = DynamicCache()
                tokens = torch.tensor([asked])
                model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            pipe.send(None)
