"""What is timed of the kernels: every operation at a shape, as each implementation has it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decode.diffusion.components import FixedBlocks, Threshold, by_name
from decode.diffusion.loop import DiffusionMethod, init_state, step
from dlm.params import init_params
from dlm.presets import PRESETS
from kernels_pallas.unembed_stats import Noise, VocabStats, logits_stats, unembed_logits
from kernels_pallas.unembed_stats import unembed_stats as stats_op
from kernels_pallas.unembed_stats.shapes import StatsShape
from kernels_pallas.window_attention import window_attention
from kernels_pallas.window_attention.shapes import AttentionShape
from scripts.bench.decode import STEPS_PER_CALL, repeat_step
from scripts.bench.timing import forward_cost

DTYPE = jnp.bfloat16
ROTATED_BYTES = 2**28  # what a batch of calls reads at least in turn; an H200 caches 60 MB


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
      run: makes a jitted function without arguments that makes `calls` calls in turn.
      error: relative difference from float32, if there is something to compare.
      flops: operations of one call; num_bytes: bytes it cannot avoid to move.
    """

    case: str
    name: str
    implementation: str
    run: Callable[[], Callable[[], Any]]
    error: Callable[[], float] | None
    calls: int
    flops: float
    num_bytes: float


def compared() -> tuple[str | None, ...]:
    """Implementations by name, so that none stands in for another; on CPU there is no kernel."""
    backend = jax.default_backend()
    return (backend, "xla") if backend in ("gpu", "tpu") else (None, "xla")


