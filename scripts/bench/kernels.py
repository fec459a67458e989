"""Timings of the two kernels at the shapes of real models, against XLA and library kernels.

Every case is first compared with float32 on the same random inputs. Times are medians over batches
of calls inside one jitted loop, each call depending on the one before and reading other memory than
it, so that neither dispatch nor the L2 cache is measured. Ceilings (a large copy, a large matrix
product) are measured in the same run; `floor_share` is the time that the unavoidable bytes or
operations take at those ceilings, over the measured time. A case that fails is a row that says why.

Finally one decode step of a masked-diffusion model with the dual cache, against its weights' bytes.
Random weights: speed only, no quality.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from kernels_pallas.unembed_stats.shapes import STATS, TOY_STATS
from kernels_pallas.window_attention.shapes import ATTENTION, TOY_ATTENTION
from scripts.bench.kernel_cases import DTYPE, Case, attention_cases, stats_cases, step_cases
from scripts.bench.timing import Ceilings, measure_ceilings, median_s

TOLERANCE = 1e-2  # relative, in norm: operands and weights are rounded to 8 bits
COLUMNS = ["case", "name", "implementation", "us", "gb_per_s", "tflops", "bound", "floor_share",
           "error", "status"]  # fmt: skip


def measure(case: Case, ceilings: Ceilings, repeats: int) -> dict[str, Any]:
    """One row: parity first, then the time; a failure is a row, too."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"case": case.case, "name": case.name, "implementation": case.implementation}
    row |= {"flops": case.flops, "bytes": case.num_bytes, "calls": case.calls, "status": "ok"}
    try:
        if case.error is not None:
            row["error"] = float(f"{case.error():.2g}")
            if not row["error"] <= TOLERANCE:
                row["status"] = f"wrong: more than {TOLERANCE} from float32"
        seconds = median_s(case.run(), repeats) / case.calls
    except Exception as failure:  # the other cases go on
        row["status"] = f"failed: {type(failure).__name__}: {str(failure).strip()[:300]}"
        return row
    compute_s = case.flops / ceilings.flops_per_s
    memory_s = case.num_bytes / ceilings.bytes_per_s
    return row | {
        "us": round(1e6 * seconds, 1),
        "gb_per_s": round(case.num_bytes / seconds / 1e9, 1),
        "tflops": round(case.flops / seconds / 1e12, 2),
        "bound": "compute" if compute_s > memory_s else "bandwidth",
        "floor_share": round(max(compute_s, memory_s) / seconds, 3),
    }


def run(is_toy: bool, calls: int, only: str, out: str | None, repeats: int) -> None:
    """Measures every case, printing a JSON line each and a table at the end.

    Args:
      is_toy: toy shapes: checks the script, measures nothing.
      calls: kernel calls per timed batch.
      only: measures only the cases whose name contains this.
      out: folder for kernels.jsonl and kernels.md; None: nothing is written.
      repeats: timed batches.
    """
    on_cpu = jax.default_backend() == "cpu"
    sizes = (256, 2**22) if is_toy else None
    ceilings = measure_ceilings("float32" if on_cpu else "bfloat16", repeats, sizes)
    about = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "dtype": DTYPE.__name__,
        "repeats": repeats, "ceiling_gb_per_s": round(ceilings.bytes_per_s / 1e9, 1),
        "ceiling_tflops": round(ceilings.flops_per_s / 1e12, 2),
    }  # fmt: skip
    attention = TOY_ATTENTION if is_toy else ATTENTION
    stats = TOY_STATS if is_toy else STATS
    calls = min(2, calls) if is_toy else calls
    makers: list[Iterator[Case]] = [attention_cases(*item, calls) for item in attention.items()]
    makers += [stats_cases(*item, calls) for item in stats.items()]
    makers.append(step_cases(is_toy))
    rows = []
    for cases in makers:
        for case in cases:
            if only in f"{case.case} {case.name} {case.implementation}":
                rows.append(about | measure(case, ceilings, repeats))
                print(json.dumps(rows[-1]), flush=True)
    head = " ".join(f"{name}={value}" for name, value in about.items())
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(row[c])[:80] for c in COLUMNS) + " |" for row in rows]
    text = head + "\n\n" + "\n".join(lines)
    print("\n" + text)
    if out:
        folder = pathlib.Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "kernels.md").write_text(text + "\n")
