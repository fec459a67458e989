"""Block diffusion beside a public code base: the same weights, prompts and tokens, in turns.

    git clone https://github.com/NVlabs/Fast-dLLM
    pip install 'transformers==4.49.*'      # for which that code is, and the extra `parity`
    python -m scripts.bench diffusion --code=Fast-dLLM/llada

The folder has `generate.py` and `model/`, of which `_theirs` knows the names; nothing of it is kept
here. Weights are random, so a quota of tokens per step decides, and texts are compared. Batch 1,
which is what that code decodes.
"""

from __future__ import annotations

import importlib
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
from tqdm import tqdm

import dlm
from decode.diffusion.public.fast_dllm import fast_dllm
from decode.evaluation.run import Programs, device, timed
from dlm.config import ModelConfig
from dlm.lm import LanguageModel
from dlm.params import num_params
from scripts.bench.models import random_params

COLUMNS = ["cache", "tokens_per_step", "tokens_per_s", "their_tokens_per_s", "ratio", "same_text"]
TOKENS_PER_STEP = 2
# By cache: their function, and what ours is called with.
CACHES: dict[str, tuple[str, dict[str, bool]]] = {
    "none": ("generate", {}),
    "prefix": ("generate_with_prefix_cache", {"use_cache": True}),
    "dual": ("generate_with_dual_cache", {"use_cache": True, "dual_cache": True}),
}
Decoder = Callable[[list[int]], tuple[list[int], float]]  # the completion, and seconds


def bench_diffusion(
    cfg: ModelConfig, code: str, prompt_len: int, gen_len: int, block_len: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """A result per cache.

    Args:
      cfg: a LLaDA-shaped model.
      code: the folder.
      prompt_len, gen_len, block_len: tokens.
      repeats: timed runs of each.

    Raises:
      ImportError: there is no such code, or no torch.
      ValueError: the code does not load a checkpoint here.
    """
    lm = LanguageModel(random_params(cfg), cfg)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, cfg.vocab_size - 2, (repeats, prompt_len)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        dlm.save(pathlib.Path(folder) / "model", lm)
        theirs = dict(_theirs(code, pathlib.Path(folder) / "model", cfg, gen_len, block_len))
    for cache, (_, options) in tqdm(CACHES.items(), desc="caches"):
        runs = {"ours": _ours(lm, options, gen_len, block_len), "theirs": theirs[cache]}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        same = 0
        for run in runs.values():
            run(prompts[0])  # compiles, or warms up
        for prompt in prompts:
            texts = {}
            for name, run in runs.items():
                texts[name], elapsed = run(prompt)
                seconds[name].append(elapsed)
            same += texts["ours"] == texts["theirs"]
        ours, others = (gen_len / float(np.median(seconds[name])) for name in runs)
        yield {
            "case": "diffusion", "device": device(), "dtype": cfg.dtype,
            "params_m": round(num_params(cfg) / 1e6, 1), "prompt_len": prompt_len,
            "gen_len": gen_len, "block_len": block_len, "cache": cache,
            "tokens_per_step": TOKENS_PER_STEP, "tokens_per_s": round(ours, 1),
            "their_tokens_per_s": round(others, 1), "ratio": round(ours / others, 2),
            "same_text": f"{same}/{len(prompts)}",
        }  # fmt: skip


def _ours(lm: LanguageModel, options: dict[str, Any], gen_len: int, block_len: int) -> Decoder:
    method = fast_dllm(
        steps=gen_len // TOKENS_PER_STEP, gen_length=gen_len, block_length=block_len, **options
    )
    programs: Programs = {}

    def run(prompt: list[int]) -> tuple[list[int], float]:
        done = timed(lm, method, [prompt], gen_len=gen_len, programs=programs)
        return done.completions[0].canvas.tolist(), done.prepare_s + done.seconds

    return run


def _theirs(
    code: str, checkpoint: pathlib.Path, cfg: ModelConfig, gen_len: int, block_len: int
) -> Iterator[tuple[str, Decoder]]:
    """Their decoders, by cache: the adapter."""
    import torch

    sys.path.insert(0, code)
    try:
        public = importlib.import_module("generate")
    finally:
        sys.path.remove(code)
    try:
        model = public.LLaDAModelLM.from_pretrained(checkpoint, torch_dtype=torch.float32).eval()
    except Exception as error:  # whatever another transformers makes of it
        installed = version("transformers")
        raise ValueError(
            f"--code={code} does not load a checkpoint with transformers {installed}, install the "
            f"one that it asks for: {type(error).__name__}: {error}"
        ) from error

    def decoder(function: Callable[..., Any]) -> Decoder:
        def run(prompt: list[int]) -> tuple[list[int], float]:
            began = time.perf_counter()
            with torch.inference_mode():
                tokens, _ = function(
                    model, torch.tensor([prompt]), steps=gen_len // TOKENS_PER_STEP,
                    gen_length=gen_len, block_length=block_len, mask_id=cfg.mask_token_id,
                )  # fmt: skip
            return tokens[0, len(prompt) :].tolist(), time.perf_counter() - began

        return run

    for cache, (name, _) in CACHES.items():
        yield cache, decoder(getattr(public, name))
