"""What is shown of a plan: tables, and a figure of the memory."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
from typing import Any

import jax
from matplotlib.figure import Figure

from decode.evaluation.tables import markdown
from scripts.plan import aot
from scripts.plan.cases import Case, Lengths
from scripts.plan.meshes import mesh_name

FILE = "pods.json"
COLUMNS = {
    "round_ms": "round, ms at least",
    "refresh_ms": "refresh, ms at least",
    "tokens_per_s": "tokens/s at most",
}
KINDS = ("weights", "cache", "other", "temporaries")
GIB = 2**30
# Of its memory a chip keeps some for itself: a v5e leaves 15.75 of 16 GiB to programs.
USABLE = 0.98
_INTRODUCTION = """# Models on TPU slices

Written on a machine without a TPU by

{commands}

Every program was compiled ahead of time for the slice that is named, and none has run on one.
`scripts/plan/pod.py` says how each column is counted. GiB per device (a chip; half a chip on v4 and
tpu7x). The figure has the best meshes; `python -m scripts.figures --only=pods` draws it again, from
`pods.json`. The commands need libtpu: [Plan a pod](howto/plan.md) says how to get it."""


def fits(case: Case, found: dict[str, Any]) -> bool:
    room = USABLE * aot.chip_of(case.slice).hbm_gib * GIB
    return "refused" not in found and found["needed"] <= room


def best(found: dict[Case, dict[str, Any]]) -> dict[tuple[str, str], Case]:
    """Per slice and program the mesh with the lowest floor, or most room, among those that fit."""
    chosen: dict[tuple[str, str], Case] = {}
    rank = lambda case: (  # noqa: E731
        not fits(case, found[case]),
        -found[case].get("tokens_per_s", 0.0),
        found[case].get("needed", math.inf),
    )
    for case in found:
        at = (case.slice, case.program)
        if at not in chosen or rank(case) < rank(chosen[at]):
            chosen[at] = case
    return chosen


def table(found: dict[Case, dict[str, Any]]) -> str:
    """A line per case; the best mesh of a program is marked."""
    chosen = set(best(found).values())
    rows = []
    for case, values in found.items():
        row = {
            "slice": case.slice,
            "program": case.program,
            "mesh": mesh_name(case.mesh) + (" *" if case in chosen and fits(case, values) else ""),
            "fits": "yes" if fits(case, values) else "no",
        }
        refused = "refused" in values
        row |= {k: "" if refused else f"{values[k] / GIB:.2f}" for k in (*KINDS, "needed")}
        row["of"] = f"{aot.chip_of(case.slice).hbm_gib}"
        row["moved MiB"] = "" if refused else f"{values['moved'] / 2**20:.1f}"
        for name in ("round_ms", "refresh_ms", "tokens_per_s"):
            digits = 0 if name == "tokens_per_s" else 2
            row[COLUMNS[name]] = f"{values[name]:,.{digits}f}" if name in values else ""
        rows.append(row)
    return markdown(rows)


def moves(found: dict[Case, dict[str, Any]]) -> str:
    """What moves most, on the best meshes."""
    rows = []
    for case in best(found).values():
        for move in found[case].get("collectives", ())[:3]:
            rows.append(
                {
                    "slice": case.slice,
                    "program": case.program,
                    "what": f"{move['op']} {move['shape']}",
                    "when": {-1: "always", 0: "round", 1: "refresh"}[move["branch"]],
                    "chips": f"{move['group']}",
                    "times": f"{move['times']}",
                    "MiB": f"{move['bytes_moved'] / 2**20:.2f}",
                }
            )
    return markdown(rows) if rows else "Nothing moves."


def draw(found: dict[Case, dict[str, Any]], path: pathlib.Path) -> None:
    """Memory by kind on the best mesh of every program, in % of a chip's: a panel per slice."""
    chosen = [case for case in best(found).values() if "refused" not in found[case]]
    slices = list(dict.fromkeys(case.slice for case in chosen))
    most = max(sum(case.slice == of for case in chosen) for of in slices)
    rows = math.ceil(len(slices) / 2)
    figure = Figure(figsize=(10, rows * (0.3 * most + 0.9) + 0.4), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True)
    for axis, of in itertools.zip_longest(axes.flat, slices):
        if of is None:
            axis.set_visible(False)
            continue
        own, hbm = [case for case in chosen if case.slice == of], aot.chip_of(of).hbm_gib
        left = [0.0] * len(own)
        for kind, colour in zip(KINDS, ("#0072b2", "#d55e00", "#009e73", "0.8"), strict=True):
            shares = [100 * found[case][kind] / GIB / hbm for case in own]
            axis.barh([case.program for case in own], shares, left=left, color=colour, label=kind)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        for i, (case, share) in enumerate(zip(own, left, strict=True)):
            axis.text(share + 1, i, mesh_name(case.mesh), va="center", fontsize=8, color="0.3")
        axis.set_title(f"{of}: {hbm} GiB per chip", fontsize=11)
        axis.axvline(100, color="tab:red", zorder=0)
        axis.set_xlim(0, 130)  # room for names
        axis.set_xticks(range(0, 101, 20))
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("% of a chip's memory")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def keep(
    out: pathlib.Path, results: dict[str, dict[str, Any]], lengths: Lengths, commands: list[str]
) -> None:
    """Writes pods.json into a folder."""
    about = {"lengths": dataclasses.asdict(lengths), "jax": jax.__version__}
    about |= {"commands": commands, "cases": results}
    (out / FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def in_order(results: dict[str, dict[str, Any]]) -> dict[Case, dict[str, Any]]:
    """All results by case: slices, and programs on each, in the order in which they came up."""
    found = {Case.of_key(key): values for key, values in results.items()}
    slices, programs = (
        list(dict.fromkeys(getattr(case, name) for case in found)) for name in ("slice", "program")
    )
    rank = lambda case: (slices.index(case.slice), programs.index(case.program))  # noqa: E731
    return {case: found[case] for case in sorted(found, key=rank)}


def write(
    out: pathlib.Path, results: dict[str, dict[str, Any]], lengths: Lengths, commands: list[str]
) -> None:
    """Writes pods.json, pods.md and pods.png: what was found, and by which commands."""
    keep(out, results, lengths, commands)
    found = in_order(results)
    text = tables(found, lengths)
    refused = {c.key: values["refused"] for c, values in found.items() if "refused" in values}
    if refused:
        text += "\nWhat the compiler says of those without figures:\n\n"
        text += "".join(f"- {key}: {why}\n" for key, why in refused.items())
    draw(found, out / "pods.png")
    introduction = _INTRODUCTION.format(commands="\n".join(f"    {line}" for line in commands))
    page = f"{introduction}\n\n![Memory](pods.png)\n\n{text}"
    (out / "pods.md").write_text(page, encoding="utf-8")


def tables(found: dict[Case, dict[str, Any]], lengths: Lengths) -> str:
    """What fits, how fast it can be at most, and what moves."""
    return (
        f"{lengths.prompt_len} prompt tokens, {lengths.gen_len} new ones in blocks of "
        f"{lengths.block_len}, {lengths.tokens_per_round:g} committed per row and round, "
        f"bfloat16, jax {jax.__version__}. *: the best mesh.\n\n"
        f"{table(found)}\n\nWhat moves most, on the best meshes:\n\n{moves(found)}\n"
    )
