"""The same model, the same prompts, the same machine: this library and Hugging Face's `generate`.

    pip install -e '.[parity]'
    python -m scripts.compare_hf --models=runs/quickstart_spec/python/seed0 --task=python

Both read the target and the draft model that `scripts.quickstart_spec` has trained, and decode
held-out prompts greedily, one at a time: plainly, with the draft model (assisted generation), and
by prompt lookup, with as many drafts each. Runs alternate, and the median over prompts of the time
per token is reported; compilation is not (there is one per method). Texts are compared with those
of Hugging Face's plain decoding.

Forwards are those of the target; the first one of `generate` reads the prompt, too.
"""

from __future__ import annotations

import pathlib
import sys
from importlib.metadata import version

import jax
from absl import app, flags

import dlm
from configs import causal_lm
from decode.evaluation.run import device
from scripts.compare_hf.decoders import alternate, ours, table, theirs
from scripts.quickstart_spec.drafters import held_out_prompts
from train.host import set_up_command


def main(argv: list[str]) -> None:
    set_up_command(argv)
    folder, gen_len = pathlib.Path(flags.FLAGS.models), flags.FLAGS.gen_len
    try:
        lm = dlm.load(folder / "target" / "model")
    except OSError as error:
        sys.exit(f"error: {error}: run scripts.quickstart_spec first")
    prompts = held_out_prompts(lm, flags.FLAGS.task, flags.FLAGS.num_prompts)
    decoders = {("ours", name): run for name, run in ours(folder, gen_len, max(map(len, prompts)))}
    eos, pad = list(lm.cfg.eos_ids), lm.cfg.pad_token_id
    target, draft = (folder / name / "model" for name in ("target", "draft"))
    try:
        others = theirs(target, draft, gen_len, eos, pad)
        decoders |= {("transformers", name): run for name, run in others}
    except ImportError as error:
        sys.exit(f"error: {error}: install the extra, pip install -e '.[parity]'")
    tallies = alternate(decoders, prompts)
    print(
        f"\n{flags.FLAGS.task}: {len(prompts)} held-out prompts, batch 1, {gen_len} tokens, "
        f"greedy, float32, {device()}, jax {jax.__version__}, torch {version('torch')}, "
        f"transformers {version('transformers')}:\n\n{table(tallies)}\n"
    )


if __name__ == "__main__":
    flags.DEFINE_string("models", None, "A folder of `scripts.quickstart_spec`.", required=True)
    flags.DEFINE_enum("task", "python", causal_lm.TASKS, "What they were trained on.")
    flags.DEFINE_integer("num_prompts", 16, "Held-out prompts.", lower_bound=1)
    flags.DEFINE_integer("gen_len", 128, "Most tokens of a text.", lower_bound=1)
    app.run(main)
