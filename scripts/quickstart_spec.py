"""Trains a small autoregressive model and drafters for it, then decodes with each, side by side.

    make quickstart-spec
    python -m scripts.quickstart_spec --workdir=runs/quickstart_spec --tasks=python --seed=1

Two texts: the sources of Python's standard library, byte by byte, and SCAN's commands. Per text it
trains a target, a smaller draft model, and what Medusa, Hydra, Hydra++, EAGLE-1, EAGLE-3 and
DFlash put beside the target, and decodes held-out prompts greedily with every drafter. All of them
must write the same text; what differs is how many forwards it takes, and how long.

Writes into the workdir, per text: the models, results.json, results.csv, acceptance.png. Running it
again continues interrupted training, and skips it where it is done.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure
from tqdm import tqdm

import dlm
from configs import causal_lm, draft_heads
from decode.complete import collect
from decode.drafters.contracts import Drafter
from decode.drafters.dflash import DFlash
from decode.drafters.draft_model import DraftModel, DraftModelTree
from decode.drafters.eagle import Eagle, EagleBest
from decode.drafters.hydra import Hydra
from decode.drafters.lookahead import Lookahead
from decode.drafters.medusa import Medusa
from decode.drafters.no_draft import NoDraft
from decode.drafters.prompt_lookup import PromptLookup
from decode.drafters.suffix import Suffix
from decode.drafters.token_recycling import TokenRecycling
from decode.speculative import SpeculativeMethod, SpeculativeState, decode, init_state, prefill
from decode.tree import from_paths
from dlm.heads import dflash, eagle_1, eagle_3, hydra, medusa
from scripts.measuring import device, markdown
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


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One drafter on all held-out prompts, one batch.

    Attributes:
      drafter: its name.
      nodes: of a tree, the root included.
      is_identical: whether every text is that of plain decoding.
      acceptance_length: tokens per forward of the target.
      accepted: share of the forwards that accepted 0, 1, .. drafts.
      forwards: of the target, per text.
      draft_forwards: of a draft model, per text.
      tokens_per_s: tokens of all texts over the median wall time.
      seconds: median wall time of the batch, prompts and compilation excluded.
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


def train(task: str, seed: int, folder: pathlib.Path, smoke: bool) -> None:
    """Trains whatever of target, draft model and heads is not there yet."""
    variant = "runlocal" if smoke else ""

    def fit(config: Any, name: str) -> None:
        config.train.seed = config.data.seed = seed
        result = loop.run(config, folder / name, f"{task}: {name}")
        if result.model_path is None:
            raise SystemExit("training was interrupted: run the same command again to continue")

    fit(causal_lm.get_config(f"{task},{variant}" if smoke else task), "target")
    fit(causal_lm.get_config(f"{task},{variant or 'draft'}"), "draft")
    for heads in draft_heads.HEADS:
        config = draft_heads.get_config(f"{task},{heads}" + (f",{variant}" if smoke else ""))
        config.train.init_from = str(folder / "target" / "model")
        fit(config, heads)


def drafters(lm: dlm.LanguageModel, folder: pathlib.Path) -> dict[str, Drafter]:
    """By the names of the table."""
    draft = dlm.load(folder / "draft" / "model")
    of_medusa = medusa.load(folder / "medusa" / "model", lm)[1]
    of_hydra = hydra.load(folder / "hydra" / "model", lm)[1]
    of_hydra_plus = hydra.load(folder / "hydra_plus" / "model", lm)[1]
    of_eagle_1 = eagle_1.load(folder / "eagle_1" / "model", lm)
    of_dflash = dflash.load(folder / "dflash" / "model", lm)
    of_eagle_3 = eagle_3.load(folder / "eagle_3" / "model", lm)
    return {
        PLAIN: NoDraft(),
        "prompt lookup": PromptLookup(num_drafts=8),
        "suffix decoding": Suffix(num_drafts=8),
        "token recycling, tree": TokenRecycling(TREE),
        "lookahead": Lookahead(ngram=4, window=4, num_candidates=4),
        "draft model, chain": DraftModel(draft.params, draft.cfg, num_drafts=NUM_DRAFTS),
        "draft model, tree": DraftModelTree(draft.params, draft.cfg, shape=TREE),
        "Medusa, tree": Medusa(of_medusa, TREE),
        "Hydra, tree": Hydra(of_hydra, TREE),
        "Hydra++, tree": Hydra(of_hydra_plus, TREE),
        "EAGLE-1, tree": Eagle(of_eagle_1, TREE),
        "EAGLE-3, tree": Eagle(of_eagle_3, TREE),
        "EAGLE-3, best tree": EagleBest(of_eagle_3, WIDTH, TREE.depth, TREE.num_nodes - 1),
        "DFlash, chain": DFlash(of_dflash),
    }


def measure(
    lm: dlm.LanguageModel, drafter: Drafter, prompts: list[list[int]], gen_len: int, repeats: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What is to be known of one drafter, and the texts."""
    method = SpeculativeMethod(drafter)

    def start() -> SpeculativeState:
        state = init_state(lm.cfg, method, prompts, gen_len=gen_len)
        return jax.block_until_ready(prefill(lm.params, lm.cfg, method, state))

    state = start()
    began = time.perf_counter()
    compiled = decode.lower(lm.params, lm.cfg, method, state).compile()
    compile_s = time.perf_counter() - began
    seconds = []
    for _ in range(repeats):
        state = start()
        began = time.perf_counter()
        state = jax.block_until_ready(compiled(lm.params, method, state))
        seconds.append(time.perf_counter() - began)
    completions = collect(state, lm, method)
    histogram = np.asarray(jax.device_get(state.acceptance_histogram)).sum(axis=0)
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