def random(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(DTYPE)


def relative_error(got: Any, exact: Any) -> float:
    got, exact = (np.asarray(x, np.float64) for x in (got, exact))
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def attention_cases(name: str, shape: AttentionShape, calls: int) -> Iterator[Case]:
    """`window_attention`: the kernel, XLA, and library kernels on keys laid out for them."""
    B, T, S, N, K, H = shape.B, shape.T, shape.S, shape.N, shape.K, shape.H
    visible = (T + 1) / 2 if shape.mask == "causal" else T  # on average, of the window
    flops = 4.0 * B * T * N * H * (S + visible)
    num_bytes = 2.0 * H * B * (2 * K * (S + T) + 2 * T * N)
    layers = max(2, min(64, -(-ROTATED_BYTES // (4 * B * K * max(S, 1) * H)))) if S else 1

    @functools.cache
    def inputs() -> dict[str, Any]:
        q, k, v = (random(i, (B, T, n, H)) for i, n in enumerate((N, K, K)))
        mask: Any = shape.mask
        if mask == "bits":
            words = (B, T, -(-T // 32))
            mask = jax.random.bits(jax.random.key(3), words, jnp.uint32)
        arguments = {"q": q, "k": k, "v": v, "mask": mask, "cache": None, "cache_ranges": None}
        if S:  # everything is valid; two ranges meet in the middle, as around a block
            borders = [0, S] if shape.num_ranges == 1 else [0, S // 2, S]
            ranges = jnp.array([list(itertools.pairwise(borders))] * B)
            cache = (random(4, (layers, B, K, S, H)), random(5, (layers, B, K, S, H)))
            arguments |= {"cache": cache, "cache_ranges": ranges}
        return arguments

    def attend(implementation: str | None, arguments: dict[str, Any], layer: Any) -> jax.Array:
        return window_attention(**arguments, layer=layer, implementation=implementation)  # type: ignore[arg-type]

    def run(implementation: str | None) -> Callable[[], Any]:
        static = {"mask": inputs()["mask"]} if isinstance(inputs()["mask"], str) else {}
        arrays = {name: x for name, x in inputs().items() if name not in static}

        @jax.jit
        def batch(arrays: dict[str, Any]) -> jax.Array:
            def body(i: jax.Array, q: jax.Array) -> jax.Array:
                return arrays["q"] + attend(implementation, arrays | static | {"q": q}, i % layers)

            return jax.lax.fori_loop(0, calls, body, arrays["q"])

        return lambda: batch(arrays)

    def error(implementation: str | None) -> float:
        arguments = inputs()
        if S:
            arguments = arguments | {"cache": tuple(c[:1] for c in arguments["cache"])}
        exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == DTYPE else x,
                             {n: x for n, x in arguments.items() if n != "mask"})  # fmt: skip
        with jax.default_matmul_precision("highest"):
            expected = attend("xla", exact | {"mask": arguments["mask"]}, 0)
        return relative_error(attend(implementation, arguments, 0), expected)

    case = functools.partial(Case, "attention", name, calls=calls, flops=flops, num_bytes=num_bytes)
    for implementation in compared():
        runs, errors = (
            functools.partial(run, implementation),
            functools.partial(error, implementation),
        )
        yield case(implementation or "default", runs, errors)
    if shape.mask == "bits":
        return  # the libraries know no such mask

    def run_library(attend: Callable[..., jax.Array]) -> Callable[[], Any]:
        """All keys in one array already, one array per call: better than they would find it."""
        num_sets = min(calls, max(2, ROTATED_BYTES // (4 * B * K * (S + T) * H)), 8)
        q = inputs()["q"]
        sets = [
            tuple(random(10 + 2 * i + j, (B, S + T, K, H)) for j in range(2))
            for i in range(num_sets)
        ]

        @jax.jit
        def batch(q: jax.Array, sets: Any) -> jax.Array:
            out = q
            for i in range(calls):
                out = q + attend(
                    out, *sets[i % num_sets], is_causal=shape.mask == "causal" and T > 1
                )
            return out

        return lambda: batch(q, sets)

    def tokamax() -> Callable[[], Any]:
        import tokamax  # type: ignore[import-not-found,unused-ignore]  # optional

        return run_library(tokamax.dot_product_attention)

    if not (shape.mask == "causal" and T > 1 and S):  # their diagonal would lie elsewhere
        yield case("jax.nn", lambda: run_library(jax.nn.dot_product_attention), None)
        if jax.default_backend() == "gpu":
            cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
            yield case("jax.nn cudnn", lambda: run_library(cudnn), None)
        yield case("tokamax", tokamax, None)


def stats_cases(name: str, shape: StatsShape, calls: int) -> Iterator[Case]:
    """`unembed_stats`: the kernel, XLA, stored logits, and the matrix product alone."""
    M, D, V = shape.M, shape.D, shape.V
    calls = min(calls, 8)  # the head is too large for caches, and takes long enough

    @functools.cache
    def inputs() -> tuple[jax.Array, jax.Array, Noise | None]:
        hidden, head = random(0, (M, D)), random(1, (V, D)) * (3 * D**-0.5)
        noise = None
        if shape.has_noise:
            key = jax.random.bits(jax.random.key(2), (M, 2), jnp.uint32)
            noise = Noise(key, jnp.float32(0.7))
        return hidden, head.astype(DTYPE), noise

    def fused(implementation: str | None) -> Callable[..., VocabStats]:
        return lambda h, w, n: stats_op(h, w, noise=n, implementation=implementation)  # type: ignore[arg-type]

    def stored(hidden: jax.Array, head: jax.Array, noise: Noise | None) -> VocabStats:
        logits = jax.lax.optimization_barrier(unembed_logits(hidden, head))
        return logits_stats(logits, noise=noise)

    def product(hidden: jax.Array, head: jax.Array, noise: Noise | None) -> jax.Array:
        return jax.lax.optimization_barrier(hidden @ head.T)[:, 0]

    def run(judge: Callable[..., Any]) -> Callable[[], Any]:
        @jax.jit
        def batch(hidden: jax.Array, head: jax.Array, noise: Noise | None) -> jax.Array:
            def body(_: int, h: jax.Array) -> jax.Array:
                said = judge(h, head, noise)
                if isinstance(said, VocabStats):
                    # Whatever is asked for must be computed.
                    parts = [x for x in jax.tree.leaves(said) if x.dtype == jnp.float32]
                    said = sum(parts) + said.token
                return hidden + (said * 1e-6)[:, None].astype(DTYPE)

            return jax.lax.fori_loop(0, calls, body, hidden)

        return lambda: batch(*inputs())

    def error(judge: Callable[..., VocabStats]) -> float:
        hidden, head, noise = inputs()
        got = jax.jit(judge)(hidden, head, noise)
        exact = jax.jit(stored)(hidden, head, noise)  # the products are exact, the sums float32
        # An arg-max may differ where logits tie to rounding, and then has the same log_prob.
        names = ("log_prob", "second_log_prob", "entropy", "logsumexp")
        return max(relative_error(getattr(got, n), getattr(exact, n)) for n in names)

    case = functools.partial(
        Case, "stats", name, calls=calls, flops=2.0 * M * D * V, num_bytes=2.0 * (V * D + M * D)
    )
    for implementation in compared():
        judge = fused(implementation)
        yield case(
            implementation or "default",
            functools.partial(run, judge),
            functools.partial(error, judge),
        )
    yield case("matmul, stored logits", functools.partial(run, stored), None)
    yield case("matmul alone", functools.partial(run, product), None)


def step_cases(is_toy: bool) -> Iterator[Case]:
    """A block's step of a dual-cache decode at batch 1: 32 positions over a canvas of 4096."""
    preset, canvas, block = ("tiny", 32, 8) if is_toy else ("llada_8b", 4096, 32)
    cfg = PRESETS[preset]
    flops, num_bytes = forward_cost(cfg, 1, block, canvas - block, block)

    def run() -> Callable[[], Any]:
        method = DiffusionMethod(
            scheduler=FixedBlocks(block), cache=by_name("cache", "dual"), rule=Threshold(0.9)
        )
        params = jax.block_until_ready(init_params(jax.random.key(0), cfg))
        prompt = np.random.default_rng(0).integers(0, cfg.vocab_size - 8, canvas // 2).tolist()
        state = init_state(cfg, method, [prompt], gen_len=canvas // 2)
        # Past the refresh, so that the timed step is a window forward.
        state = jax.jit(step, static_argnames=("cfg",))(params, cfg, method, state)
        return functools.partial(
            jax.jit(repeat_step, static_argnames=("cfg",)), params, cfg, method, state
        )

    yield Case(
        "step", f"{preset} dual cache", "default", run, None, STEPS_PER_CALL, flops, num_bytes
    )
