"""What benchmarks share: timing in turn, what a device can do at best, what a forward needs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlm.blocks.linear import product
from dlm.config import ModelConfig
from dlm.params import num_expert_params, num_params

READ_WIDTH = 1024  # columns of the matrix that is read


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device can do at best, measured in this run."""

    flops_per_s: float
    bytes_per_s: float


def median_s(run: Callable[[], Any], repeats: int) -> float:
    """Median wall time of `run`, which returns arrays; one warm-up first."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def paired_medians_s(runs: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Medians of `paired_times_s`."""
    return {name: float(np.median(t)) for name, t in paired_times_s(runs, repeats).items()}


def paired_times_s(runs: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, list[float]]:
    """Several runs timed in turn, so that a drifting machine drifts for all of them."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return times


def measure_ceilings(dtype: str, repeats: int, sizes: tuple[int, int] | None = None) -> Ceilings:
    """A square matrix product, and a matrix that is read for a vector; both too large for caches.

    Args:
      dtype: of all of them.
      repeats: medians of so many.
      sizes: rows of the square matrices, and bytes of the other; None: `large_sizes`.
    """
    n, num_bytes = sizes or large_sizes()
    a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
    multiply = jax.jit(product, static_argnums=2)  # as models do
    seconds = median_s(lambda: multiply(a, a, 0), repeats)
    flops = 2 * n**3 / seconds
    vector = jnp.ones((1, READ_WIDTH), dtype)
    matrix = jnp.ones((num_bytes // vector.nbytes, READ_WIDTH), dtype)
    return Ceilings(flops, matrix.nbytes / median_s(lambda: multiply(vector, matrix, 1), repeats))


def large_sizes() -> tuple[int, int]:
    """Rows of a square matrix, and bytes, that are too many for caches."""
    return (1536, 2**28) if jax.default_backend() == "cpu" else (8192, 2**31)


def forward_cost(
    cfg: ModelConfig, batch: int, window: int, cached: int, judged: int
) -> tuple[float, float]:
    """Operations and bytes that one forward over `window` positions cannot avoid.

    Bytes: every weight once, the cached keys and values once; of experts those that somebody
    chooses, if all are chosen alike. Operations: two per weight that a position uses (the head for
    `judged` positions), plus attention.
    """
    head = cfg.vocab_size * cfg.d_model
    embeddings = head if cfg.tie_embeddings else 2 * head
    body = num_params(cfg) - embeddings
    used, read = float(body), float(body)
    if cfg.experts is not None:
        chosen, share = num_expert_params(cfg), cfg.experts.num_chosen / cfg.experts.num_experts
        used -= chosen * (1 - share)
        read -= chosen * (1 - share) ** (batch * window)
    width = cfg.n_heads * cfg.head_dim
    attention = 4 * batch * window * (window + cached) * width * cfg.n_layers
    flops = 2.0 * batch * (window * used + judged * head) + attention
    item = jnp.dtype(cfg.dtype).itemsize
    cache = 2 * batch * cached * cfg.n_kv_heads * cfg.head_dim * cfg.n_layers
    return flops, float(item * (read + head + cache))


def table(results: list[dict[str, Any]], case: str, columns: list[str]) -> str:
    """One case's results as a Markdown table."""
    rows = [[str(r[c]) for c in columns] for r in results if r["case"] == case]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
