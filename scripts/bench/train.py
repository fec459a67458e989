"""Training steps against their own matrix products.

Steps of the waiting-line config and of a larger model, with and without recomputed activations.
`over_ceiling` is the time of a step over that of its operations at the speed of one large product,
`over_products` over that of the same products done one after the other, in their own shapes.
Operations are those executed, recomputed ones included (`gflop`); `needed_gflop` leaves those out.
All are timed in turn, and `spread` is the range between the quartiles over the median. `mfu` is the
share of the time of a step that the needed operations take at the speed of that large product (of
the published peak it would be less). `input_wait` is the share of its time that the training loop
waits for a batch from `train.data.train_iterator`; `input_cost` is the share by which it is faster
with a batch that lies there already.

Letters: B batch, T positions, D model width, N query heads, K key/value heads, H head width,
F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import mdlm_waiting_line
from dlm.config import ModelConfig
from dlm.memory import keep_freed_memory
from dlm.params import Params, init_params, num_params
from dlm.sharding import make_mesh
from dlm.tokenizer import word_tokenizer
from dlm.trainable import Learned
from scripts.bench.timing import forward_cost, large_sizes, paired_times_s
from train import data
from train import step as step_lib
from train.config import RunConfig, build, from_config_dict
from train.objectives import Context

COLUMNS = ["model", "remat", "tokens", "step_ms", "spread", "gradient_ms", "forward_ms", "gflop",
           "needed_gflop", "ceiling_gflops", "products_gflops", "ceiling_share", "mfu",
           "over_ceiling", "over_products", "input_wait", "input_cost"]  # fmt: skip

Shape = tuple[int, ...]
Product = tuple[Shape, Shape, tuple[int, int]]  # two shapes; the axis multiplied over, from the end


def bench_train(
    name: str, cfg: ModelConfig, lengths: tuple[int, int, int], repeats: int
) -> Iterator[dict[str, Any]]:
    """Results of the waiting-line config, and of another model on random tokens.

    Args:
      name: of the other model.
      cfg: the other model.
      lengths: its rows per batch, prompt tokens, completion tokens.
      repeats: timed runs.
    """
    keep_freed_memory()  # as `python -m train` does
    if cfg.mask_token_id is None:  # of an autoregressive preset: as if it were to be converted
        cfg = dataclasses.replace(cfg, mask_token_id=cfg.vocab_size - 1)
    settings = from_config_dict(mdlm_waiting_line.get_config())
    task = build({**settings.data.task, **settings.data.train}, "data.train")
    tokenizer = word_tokenizer(task.pieces)
    small = ModelConfig(
        **settings.model, vocab_size=tokenizer.vocab_size, mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    shape = (settings.data.batch_size, settings.data.prompt_len, settings.data.completion_len)
    iterator = data.train_iterator(task, tokenizer, settings.data)
    yield from _bench_model("waiting_line", small, settings, shape, iterator, repeats)
    iterator.close()
    yield from _bench_model(name, cfg, settings, lengths, None, repeats)


def _bench_model(
    name: str,
    cfg: ModelConfig,
    settings: RunConfig,
    lengths: tuple[int, int, int],
    iterator: Iterator[Any] | None,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """With and without recomputed activations, timed in turn and with all products."""
    params, batch = init_params(jax.random.key(0), cfg), _random_batch(cfg, *lengths)
    optim = dataclasses.replace(settings.optim, decay_steps=1_000_000)
    key = jax.random.key(1)
    step = jax.jit(
        step_lib.train_step,
        static_argnames=("cfg", "objective", "optim"),
        donate_argnames="state",
    )
    n, _ = large_sizes()
    square: Product = ((n, n), (n, n), (-1, -2))
    made = {remat: train_products(cfg, *lengths, remat) for remat in (True, False)}
    runs: dict[Any, Callable[[], Any]] = {
        product: _run_product(product, cfg.dtype) for product in {square, *made[True]}
    }
    steps = {}
    for remat in made:
        objective = build({**settings.train.objective, "remat": remat}, "train.objective")
        states = [step_lib.init_state(jax.tree.map(jnp.copy, params), optim=optim)]

        def train(given: Any = batch, states: Any = states, objective: Any = objective) -> Any:
            states[0], metrics = step(
                states[0], given, key, cfg=cfg, objective=objective, optim=optim
            )
            return metrics

        def loss(params: Params, objective: Any = objective) -> jax.Array:
            return objective.loss(Learned(params), cfg, batch, Context(key))[0]

        runs["step", remat] = steps[remat] = train
        runs["gradient", remat] = functools.partial(jax.jit(jax.value_and_grad(loss)), params)
        runs["forward", remat] = functools.partial(jax.jit(loss), params)
    times = paired_times_s(runs, repeats)

    medians = {name: float(np.median(t)) for name, t in times.items()}
    speed = product_flops(square) / medians[square]
    B, P, G = lengths
    needed = 3 * forward_cost(cfg, B, P + G, 0, G)[0]
    for remat in made:
        seconds = medians["step", remat]
        quarters = np.quantile(times["step", remat], (0.25, 0.75))
        flops = sum(count * product_flops(p) for p, count in made[remat].items())
        products = sum(count * medians[p] for p, count in made[remat].items())
        shares = _input_shares(steps[remat], iterator, repeats) if iterator else (None, None)
        yield {
            "case": "train", "model": name, "device": jax.devices()[0].device_kind,
            "jax": jax.__version__, "dtype": cfg.dtype, "params_m": round(num_params(cfg) / 1e6, 2),
            "batch": B, "prompt_len": P, "gen_len": G, "tokens": B * (P + G), "remat": remat,
            "repeats": repeats, "step_ms": round(1e3 * seconds, 1),
            "spread": round(float(np.ptp(quarters)) / seconds, 2),
            "gradient_ms": round(1e3 * medians["gradient", remat], 1),
            "forward_ms": round(1e3 * medians["forward", remat], 1),
            "gflop": round(flops / 1e9, 3),
            "needed_gflop": round(needed / 1e9, 3),
            "ceiling_gflops": round(speed / 1e9, 1),
            "products_gflops": round(flops / products / 1e9, 1),
            "ceiling_share": round(flops / speed / seconds, 2),
            "mfu": round(needed / speed / seconds, 3),
            "over_ceiling": round(seconds * speed / flops, 2),
            "over_products": round(seconds / products, 2),
            "input_wait": shares[0], "input_cost": shares[1],
        }  # fmt: skip


def train_products(
    cfg: ModelConfig, batch: int, prompt_len: int, gen_len: int, remat: bool
) -> dict[Product, int]:
    """Every matrix product of a step of masked diffusion, and how often it is made.

    One forward, and twice as much backward. The backward pass makes the head's logits again, and
    with `remat` all else but the products with `down`, on which nothing in their layer depends.
    """
    T, L, D, F = prompt_len + gen_len, cfg.n_layers, cfg.d_model, cfg.d_ff
    N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    made: collections.Counter[Product] = collections.Counter()

    def add(x: Shape, w: Shape, axis: int, forwards: int, layers: int = L) -> None:
        """x times w over w's axis -1 or -2, `forwards` times, and the two products of gradients."""
        other = -3 - axis
        y = (*x[:-1], w[other])
        made[x, w, (-1, axis)] += layers * forwards
        made[y, w, (-1, other)] += layers
        made[(x, y, (-2, -2)) if axis == -2 else (y, x, (-2, -2))] += layers

    rows, twice = batch * T, 1 + remat
    for heads in (N, K, K):  # stored output-first, as is the head
        add((rows, D), (heads * H, D), -1, twice)
    add((batch * K, N // K * T, H), (batch * K, T, H), -1, twice)
    add((batch * K, N // K * T, T), (batch * K, T, H), -2, twice)
    add((rows, N * H), (N * H, D), -2, twice)
    add((rows, D), (D, F), -2, twice)
    add((rows, D), (D, F), -2, twice)
    add((rows, F), (F, D), -2, 1)
    add((batch * gen_len, D), (cfg.vocab_size, D), -1, 2, layers=1)
    return dict(made)


def product_flops(product: Product) -> float:
    """Operations of one product."""
    x, w, (_, axis) = product
    return 2.0 * math.prod(x) * math.prod(w[-2:]) / w[axis]


def _run_product(product: Product, dtype: str) -> Callable[[], jax.Array]:
    x, w, axes = product
    operands = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate((x, w)))
    over = [(len(x) + axis,) for axis in axes]
    alike = tuple(range(len(x) - 2))
    dimensions = ((over[0], over[1]), (alike, alike))
    multiply = jax.jit(lambda x, w: jax.lax.dot_general(x, w, dimensions))
    return functools.partial(multiply, *(operand.astype(dtype) for operand in operands))


def _random_batch(cfg: ModelConfig, rows: int, prompt_len: int, gen_len: int) -> data.Batch:
    shape = (rows, prompt_len + gen_len)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, cfg.vocab_size - 3)
    return {
        "prompt": tokens[:, :prompt_len],
        "prompt_start": jnp.zeros(rows, jnp.int32),
        "completion": tokens[:, prompt_len:],
        "completion_len": jnp.full(rows, gen_len),
        "index": jnp.arange(rows),
    }


def _input_shares(
    train: Callable[[Any], Any], iterator: Iterator[Any], repeats: int
) -> tuple[float, float]:
    """What batches take of the time of ten steps in a loop as that of `train.loop.run`.

    Returns:
      The share in which the host waits for a batch and places it, and the share by which ten steps
      on one batch that is already placed are faster; medians. On a CPU the second is larger: making
      batches takes time from the cores that compute.
    """
    mesh = make_mesh()
    placed = data.to_global(next(iterator), mesh)

    def ten_steps(is_fed: bool) -> tuple[float, float]:
        start, waited, before = time.perf_counter(), 0.0, None
        for _ in range(10):
            asked = time.perf_counter()
            batch = data.to_global(next(iterator), mesh) if is_fed else placed
            waited += time.perf_counter() - asked
            metrics = train(batch)
            jax.block_until_ready(before)  # the loop reads the numbers of the step before
            before = metrics
        jax.block_until_ready(before)
        return time.perf_counter() - start, waited

    waits, costs = [], []
    for _ in range(repeats):
        seconds, waited = ten_steps(is_fed=True)
        waits.append(waited / seconds)
        costs.append(1 - ten_steps(is_fed=False)[0] / seconds)
    return round(float(np.median(waits)), 3), round(float(np.median(costs)), 3)
