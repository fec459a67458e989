"""What drafters do for real prompts, by category: acceptance, speed, and whether texts stay.

Every prompt is decoded greedily, at batch 1, by each method in turn, as often as asked for; then
comes the next prompt. Per category, and over all:

    tau          tokens per forward of the target, what an end cut off not counted; plain: 1.00
    tokens/s     of decoding; reading the prompt and compiling apart
    with prompt  likewise, reading the prompt included
    share        of the time of plain decoding over that of the method, with a 95 % interval over
                 prompts (bootstrap)
    break-even   tau from which a round pays: its seconds over those of a plain round
    same text    prompts whose text is plain decoding's, token for token; of the others the first
                 divergence is listed, with the margin between the two best log-probabilities there
    widths       rounds by how many nodes a controller had judged (0: nobody drafted), in per cent

Other libraries decode the same prompts in the same turns; their seconds include the prompt, and are
compared with plain decoding's that do, too. A run that is interrupted goes on behind the prompts
that its log has, if they were measured with the same methods, weights, versions and device.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import dlm
from decode.complete import complete
from decode.core.loop import FOREVER
from decode.core.results import Completion
from decode.evaluation.lossless import Parting, first_parting
from decode.evaluation.record import Record
from decode.evaluation.run import device
from decode.evaluation.statistics import bootstrap_ratio
from decode.evaluation.tables import markdown
from decode.files import describe
from decode.speculative.answers import collect
from decode.speculative.controller import Controller
from decode.speculative.costs import with_costs
from decode.speculative.loop import SpeculativeMethod, SpeculativeState, decode, init_state, prefill
from decode.speculative.points import named
from scripts.compare_hf.decoders import Decoder

PLAIN, CONTROLLED = "plain", ", controlled"
SHORTEST = 64  # prompts are padded to a power of two, at least this


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt, by its number within its category."""

    category: str
    number: int
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One method on one prompt.

    Attributes:
      method: its name.
      category: of the prompt.
      prompt: its number within the category.
      seconds: of decoding, per repeat; of other libraries with the prompt.
      prefill_s: of reading the prompt; None: in `seconds`.
      took_s: seconds of all repeats, compiling included.
      num_tokens: that were written.
      num_forwards: of the target.
      parting: where the text leaves plain decoding's.
      rounds_by_width: what the controller has chosen; None without one.
    """

    method: str
    category: str
    prompt: int
    seconds: list[float]
    prefill_s: float | None
    took_s: float
    num_tokens: int
    num_forwards: int
    parting: Parting | None
    rounds_by_width: dict[int, int] | None


def methods_of(names: list[str], controllers: list[str]) -> dict[str, SpeculativeMethod]:
    """Plain decoding, and each drafter as `both` has it.

    Raises:
      ValueError: there is no such drafter.
    """
    methods = {PLAIN: named(PLAIN)}
    for name in names:
        methods |= both(name, named(name), controllers)
    return methods


def both(
    name: str, method: SpeculativeMethod, controllers: list[str]
) -> dict[str, SpeculativeMethod]:
    """A method without ("off") a controller and with one ("on"), as far as it is asked for.

    Raises:
      ValueError: it is asked for neither way.
    """
    if not controllers or set(controllers) - {"on", "off"}:
        raise ValueError(f"controller={controllers} must be of on and off")
    ways = {
        "off": (name, method),
        "on": (name + CONTROLLED, method.replace(controller=Controller())),
    }
    return dict(ways[way] for way in controllers)


def measure(
    lm: dlm.LanguageModel,
    methods: Mapping[str, SpeculativeMethod],
    prompts: Mapping[str, list[list[int]]],
    gen_len: int,
    repeats: int,
    others: Mapping[str, Decoder],
    log: str | os.PathLike[str] | None = None,
) -> Iterator[Measured]:
    """Every method, and every decoder of `others`, on every prompt, short prompts first.

    Programs are kept for prompts that are padded to the same length: those of all methods and
    lengths would have more parts than Linux maps for a process (vm.max_map_count).

    Args:
      lm: the target.
      methods: by name; plain decoding must be among them.
      prompts: token ids, by category.
      gen_len: most tokens to write.
      repeats: timed runs of each.
      others: decoders of other libraries, by name.
      log: JSON lines, see `decode.evaluation.record`; each prompt is added when all methods are
        done with it. None: nothing is kept.

    Raises:
      ValueError: a line of the log is broken, or another process writes it.
    """
    same = {
        "checkpoint": dlm.fingerprint(lm),
        "dtype": lm.cfg.dtype,
        "methods": {name: describe(method) for name, method in methods.items()},
        "others": list(others),
        "gen_len": gen_len,
        "repeats": repeats,
        "device": device(),
        "jax": jax.__version__,
    }
    asked = [Asked(c, i, prompt) for c, some in prompts.items() for i, prompt in enumerate(some)]
    asked.sort(key=_padded_len)
    record, warm = Record(log), set[tuple[str, int]]()
    with record.adding() as add:
        for one in tqdm(asked, unit="prompt"):
            settings = json.dumps(same | dataclasses.asdict(one))
            key = hashlib.sha256(settings.encode()).hexdigest()
            if key not in record.found:
                found = _of_prompt(lm, methods, one, gen_len, repeats, others, warm)
                add(key, {"measured": [dataclasses.asdict(m) for m in found]})
            yield from map(_from_log, record.found[key]["measured"])


def _from_log(said: dict[str, Any]) -> Measured:
    parting, widths = said["parting"], said["rounds_by_width"]
    read = {
        "parting": parting and Parting(**parting),
        "rounds_by_width": widths and {int(width): n for width, n in widths.items()},
    }
    return Measured(**said | read)


def _of_prompt(
    lm: dlm.LanguageModel, methods: Mapping[str, SpeculativeMethod], asked: Asked, gen_len: int,
    repeats: int, others: Mapping[str, Decoder], warm: set[tuple[str, int]],
) -> list[Measured]:  # fmt: skip
    """What `measure` finds with one prompt; `warm` gets what was compiled."""
    if not warm:
        for run in others.values():
            run(asked.tokens)
    P = _padded_len(asked)
    if any(padded != P for _, padded in warm):
        jax.clear_caches()
        warm.clear()
    ready, prefill_s, took_s = {}, {}, {}
    for name, method in methods.items():
        begun = time.perf_counter()
        start = functools.partial(_start, lm, prompt=asked.tokens, prompt_len=P, gen_len=gen_len)
        method = with_costs(lm.params, lm.cfg, method, start)
        if (name, P) not in warm:  # compiles
            jax.block_until_ready(decode(lm.params, lm.cfg, method, start(method), 1, FOREVER))
            warm.add((name, P))
        began = time.perf_counter()
        ready[name] = method, jax.block_until_ready(start(method))
        ended = time.perf_counter()
        prefill_s[name], took_s[name] = ended - began, ended - begun
    seconds: dict[str, list[float]] = {name: [] for name in (*methods, *others)}
    texts: dict[str, Completion] = {}
    found: dict[str, tuple[np.ndarray, int]] = {}
    for _ in range(repeats):
        for name, (method, first) in ready.items():
            state = jax.block_until_ready(jax.tree.map(jnp.copy, first))
            began = time.perf_counter()
            state = decode(lm.params, lm.cfg, method, state, FOREVER, FOREVER)
            jax.block_until_ready(state)
            seconds[name].append(time.perf_counter() - began)
            (texts[name],) = collect(state, lm, method)
            found[name] = texts[name].canvas, texts[name].num_forwards
        for name, run in others.items():
            tokens, forwards, elapsed = run(asked.tokens)
            seconds[name].append(elapsed)
            found[name] = np.array(tokens), forwards
    plain = texts[PLAIN]
    if any(not np.array_equal(canvas, plain.canvas) for canvas, _ in found.values()):
        plain = complete(lm, asked.tokens, gen_len=gen_len, top_logprobs=2)
    return [
        Measured(
            name, asked.category, asked.number, seconds[name], prefill_s.get(name),
            took_s.get(name, 0.0) + sum(seconds[name]), len(canvas), forwards,
            None if np.array_equal(canvas, plain.canvas) else first_parting(plain, canvas),
            texts[name].rounds_by_width if name in texts else None,
        )
        for name, (canvas, forwards) in found.items()
    ]  # fmt: skip


def _padded_len(asked: Asked) -> int:
    return max(SHORTEST, 1 << (len(asked.tokens) - 1).bit_length())


def _start(
    lm: dlm.LanguageModel,
    method: SpeculativeMethod,
    prompt: list[int],
    prompt_len: int,
    gen_len: int,
) -> SpeculativeState:
    state = init_state(lm.cfg, method, [prompt], gen_len=gen_len, prompt_len=prompt_len)
    return prefill(lm.params, lm.cfg, method, state)


def summary(found: list[Measured], categories: Iterable[str]) -> list[dict[str, Any]]:
    """A row per category and method, in this order; at last over all categories."""
    rows = []
    for category in [*categories, "all"]:
        here = [m for m in found if category in (m.category, "all")]
        plain = [m for m in here if m.method == PLAIN]
        for method in dict.fromkeys(m.method for m in here):
            of = [m for m in here if m.method == method]
            is_other = of[0].prefill_s is None
            times, plain_times = ([_seconds(m, is_other) for m in some] for some in (of, plain))
            tokens, forwards = sum(m.num_tokens for m in of), sum(m.num_forwards for m in of)
            plain_round_s = sum(plain_times) / sum(m.num_forwards for m in plain)
            rows.append(
                {
                    "category": category, "method": method, "prompts": len(of),
                    "tau": tokens / forwards,
                    "tokens_per_s": None if is_other else tokens / sum(times),
                    "with_prompt": tokens / sum(_seconds(m, True) for m in of),
                    "share": sum(plain_times) / sum(times),
                    "interval": bootstrap_ratio(plain_times, times),
                    "break_even": sum(times) / forwards / plain_round_s,
                    "same_text": sum(m.parting is None for m in of), "widths": _widths(of),
                }
            )  # fmt: skip
    return rows


def _seconds(measured: Measured, with_prompt: bool) -> float:
    prefill_s = measured.prefill_s if with_prompt else None
    return float(np.median(measured.seconds)) + (prefill_s or 0.0)


def _widths(found: list[Measured]) -> dict[int, int] | None:
    """Rounds by width, over all prompts."""
    total: dict[int, int] = {}
    for m in found:
        if m.rounds_by_width is None:
            return None
        for width, rounds in m.rounds_by_width.items():
            total[width] = total.get(width, 0) + rounds
    return total


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `summary`, to be read."""
    lines = []
    for row in rows:
        widths = row["widths"] or {}
        total = max(1, sum(widths.values()))
        lines.append(
            {
                "category": row["category"],
                "method": row["method"],
                "tau": f"{row['tau']:.2f}",
                "tokens/s": "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.1f}",
                "with prompt": f"{row['with_prompt']:.1f}",
                "share of plain": "{:.2f} ({:.2f} to {:.2f})".format(
                    row["share"], *row["interval"]
                ),
                "break-even": f"{row['break_even']:.2f}",
                "same text": f"{row['same_text']}/{row['prompts']}",
                "widths (%)": ", ".join(f"{w}: {100 * n / total:.0f}" for w, n in widths.items()),
            }
        )
    return markdown(lines)


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Share of plain decoding, a panel per category: without a controller hollow, else filled."""
    categories = list(dict.fromkeys(row["category"] for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != PLAIN))
    drafters = list(dict.fromkeys(name.removesuffix(CONTROLLED) for name in names))
    columns = min(4, len(categories))
    lines = -(-len(categories) // columns)
    size = 1.9 * columns + 1.8, lines * (0.2 * len(drafters) + 0.5) + 0.7
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for category, axes in itertools.zip_longest(categories, panels.flat):
        if category is None:
            axes.set_visible(False)
            continue
        axes.set_title(category, fontsize=8)
        axes.axvline(1, color="0.7", linewidth=1)
        of = {row["method"]: row for row in rows if row["category"] == category}
        for suffix, face, shift in (("", "white", -0.15), (CONTROLLED, "C0", 0.15)):
            found = [(i, of[d + suffix]) for i, d in enumerate(drafters) if d + suffix in of]
            if not found:
                continue
            share = np.array([row["share"] for _, row in found])
            low, high = np.array([row["interval"] for _, row in found]).T
            axes.errorbar(
                share, [i + shift for i, _ in found],
                xerr=np.maximum([share - low, high - share], 0), fmt="o", color="C0",
                markerfacecolor=face, markersize=4, linewidth=1,
                label="with a controller" if suffix else "without",
            )  # fmt: skip
        is_last = categories.index(category) + columns >= len(categories)  # of its column
        axes.tick_params(axis="x", which="both", labelsize=6, labelbottom=is_last)
        axes.tick_params(axis="y", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    first = panels[0, 0]
    first.set_xscale("log")
    first.set_yticks(range(len(drafters)), drafters)
    first.set_ylim(len(drafters) - 0.5, -0.5)
    first.xaxis.set_major_formatter("{x:g}")
    first.xaxis.set_minor_formatter("{x:g}")
    label = "tokens per second over those of plain decoding (95 % intervals over prompts)"
    figure.supxlabel(label, fontsize=8)
    lines_and_names = first.get_legend_handles_labels()
    figure.legend(*lines_and_names, fontsize=7, loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=150)


def divergences(found: list[Measured]) -> list[str]:
    """A sentence for every text that parts from plain decoding's."""
    return [
        f"{m.method}, {m.category} {m.prompt}: parts at token {m.parting.position} of "
        f"{m.num_tokens}, where the two best are {m.parting.margin:.2g} nats apart"
        for m in found
        if m.parting is not None
    ]
