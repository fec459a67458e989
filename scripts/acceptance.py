"""What a Learn2PD filter accepts, by threshold, beside a threshold on the confidence itself.

    python -m scripts.acceptance --filter=runs/waiting_line/filter/model \\
        --rounds=runs/waiting_line/rounds --out=runs/waiting_line/filter

On the rounds that training kept apart ("test"), undecided positions only: the share of wrong
proposals that are accepted, of right ones that are, and of accepted ones that are wrong. Prints a
table, and writes acceptance.json and acceptance.png.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import app, flags
from matplotlib.figure import Figure

from dlm.heads.learn2pd import Filter, load_filter
from train.collect.records import Rounds
from train.objectives.learn2pd import rates

TAUS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999)
Curves = dict[str, list[dict[str, float]]]


def acceptance(learned: Filter, rounds: Rounds) -> Curves:
    """Rates by threshold: of the filter, and of the confidence itself."""
    confidence = jnp.asarray(rounds.arrays["confidence"])
    keep = {"filter": jax.nn.sigmoid(learned.logits(confidence)), "confidence": confidence}
    truth = jnp.asarray(rounds.arrays["is_right"]), jnp.asarray(rounds.arrays["undecided"])
    found = jax.jit(lambda value, tau: rates(value > tau, *truth))
    return {
        name: [{"tau": tau} | jax.tree.map(float, found(value, tau)) for tau in TAUS]
        for name, value in keep.items()
    }


def draw(curves: Curves, path: pathlib.Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        x, y = ([100 * p[key] for p in points] for key in ("wrong_accepted", "recall"))
        axes.plot(x, y, "o-", markersize=3, label=f"threshold on the {name}")
    axes.set_xlabel("wrong among accepted proposals (%)")
    axes.set_ylabel("right proposals accepted (%)")
    axes.set_title("Undecided positions of held-out rounds, by threshold")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}")
    try:
        learned = load_filter(flags.FLAGS.filter, None)
        curves = acceptance(learned, Rounds(flags.FLAGS.rounds, "test"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    out = pathlib.Path(flags.FLAGS.out)
    (out / "acceptance.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    draw(curves, out / "acceptance.png")
    for name, points in curves.items():
        print(f"{name}: tau, wrong accepted, right accepted, wrong among accepted (%)")
        for point in points:
            tau, *shares = point.values()
            print(f"{tau:6g}" + "".join(f"{100 * share:8.1f}" for share in shares))


if __name__ == "__main__":
    flags.DEFINE_string("filter", None, "Folder of the filter.", required=True)
    flags.DEFINE_string("rounds", None, "Folder of the rounds.", required=True)
    flags.DEFINE_string("out", ".", "Folder of acceptance.json and acceptance.png.")
    app.run(main)
