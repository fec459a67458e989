"""Trains a small autoregressive model and drafters for it, then decodes with each, side by side.

    make quickstart-spec
    python -m scripts.quickstart_spec --workdir=runs/quickstart_spec --tasks=python --heads=medusa
    python -m scripts.quickstart_spec --heads=all --seeds=0,1,2 --out=docs       docs/drafters.md

Two texts: the sources of Python's standard library, byte by byte, and SCAN's commands. Per text and
seed it trains a target, a smaller draft model, and what Medusa, Hydra, Hydra++, EAGLE-1, EAGLE-3
and DFlash put beside the target (`--heads`), and decodes held-out prompts greedily with every
drafter. All of them must write the same text; what differs is how many forwards it takes, and how
long.

Writes into a folder of the workdir per text and seed: the models, results.json, results.csv,
acceptance.png. Running it again continues interrupted training, and skips it where it is done. With
`--out` it also writes a page, whose tables combine all seeds that were ever written there.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure
from tqdm import tqdm

import dlm
from configs import causal_lm, draft_heads
from decode.evaluation.run import Programs, batches, device
from decode.evaluation.statistics import with_interval
from decode.evaluation.tables import markdown
from decode.generate import Completion
from decode.speculative.contracts import Drafter
from decode.speculative.drafters.dflash import DFlash
from decode.speculative.drafters.draft_model import DraftModel, DraftModelTree
from decode.speculative.drafters.eagle import Eagle, EagleBest
from decode.speculative.drafters.hydra import Hydra
from decode.speculative.drafters.lookahead import Lookahead
from decode.speculative.drafters.medusa import Medusa
from decode.speculative.drafters.no_draft import NoDraft
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.drafters.suffix import Suffix
from decode.speculative.drafters.token_recycling import TokenRecycling
from decode.speculative.loop import SpeculativeMethod
from decode.speculative.tree import from_paths
from dlm.heads import dflash, eagle_1, eagle_3, hydra, medusa
from train import loop
from train.config import ConfigError, build
from train.host import keep_freed_memory

GEN_LEN = {"python": 128, "scan": 52}  # tokens
NUM_DRAFTS = 4  # of chains
# 22 nodes: on two cores a forward of 64 is no longer about as fast as one of a single token.
TREE = from_paths(
    [
        *([i] for i in range(6)),
        *([0, i] for i in range(4)),
        *([1, i] for i in range(2)),
        *([2, 0], [3, 0]),
        *([0, 0, i] for i in range(3)),
        *([0, 1, 0], [1, 0, 0]),
        *([0, 0, 0, i] for i in range(2)),
    ]
)
WIDTH = 6  # of the best tree, which has as many nodes and levels
PLAIN = "none"
# Which drafter is said to have more of its drafts accepted than which.
ORDER = (
    ("Hydra, tree", "Medusa, tree"),
    ("Hydra++, tree", "Hydra, tree"),
    ("EAGLE-1, tree", "Hydra, tree"),
    ("EAGLE-3, tree", "Hydra, tree"),
    ("EAGLE-3, tree", "EAGLE-1, tree"),
    ("EAGLE-3, best tree", "EAGLE-3, tree"),
    ("DFlash, chain", "EAGLE-3, tree"),
    ("draft model, tree", "draft model, chain"),
)
_INTRODUCTION = """# Drafters side by side

Written by `python -m scripts.quickstart_spec --heads=all --seeds=0,1,2 --out=docs`: small targets
(1.0 M parameters), everything trained from nothing per seed; held-out prompts decoded greedily. A
target this small is hardly dearer to run than its drafters, so the columns to look at are
acceptance length (tokens per forward of the target) and forwards; how they turn into time on a
larger target is what `scripts.bench spec` measures. (DFlash is trained as briefly as the others
here, and drafts a chain.)"""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One drafter on all held-out prompts.

    Attributes:
      drafter: its name.
      nodes: of a tree, the root included.
      is_identical: whether every text is that of plain decoding.
      acceptance_length: tokens per forward of the target.
      accepted: share of the forwards that accepted 0, 1, .. drafts.
      forwards: of the target, per text.
      draft_forwards: of a draft model, per text.
      tokens_per_s: tokens of all texts over the median wall time.
      seconds: median wall time of all batches, prompts and compilation excluded.
      compile_s: compilation.
      speedup: seconds of plain decoding over these.
    """

    drafter: str
    nodes: int
    is_identical: bool
    acceptance_length: float
    accepted: list[float]
    forwards: float
    draft_forwards: float
    tokens_per_s: float
    seconds: float
    compile_s: float
    speedup: float = 1.0