def study(task: str, folder: pathlib.Path, num_prompts: int, repeats: int) -> list[Measurement]:
    """Every drafter on the same held-out prompts."""
    lm = dlm.load(folder / "target" / "model")
    assert lm.tokenizer is not None
    config = causal_lm.get_config(task).data
    held_out = build({**config.task, **config.valid}, "task")
    order = np.random.default_rng(0).permutation(len(held_out))[:num_prompts]
    prompts = [lm.tokenizer.encode(held_out[int(i)].prompt) for i in order]
    found: list[Measurement] = []
    plain: list[np.ndarray] | None = None
    for name, drafter in (bar := tqdm(drafters(lm, folder).items(), unit="drafter")):
        bar.set_description(name)
        values, texts = measure(lm, drafter, prompts, GEN_LEN[task], repeats)
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


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: this command takes only flags")
    logging.set_verbosity(logging.WARNING)
    keep_freed_memory()
    if unknown := sorted(set(flags.FLAGS.tasks) - set(causal_lm.TASKS)):
        sys.exit(f"error: --tasks has {unknown[0]!r}; there are {' and '.join(causal_lm.TASKS)}")
    smoke = flags.FLAGS.smoke
    num_prompts = 4 if smoke else flags.FLAGS.num_prompts
    for task in flags.FLAGS.tasks:
        folder = pathlib.Path(flags.FLAGS.workdir) / task
        try:
            train(task, flags.FLAGS.seed, folder, smoke)
        except ConfigError as error:
            sys.exit(f"error: {error}")
        found = study(task, folder, num_prompts, 1 if smoke else flags.FLAGS.repeats)
        about = {
            "task": task, "seed": flags.FLAGS.seed, "batch": num_prompts, "gen_len": GEN_LEN[task],
            "dtype": "float32", "device": device(), "jax": jax.__version__,
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
            f"\n{task}: {num_prompts} held-out prompts, one batch, {GEN_LEN[task]} tokens, greedy, "
            f"float32, {device()}:\n\n{table(found)}\n"
        )
        print(f"Written: results.json, results.csv and acceptance.png in {folder}\n")
        if not all(m.is_identical for m in found):
            sys.exit("error: drafts changed a text, which they never may")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/quickstart_spec", "Folder for everything written.")
    flags.DEFINE_list("tasks", [*causal_lm.TASKS], "Texts.")
    flags.DEFINE_integer("seed", 0, "Of parameters and the order of the data.")
    flags.DEFINE_integer("num_prompts", 8, "Held-out prompts, decoded as one batch.")
    flags.DEFINE_integer("repeats", 5, "Times that every drafter is timed.")
    flags.DEFINE_bool("smoke", False, "A few training steps and prompts: does it run?")
    app.run(main)
