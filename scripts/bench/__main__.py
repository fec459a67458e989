"""Timings, one JSON line per case, and a table.

    python -m scripts.bench decode                        # CPU sizes
    python -m scripts.bench decode --preset=llada_8b      # on an accelerator: random weights
    python -m scripts.bench train
    python -m scripts.bench spec                          # --preset=llama3_1_8b on an accelerator
    python -m scripts.bench windows --checkpoint=smollm2  # or a folder, or a .gguf file
    python -m scripts.bench spec_bench --checkpoint=path/to/model --prompts=path/to/spec_bench
    python -m scripts.bench diffusion --code=path/to/Fast-dLLM/llada
    python -m scripts.bench kernels --out=runs/kernels    # on an accelerator, minutes
    python -m scripts.bench kernels --toy                 # anywhere, seconds
    python -m scripts.bench refill --checkpoint=runs/quickstart/train/model --task=waiting_line \
        --num_prompts=200
    python -m scripts.bench refill --num_prompts=64 --rows=8 --prompts=path/to/spec_bench
    python -m scripts.bench search --checkpoint=smollm2 --pythons=path/of/python

`decode` times steps and whole decodes of every cache, `spec` rounds of drafting and verifying,
`spec_bench` drafters on real prompts and models, `diffusion` a public code base beside this one,
`refill` a checkpoint whose rows are kept busy, `search` searches beside transformers, of one or
several versions, each in an interpreter of its own, `train` training steps, `windows` forwards by
width and by length of the text behind them (beside transformers where that is installed), `kernels`
kernels at the shapes of real models; each module says what its columns mean. Ceilings (a large
matrix product, a large copy) are measured in the same run. Weights are random unless a checkpoint
is given.
"""

from __future__ import annotations

from absl import app, flags, logging

from dlm.presets import PRESETS
from dlm.tasks.presets import TASKS
from scripts.bench import cases


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[1] not in cases.ALL:
        raise app.UsageError(f"benchmarks are {', '.join(cases.ALL)}; got {argv[1:]}")
    if argv[1] != "spec_bench" and flags.FLAGS.repeats < 5:
        raise app.UsageError(f"--repeats={flags.FLAGS.repeats} must be at least 5")
    logging.set_verbosity(logging.WARNING)
    read = cases.flags_of(argv[1])
    ignored = [name for name in cases.flags_of(*cases.ALL) - read if flags.FLAGS[name].present]
    if ignored:
        raise app.UsageError(
            f"{argv[1]} reads no --{min(ignored)}; it reads {', '.join(sorted(read))}"
        )
    cases.ALL[argv[1]](**{name: flags.FLAGS[name].value for name in read})


if __name__ == "__main__":
    flags.DEFINE_enum("preset", "bench", ["bench", *PRESETS], "Which model's shapes.")
    flags.DEFINE_string("dtype", "", "Of the model, such as bfloat16; empty: its own.")
    flags.DEFINE_list("batch", ["1", "8"], "Batch sizes.")
    flags.DEFINE_integer("prompt_len", 64, "Prompt tokens.")
    flags.DEFINE_integer("gen_len", 128, "Completion tokens.")
    flags.DEFINE_integer("block_len", 32, "Block tokens.")
    flags.DEFINE_integer("repeats", 7, "Timed runs; the median is reported.", lower_bound=1)
    flags.DEFINE_bool("toy", False, "kernels: toy shapes, to check the script.")
    flags.DEFINE_string("out", None, "kernels, spec_bench: folder for what is written.")
    flags.DEFINE_string("log", "", "spec_bench: file of what is measured; a run goes on there.")
    flags.DEFINE_integer("calls", 32, "kernels: calls per timed batch.", lower_bound=1)
    flags.DEFINE_string("only", "", "kernels: only cases whose name contains this.")
    flags.DEFINE_string("code", "", "diffusion: folder of the public code base.")
    about = "spec_bench, refill, search (empty: SmolLM2), windows (empty: random weights): a model."
    flags.DEFINE_string("checkpoint", "", about)
    flags.DEFINE_string("draft", "", "Checkpoint of a draft model; empty: none.")
    flags.DEFINE_string("trained", "", "spec_bench: folder of scripts.smollm2, for its drafters.")
    flags.DEFINE_string("prompts", "", "spec_bench, search, refill: folder of question*.jsonl.")
    flags.DEFINE_integer("num_prompts", 4, "In all; spec_bench: per category.", lower_bound=1)
    flags.DEFINE_enum("task", "", ["", *TASKS], "refill, search: whose prompts; else passages.")
    flags.DEFINE_integer("rows", 32, "refill: decoded at once.", lower_bound=1)
    flags.DEFINE_list("drafters", ["prompt_lookup", "suffix", "token_recycling"], "By name.")
    flags.DEFINE_list("methods", ["beam_4"], "search: names of decode/search/components.py.")
    flags.DEFINE_list("pythons", [], "search: interpreters with torch and transformers.")
    flags.DEFINE_list("controller", ["on", "off"], "Whether drafters have one; or both.")
    flags.DEFINE_bool("transformers", False, "Whether transformers' generate decodes, too.")
    app.run(main)
