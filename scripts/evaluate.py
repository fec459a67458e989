"""Exact match of a trained model on the held-out examples of its config's task.

    python -m scripts.evaluate --config=configs/mdlm_scan.py --checkpoint=runs/scan/model

Decodes `--num_examples` of `data.valid` in batches and prints one JSON line per rule: accuracy,
forwards per answer, tokens per forward, tokens/s (compilation excluded).
"""

from __future__ import annotations

import json
import time

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

import dlm
from decode.diffusion import DiffusionMethod, decode
from decode.generate import collect, prepare
from decode.rules import CACHES, Eos, FixedBlocks, Quota, Threshold
from train.config import build, from_config_dict

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "For dlm.load.", required=True)
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 512, "Held-out examples.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Examples decoded at once.", lower_bound=1)
_BLOCK_LEN = flags.DEFINE_integer("block_len", 8, "Positions per block.", lower_bound=1)
_THRESHOLD = flags.DEFINE_float("threshold", 0.9, "Of the threshold rule.")
_CACHE = flags.DEFINE_enum("cache", "none", sorted(CACHES), "Which positions are recomputed.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: this command takes only flags")
    logging.set_verbosity(logging.WARNING)
    settings = from_config_dict(_CONFIG.value)
    task = build({**settings.data.task, **(settings.data.valid or {})}, "data.valid")
    lm = dlm.load(_CHECKPOINT.value)
    if lm.tokenizer is None:
        raise app.UsageError(f"--checkpoint={_CHECKPOINT.value} has no tokenizer")
    order = np.random.default_rng(0).permutation(len(task))[: _NUM_EXAMPLES.value]
    examples = [task[int(i)] for i in order]
    rules = {
        "one per step": Quota(_BLOCK_LEN.value),
        f"threshold {_THRESHOLD.value:g}": Threshold(_THRESHOLD.value),
    }
    for name, rule in rules.items():
        method = DiffusionMethod(
            FixedBlocks(_BLOCK_LEN.value), CACHES[_CACHE.value](), rule=rule, stopper=Eos()
        )
        scores, tokens, forwards, seconds = [], 0, 0, 0.0
        for first in tqdm(range(0, len(examples), _BATCH_SIZE.value), desc=name, unit="batch"):
            batch = examples[first : first + _BATCH_SIZE.value]
            prompts = [lm.tokenizer.encode(example.prompt) for example in batch]
            for timed in (False, True) if first == 0 else (True,):  # the first run compiles
                state = prepare(lm.cfg, method, prompts, gen_len=settings.data.completion_len)
                start = time.perf_counter()
                state = jax.block_until_ready(decode(lm.params, lm.cfg, method, state))
                seconds += (time.perf_counter() - start) * timed
            for example, completion in zip(batch, collect(state, lm, len(batch)), strict=True):
                scores.append(task.score(example, completion.text or "")["score"])
                tokens += len(completion.tokens)
                forwards += completion.num_forwards
        print(
            json.dumps(
                {
                    "rule": name,
                    "cache": _CACHE.value,
                    "num_examples": len(examples),
                    "accuracy": round(float(np.mean(scores)), 4),
                    "forwards_per_answer": round(forwards / len(examples), 2),
                    "tokens_per_forward": round(tokens / forwards, 2),
                    "tokens_per_s": round(tokens / seconds, 1),
                    "device": jax.devices()[0].device_kind,
                    "dtype": lm.cfg.dtype,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