def train(task: str, seed: int, folder: pathlib.Path, heads: list[str], smoke: bool) -> None:
    """Trains whatever of target, draft model and heads is not there yet."""
    variant = "runlocal" if smoke else ""

    def fit(config: Any, name: str) -> None:
        config.train.seed = config.data.seed = seed
        result = loop.run(config, folder / name, f"{task}, seed {seed}: {name}")
        if result.model_path is None:
            raise SystemExit("training was interrupted: run the same command again to continue")

    fit(causal_lm.get_config(f"{task},{variant}" if smoke else task), "target")
    fit(causal_lm.get_config(f"{task},{variant or 'draft'}"), "draft")
    for name in heads:
        config = draft_heads.get_config(f"{task},{name}" + (f",{variant}" if smoke else ""))
        config.train.init_from = str(folder / "target" / "model")
        fit(config, name)


def drafters(
    lm: dlm.LanguageModel, folder: pathlib.Path, heads: list[str]
) -> Iterator[tuple[str, Drafter]]:
    """By the names of the table."""
    draft = dlm.load(folder / "draft" / "model")
    yield PLAIN, NoDraft()
    yield "prompt lookup", PromptLookup(num_drafts=8)
    yield "suffix decoding", Suffix(num_drafts=8)
    yield "token recycling, tree", TokenRecycling(TREE)
    yield "lookahead", Lookahead(ngram=4, window=4, num_candidates=4)
    yield "draft model, chain", DraftModel(draft.params, draft.cfg, num_drafts=NUM_DRAFTS)
    yield "draft model, tree", DraftModelTree(draft.params, draft.cfg, shape=TREE)
    at = {name: folder / name / "model" for name in heads}
    if "medusa" in at:
        yield "Medusa, tree", Medusa(medusa.load(at["medusa"], lm)[1], TREE)
    if "hydra" in at:
        yield "Hydra, tree", Hydra(hydra.load(at["hydra"], lm)[1], TREE)
    if "hydra_plus" in at:
        yield "Hydra++, tree", Hydra(hydra.load(at["hydra_plus"], lm)[1], TREE)
    if "eagle_1" in at:
        yield "EAGLE-1, tree", Eagle(eagle_1.load(at["eagle_1"], lm), TREE)
    if "eagle_3" in at:
        network = eagle_3.load(at["eagle_3"], lm)
        yield "EAGLE-3, tree", Eagle(network, TREE)
        best = EagleBest(network, WIDTH, TREE.depth, TREE.num_nodes - 1)
        yield "EAGLE-3, best tree", best
    if "dflash" in at:
        yield "DFlash, chain", DFlash(dflash.load(at["dflash"], lm))


