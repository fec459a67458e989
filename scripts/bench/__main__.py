"""Timings, one JSON line per case, and a table.

    python -m scripts.bench decode                        # CPU sizes
    python -m scripts.bench decode --preset=llada_8b      # on an accelerator: random weights
    python -m scripts.bench train
    python -m scripts.bench spec                          # --preset=llama3_1_8b on an accelerator
    python -m scripts.bench windows --checkpoint=smollm2  # or a folder, or a .gguf file
    python -m scripts.bench kernels --out=runs/kernels    # on an accelerator, minutes
    python -m scripts.bench kernels --toy                 # anywhere, seconds

`decode` times steps and whole decodes of every cache, `spec` rounds of drafting and verifying,
`train` training steps, `windows` forwards by width and by length of the text behind them (beside
transformers where that is installed), `kernels` kernels at the shapes of real models; each module
says what its columns mean. Ceilings (a large matrix product, a large copy) are measured in the same
run. Random weights: speed only, no quality.
"""

from __future__ import annotations

import json

from absl import app, flags, logging

from dlm.presets import PRESETS
from scripts.bench import decode, kernels, models, spec, train, windows
from scripts.bench.timing import table

_PRESET = flags.DEFINE_enum("preset", "bench", ["bench", *PRESETS], "Which model's shapes.")
_DTYPE = flags.DEFINE_string("dtype", "", "Of that model, such as bfloat16; empty: the preset's.")
_BATCH = flags.DEFINE_list("batch", ["1", "8"], "Batch sizes.")
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 64, "Prompt tokens.")
_GEN_LEN = flags.DEFINE_integer("gen_len", 128, "Completion tokens.")
_BLOCK_LEN = flags.DEFINE_integer("block_len", 32, "Block tokens.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs; the median is reported.", lower_bound=5)
_TOY = flags.DEFINE_bool("toy", False, "kernels: toy shapes, to check the script.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "windows: a model; empty: random weights.")
_OUT = flags.DEFINE_string("out", None, "kernels: folder for kernels.jsonl and kernels.md.")
_CALLS = flags.DEFINE_integer("calls", 32, "kernels: calls per timed batch.", lower_bound=1)
_ONLY = flags.DEFINE_string("only", "", "kernels: only cases whose name contains this.")


_TABLES = {  # by benchmark and case
    "decode": {"step": decode.STEP_COLUMNS, "decode": decode.DECODE_COLUMNS},
    "spec": {"spec": spec.COLUMNS},
    "train": {"train": train.COLUMNS},
    "windows": {"windows": windows.COLUMNS},
    "kernels": {},
}


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[1] not in _TABLES:
        raise app.UsageError(f"benchmarks are {', '.join(_TABLES)}, got {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    repeats = _REPEATS.value
    if argv[1] == "kernels":
        kernels.run(_TOY.value, _CALLS.value, _ONLY.value, _OUT.value, repeats)
        return
    cfg = models.model(_PRESET.value, _DTYPE.value)
    batches = [int(b) for b in _BATCH.value]
    prompt_len, gen_len = _PROMPT_LEN.value, _GEN_LEN.value
    if argv[1] == "train":
        made = train.bench_train(_PRESET.value, cfg, (max(batches), prompt_len, gen_len), repeats)
    elif argv[1] == "spec":
        draft = models.draft_of(_PRESET.value, cfg)
        made = spec.bench_spec(cfg, draft, batches, prompt_len, repeats)
    elif argv[1] == "windows":
        made = windows.bench_windows(models.load(_CHECKPOINT.value, cfg, _DTYPE.value), repeats)
    else:
        made = decode.bench_decode(cfg, batches, prompt_len, gen_len, _BLOCK_LEN.value, repeats)
    results = []
    for result in made:
        print(json.dumps(result), flush=True)
        results.append(result)
    for case, columns in _TABLES[argv[1]].items():
        print("\n" + table(results, case, columns))


if __name__ == "__main__":
    app.run(main)
