"""Trains a small autoregressive model and drafters for it, then decodes with each, side by side.

    make quickstart-spec
    python -m scripts.quickstart_spec --workdir=runs/quickstart_spec --tasks=python --heads=medusa
    python -m scripts.quickstart_spec --heads=all --seeds=0,1,2 --out=docs       docs/drafters.md

Two texts: the sources of Python's standard library, byte by byte, and SCAN's commands. All drafters
must write the same text; what differs is how many forwards it takes, and how long.

Writes into a folder of the workdir per text and seed: the models, results.json, results.csv,
acceptance.png. Running it again continues interrupted training, and skips it where it is done. With
`--out` it also writes a page, whose tables combine all seeds that were ever written there.
"""

from __future__ import annotations

import itertools
import pathlib
import sys

from absl import app, flags

from configs import causal_lm, draft_heads
from scripts.quickstart_spec.drafters import train
from scripts.quickstart_spec.measure import about_run, study
from scripts.quickstart_spec.page import add_to_page, table, write_results
from train.config import ConfigError
from train.host import set_up_command


def main(argv: list[str]) -> None:
    set_up_command(argv)
    if unknown := sorted(set(flags.FLAGS.tasks) - set(causal_lm.TASKS)):
        sys.exit(f"error: --tasks has {unknown[0]!r}; there are {' and '.join(causal_lm.TASKS)}")
    heads = draft_heads.HEADS if flags.FLAGS.heads == ["all"] else flags.FLAGS.heads
    if unknown := sorted(set(heads) - set(draft_heads.HEADS)):
        known = ", ".join(draft_heads.HEADS)
        sys.exit(f"error: --heads has {unknown[0]!r}; there are {known}, and all")
    for task, seed in itertools.product(flags.FLAGS.tasks, map(int, flags.FLAGS.seeds)):
        run(task, seed, list(heads))


def run(task: str, seed: int, heads: list[str]) -> None:
    """One text, one seed: from training to tables."""
    smoke, repeats = flags.FLAGS.smoke, flags.FLAGS.repeats
    num_prompts = 4 if smoke else flags.FLAGS.num_prompts
    folder = pathlib.Path(flags.FLAGS.workdir) / task / f"seed{seed}"
    try:
        train(task, seed, folder, heads, smoke)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    batch_size = min(flags.FLAGS.batch_size, num_prompts)
    found = study(task, folder, heads, num_prompts, batch_size, 1 if smoke else repeats)
    about = about_run(task, seed, num_prompts, batch_size)
    write_results(folder, about, found)
    print(
        f"\n{task}: {num_prompts} held-out prompts, batch {batch_size}, {about['gen_len']} tokens, "
        f"greedy, float32, {about['device']}:\n\n{table(found)}\n"
    )
    print(f"Written: results.json, results.csv and acceptance.png in {folder}\n")
    if flags.FLAGS.out:
        add_to_page(pathlib.Path(flags.FLAGS.out), about, found)
    if not all(m.is_identical for m in found):
        sys.exit("error: drafts changed a text, which they never may")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/quickstart_spec", "Folder for everything written.")
    flags.DEFINE_string("out", "", "Folder of a page over all seeds; none if empty.")
    flags.DEFINE_list("tasks", [*causal_lm.TASKS], "Texts.")
    flags.DEFINE_list("heads", ["medusa", "hydra", "eagle_3", "dflash"], "What is trained, or all.")
    flags.DEFINE_list("seeds", ["0"], "Of parameters and the order of the data.")
    flags.DEFINE_integer("num_prompts", 8, "Held-out prompts.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 1, "Prompts decoded at once.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Times that every drafter is timed.")
    flags.DEFINE_bool("smoke", False, "A few training steps and prompts: does it run?")
    app.run(main)