def measure(
    lm: dlm.LanguageModel,
    drafter: Drafter,
    prompts: list[list[int]],
    gen_len: int,
    batch_size: int,
    repeats: int,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What is to be known of one drafter, and the texts."""
    programs: Programs = {}
    seconds: list[float] = []
    compile_s = 0.0
    completions: list[Completion] = []
    for _ in range(repeats):
        seconds.append(0.0)
        completions = []
        for batch in batches(
            lm, SpeculativeMethod(drafter), prompts, gen_len=gen_len, batch_size=batch_size,
            programs=programs,
        ):  # fmt: skip
            seconds[-1] += batch.seconds
            compile_s = batch.compile_s
            completions += batch.completions
    histogram = np.sum([np.asarray(c.acceptance_histogram) for c in completions], axis=0)
    num_tokens = sum(len(c.canvas) for c in completions)
    return {
        "nodes": drafter.num_nodes,
        "acceptance_length": float(
            (histogram * np.arange(1, len(histogram) + 1)).sum() / histogram.sum()
        ),
        "accepted": (histogram / histogram.sum()).tolist(),
        "forwards": float(np.mean([c.num_forwards for c in completions])),
        "draft_forwards": float(np.mean([c.draft_forwards for c in completions])),
        "tokens_per_s": num_tokens / float(np.median(seconds)),
        "seconds": float(np.median(seconds)),
        "compile_s": compile_s,
    }, [c.canvas for c in completions]


def study(
    task: str,
    folder: pathlib.Path,
    heads: list[str],
    num_prompts: int,
    batch_size: int,
    repeats: int,
) -> list[Measurement]:
    """Every drafter on the same held-out prompts."""
    lm = dlm.load(folder / "target" / "model")
    assert lm.tokenizer is not None
    config = causal_lm.get_config(task).data
    held_out = build({**config.task, **config.valid}, "task")
    order = np.random.default_rng(0).permutation(len(held_out))[:num_prompts]
    prompts = [lm.tokenizer.encode(held_out[int(i)].prompt) for i in order]
    found: list[Measurement] = []
    plain: list[np.ndarray] | None = None
    for name, drafter in (bar := tqdm(drafters(lm, folder, heads), unit="drafter")):
        bar.set_description(name)
        values, texts = measure(lm, drafter, prompts, GEN_LEN[task], batch_size, repeats)
        plain = texts if plain is None else plain
        same = all(np.array_equal(a, b) for a, b in zip(texts, plain, strict=True))
        speedup = found[0].seconds / values["seconds"] if found else 1.0
        found.append(Measurement(drafter=name, is_identical=same, speedup=speedup, **values))
    return found


def table(found: list[Measurement]) -> str:
    return markdown(
        [
            {
                "drafter": m.drafter,
                "nodes": f"{m.nodes}",
                "same text": "yes" if m.is_identical else "NO",
                "acceptance length": f"{m.acceptance_length:.2f}",
                "forwards": f"{m.forwards:.1f}",
                "draft forwards": f"{m.draft_forwards:.1f}",
                "tokens/s": f"{m.tokens_per_s:.0f}",
                "speed-up": f"{m.speedup:.2f}x",
            }
            for m in found
        ]
    )


def draw(found: list[Measurement], title: str, path: pathlib.Path) -> None:
    """How many drafts a forward accepts, per drafter."""
    figure = Figure(figsize=(7, 0.45 * len(found) + 1.4), layout="constrained")
    axes = figure.subplots()
    most = max(len(m.accepted) for m in found)
    left = np.zeros(len(found))
    names = [f"{m.drafter} ({m.acceptance_length:.2f})" for m in found]
    for n in range(most):
        share = np.array([m.accepted[n] if n < len(m.accepted) else 0.0 for m in found])
        shade = str(0.9 - 0.8 * n / max(most - 1, 1))
        axes.barh(names, 100 * share, left=100 * left, color=shade, edgecolor="white", label=str(n))
        left += share
    axes.invert_yaxis()
    axes.set_xlabel("forwards of the target (%)")
    axes.set_title(title)
    axes.legend(title="accepted", fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.savefig(path, dpi=150)


def combine(rows_of_seeds: list[list[dict[str, Any]]]) -> str:
    """A line per drafter: means over seeds, with 95 % intervals."""
    lines = []
    for row in rows_of_seeds[0]:
        same = [r for rows in rows_of_seeds for r in rows if r["drafter"] == row["drafter"]]
        over = lambda key, digits: with_interval([r[key] for r in same], digits)  # noqa: B023, E731
        lines.append(
            {
                "drafter": row["drafter"],
                "nodes": f"{row['nodes']}",
                "same text": "yes" if all(r["is_identical"] for r in same) else "NO",
                "acceptance length": over("acceptance_length", 2),
                "forwards": over("forwards", 1),
                "draft forwards": over("draft_forwards", 1),
                "speed-up": over("speedup", 2),
            }
        )
    return markdown(lines)


def compare(rows_of_seeds: list[list[dict[str, Any]]]) -> str:
    """Differences in acceptance length within a seed, whether they are as published or not."""
    lengths = [{r["drafter"]: r["acceptance_length"] for r in rows} for rows in rows_of_seeds]
    found = []
    for more, less in ORDER:
        if all(more in of_seed and less in of_seed for of_seed in lengths):
            gaps = [of_seed[more] - of_seed[less] for of_seed in lengths]
            found.append({"more": more, "than": less, "by": with_interval(gaps, 2)})
    return markdown(found) if found else ""


def mean(rows_of_seeds: list[list[dict[str, Any]]]) -> list[Measurement]:
    """A measurement per drafter, whose acceptance is the mean over seeds."""
    found = []
    for row in rows_of_seeds[0]:
        same = [r for rows in rows_of_seeds for r in rows if r["drafter"] == row["drafter"]]
        length, accepted = (
            np.mean([r[key] for r in same], axis=0).tolist()
            for key in ("acceptance_length", "accepted")
        )
        both = {"acceptance_length": length, "accepted": accepted}
        found.append(Measurement(**(row | both)))
    return found


def write_page(out: pathlib.Path) -> None:
    """docs/drafters.md and its figures, from all results that lie beside it."""
    page = [_INTRODUCTION]
    for task in causal_lm.TASKS:
        file = out / f"drafters_{task}.json"
        if not file.is_file():
            continue
        seeds = json.loads(file.read_text(encoding="utf-8"))
        results = [seeds[key] for key in sorted(seeds, key=int)]
        about, rows = results[0]["about"], [result["rows"] for result in results]
        devices = sorted({result["about"]["device"] for result in results})
        title = f"{task}: drafts accepted per forward (tokens), {len(rows)} seeds"
        draw(mean(rows), title, out / f"drafters_{task}.png")
        page += [
            f"## {task}",
            f"![Drafts accepted](drafters_{task}.png)",
            f"{about['num_prompts']} held-out prompts, batch {about['batch']}, "
            f"{about['gen_len']} tokens, greedy, {about['dtype']}, {', '.join(devices)}; "
            f"{len(rows)} seeds, means and 95 % intervals (Student's t).",
            combine(rows),
            "Acceptance lengths compared within a seed:",
            compare(rows),
        ]
    (out / "drafters.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: this command takes only flags")
    logging.set_verbosity(logging.WARNING)
    keep_freed_memory()
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
    smoke = flags.FLAGS.smoke
    num_prompts = 4 if smoke else flags.FLAGS.num_prompts
    folder = pathlib.Path(flags.FLAGS.workdir) / task / f"seed{seed}"
    try:
        train(task, seed, folder, heads, smoke)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    batch_size = min(flags.FLAGS.batch_size, num_prompts)
    repeats = 1 if smoke else flags.FLAGS.repeats
    found = study(task, folder, heads, num_prompts, batch_size, repeats)
    about = {
        "task": task, "seed": seed, "num_prompts": num_prompts, "batch": batch_size,
        "gen_len": GEN_LEN[task], "dtype": "float32", "device": device(), "jax": jax.__version__,
    }  # fmt: skip
    rows = [dataclasses.asdict(m) for m in found]
    (folder / "results.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    with (folder / "results.csv").open("w", newline="") as file:
        flat = [{k: v for k, v in row.items() if k != "accepted"} for row in rows]
        writer = csv.DictWriter(file, flat[0])
        writer.writeheader()
        writer.writerows(flat)
    draw(found, f"{task}: drafts accepted per forward (mean tokens)", folder / "acceptance.png")
    print(
        f"\n{task}: {num_prompts} held-out prompts, batch {batch_size}, "
        f"{GEN_LEN[task]} tokens, greedy, float32, {device()}:\n\n{table(found)}\n"
    )
    print(f"Written: results.json, results.csv and acceptance.png in {folder}\n")
    if flags.FLAGS.out:
        out = pathlib.Path(flags.FLAGS.out)
        out.mkdir(parents=True, exist_ok=True)
        collected = out / f"drafters_{task}.json"
        seeds = json.loads(collected.read_text()) if collected.is_file() else {}
        seeds[str(seed)] = {"about": about, "rows": rows}
        collected.write_text(json.dumps(seeds, indent=1) + "\n")
        write_page(out)
    if not all(m.is_identical for m in found):
        sys.exit("error: drafts changed a text, which they never may")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/quickstart_spec", "Folder for everything written.")
    flags.DEFINE_string("out", "", "Folder of a page over all seeds; none if empty.")
    flags.DEFINE_list("tasks", [*causal_lm.TASKS], "Texts.")
    flags.DEFINE_list(
        "heads", ["medusa", "hydra", "eagle_3", "dflash"], "What is trained beside it, or all."
    )
    flags.DEFINE_list("seeds", ["0"], "Of parameters and the order of the data.")
    flags.DEFINE_integer("num_prompts", 8, "Held-out prompts.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 1, "Prompts decoded at once.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Times that every drafter is timed.")
    flags.DEFINE_bool("smoke", False, "A few training steps and prompts: does it run?")
    app.run(main)
