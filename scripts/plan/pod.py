"""Whether a model fits on a TPU slice, on which mesh, and how fast it can be at most: without TPU.

    python -m scripts.plan.pod --slices=v5e:4x4,v6e:4x4 --preset=llada_8b --batch=1,8,64
    python -m scripts.plan.pod --slices=v5e:4x4 --recipes=llada_8b_dparallel
    python -m scripts.plan.pod --out=docs                          the first part of docs/pods.md

Per slice and program, the real program (the decoding loop with threshold 0.9 and a model's cache,
or a recipe's training step) is compiled ahead of time on several meshes; printed is, per chip:

    weights, cache, other state    arguments, counted from their shards
    temporaries                    as the compiler assigned them
    moved                          bytes through a chip's links, on a ring: in a training step; in a
                                   decoding round, which judges one block; in a refresh of the
                                   cache, which reads all positions once per block
    floor                          time that a round or a refresh cannot fall below: the larger of
                                   operations over the chip's peak and of bytes (weights and cache,
                                   once) over its memory's speed, plus moved bytes over the links'
    tokens/s at most               of all rows, if `--tokens_per_round` are committed per row

The best mesh is that of the lowest floors (for training: of the least memory) among those that fit.
A floor is not a prediction. Results are kept in pods.json, and what is in there is not compiled
again: delete it to start anew. pods.md shows all of them, the last command's and those before.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

from scripts.plan import aot  # isort: skip  # noqa: F401  (before JAX)

from absl import app, flags
from tqdm import tqdm

from dlm.presets import PRESETS
from scripts.plan.cases import Lengths, cases, plan
from scripts.plan.page import FILE, keep, tables, write
from train.host import only_flags


def main(argv: list[str]) -> None:
    only_flags(argv)
    F = flags.FLAGS
    (out := pathlib.Path(F.out)).mkdir(parents=True, exist_ok=True)
    lengths = Lengths(F.prompt_len, F.gen_len, F.block_len, F.tokens_per_round)
    try:
        if F.batch:
            lengths.check(PRESETS[F.preset])
        wanted = list(cases(F.preset, F.slices, [int(b) for b in F.batch], F.recipes))
    except ValueError as error:
        sys.exit(f"error: {error}")
    file, asked = out / FILE, dataclasses.asdict(lengths)
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if known.get("lengths", asked) != asked:
        sys.exit(f"error: {file} is for {known['lengths']}, not {asked}: choose another --out")
    results, commands = known.get("cases", {}), known.get("commands", [])
    for case in (bar := tqdm(wanted, unit="program")):
        bar.set_description(case.key)
        if case.key not in results:
            results[case.key] = plan(case, F.preset, lengths)
            keep(out, results, lengths, commands)
    commands = [*dict.fromkeys([*commands, f"python -m scripts.plan.pod {' '.join(sys.argv[1:])}"])]
    print("\n" + tables({case: results[case.key] for case in wanted}, lengths))
    write(out, results, lengths, commands)
    print(f"Written: pods.md, pods.png and pods.json in {out}")


if __name__ == "__main__":
    flags.DEFINE_list("slices", ["v5e:4x4", "v5e:16x16", "v6e:4x4", "v5p:4x4x4"], "TPU slices.")
    flags.DEFINE_enum("preset", "llada_8b", PRESETS, "Whose decoding loop is planned.")
    flags.DEFINE_list("batch", ["1", "8", "64"], "Rows of the decoding loop; none if empty.")
    flags.DEFINE_list("recipes", ["llada_8b_dparallel"], "Configs whose training step is planned.")
    flags.DEFINE_integer("prompt_len", 3_840, "Tokens.")
    flags.DEFINE_integer("gen_len", 256, "Tokens.")
    flags.DEFINE_integer("block_len", 32, "Tokens.")
    flags.DEFINE_float("tokens_per_round", 4.0, "Committed per row and round.", lower_bound=1)
    flags.DEFINE_string("out", "runs/plan", "Folder for what is written.")
    app.run(main)
