"""`unembed_stats` as a Pallas TPU kernel.

Letters: M rows, D model width, V vocabulary.

    grid   row tile | vocabulary tile 0, 1, ...      hidden stays in VMEM; head tiles stream past
                      `-- innermost, sequential

Each step multiplies the rows' hidden states with one contiguous [tile, D] piece of the head,
summarises the [rows, tile] float32 logits in VMEM and merges the summary into running columns, one
lane per statistic. Logits never leave VMEM. Noise is drawn in the kernel, from counters.

The k most probable ids are kept as sorted lanes; a tile inserts its logits one by one, largest
first, for as long as any row's largest beats its k-th: about k log(V / tile) insertions in all.

Bound by bandwidth while M <= 256: the head is read once, V * D * itemsize bytes. Larger M reads it
once per 256 rows, at which the multiplication takes as long as the reading. VMEM: two buffers of
head tiles and hidden states, and about eight [rows, tile] float32 temporaries; `plan` keeps them
under `VMEM_BUDGET`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.unembed_stats.noise import Noise, gumbel_noise
from kernels_pallas.unembed_stats.summary import NO_ID, Summary, merge, summarize, summarize_sample

VMEM_BUDGET = 14 * 2**20  # bytes; every TPU since v4 grants a kernel 16 MiB without being asked
LANES = 128
_FLOATS = ("top", "rest", "moment", "second", "noisy_top", "sample_logit")
_INTS = ("token", "sample")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tile sizes of one call.

    Attributes:
      rows: hidden states per tile.
      vocab_tile: vocabulary entries per step.
      vmem_bytes: what the tiles and temporaries take.
    """

    rows: int
    vocab_tile: int
    vmem_bytes: int


def plan(M: int, D: int, V: int, itemsize: int) -> Plan:
    """The longest vocabulary tile that fits beside up to 256 rows."""
    sublanes = 32 // itemsize
    rows = min(256, -(-M // sublanes) * sublanes)
    width = -(-D // LANES) * LANES

    def vmem(tile: int, rows: int) -> int:
        # Two buffers; float32 operands are split into three bfloat16 parts, which need room too.
        operands = (2 if itemsize == 2 else 4) * (tile + rows) * width * itemsize
        return operands + 8 * rows * tile * 4 + 6 * rows * LANES * 4

    while rows > sublanes and vmem(LANES, rows) > VMEM_BUDGET:  # very wide models
        rows //= 2
    longest = min(2048, -(-V // LANES) * LANES)
    fitting = [t for t in range(LANES, longest + 1, LANES) if vmem(t, rows) <= VMEM_BUDGET]
    tile = max(fitting, default=LANES)
    return Plan(rows, tile, vmem(tile, rows))


def refusal(head: jax.Array, k: int, given_ids: jax.Array | None) -> str | None:
    """Why the kernel cannot serve this call, in words; None if it can."""
    if head.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{head.dtype} is neither float32 nor bfloat16"
    if k > LANES:
        return f"k={k} is more than {LANES}"
    if given_ids is not None and given_ids.shape[1] > LANES - 8:
        return f"given_ids has {given_ids.shape[1]} columns, more than {LANES - 8}"
    return None


def summarize_tpu(
    hidden: jax.Array,
    head: jax.Array,
    first_id: jax.Array | int,
    banned_ids: jax.Array | None,
    noise: Noise | None,
    given_ids: jax.Array | None,
    *,
    k: int,
    cap: float | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Summary:
    """The summary of all of `head` [V, D]; `first_id`: vocabulary id of its first row.

    Args: otherwise as `unembed_stats`.
    """
    M, D = hidden.shape
    V = head.shape[0]
    num_given = 0 if given_ids is None else given_ids.shape[1]
    tiles = plan(M, D, V, head.dtype.itemsize)
    num_rows = -(-M // tiles.rows) * tiles.rows

    def pad_rows(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, num_rows - M), (0, 0)))

    def by_row(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((tiles.rows, width), lambda i, j, *_: (i, 0))

    banned = jnp.full(1, -1) if banned_ids is None else banned_ids
    temperature = jnp.zeros(1) if noise is None else noise.temperature
    scalars = [
        jnp.asarray(first_id, jnp.int32).reshape(1),
        banned.astype(jnp.int32),
        jnp.asarray(temperature, jnp.float32).reshape(1),
    ]
    operands = [pad_rows(hidden.astype(head.dtype)), head]
    in_specs = [by_row(D), pl.BlockSpec((tiles.vocab_tile, D), lambda i, j, *_: (j, 0))]
    if noise is not None:
        operands.append(pad_rows(jax.lax.bitcast_convert_type(noise.key, jnp.int32)))
        in_specs.append(by_row(2))
    if given_ids is not None:
        operands.append(pad_rows(given_ids.astype(jnp.int32)))
        in_specs.append(by_row(num_given))
    out_types = [jnp.float32, jnp.int32] + ([jnp.float32, jnp.int32] if k else [])
    outs = pl.pallas_call(
        functools.partial(
            _kernel, vocab=V, has_noise=noise is not None, k=k, num_given=num_given, cap=cap
        ),
        out_shape=[jax.ShapeDtypeStruct((num_rows, LANES), dtype) for dtype in out_types],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_rows // tiles.rows, -(-V // tiles.vocab_tile)),
            in_specs=in_specs,
            out_specs=[by_row(LANES) for _ in out_types],
            scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.vocab_tile), jnp.float32)] if k else [],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * D * V,
            bytes_accessed=(num_rows // tiles.rows) * V * D * head.dtype.itemsize,
            transcendentals=num_rows * V,
        ),
        interpret=interpret,
        name="unembed_stats",
    )(*scalars, *operands)
    floats, ints = outs[0][:M], outs[1][:M]
    summary = {name: floats[:, i : i + 1] for i, name in enumerate(_FLOATS)}
    summary |= {name: ints[:, i : i + 1] for i, name in enumerate(_INTS)}
    if noise is None:
        for name in ("noisy_top", "sample_logit", "sample"):
            del summary[name]
    if given_ids is not None:
        summary["given_logits"] = floats[:, 8 : 8 + num_given]
    if k:
        summary["top_logits"], summary["top_tokens"] = outs[2][:M, :k], outs[3][:M, :k]
    return summary


def _kernel(
    first_ref: Any,
    banned_ref: Any,
    temperature_ref: Any,
    hidden_ref: Any,
    head_ref: Any,
    *more: Any,
    vocab: int,
    has_noise: bool,
    k: int,
    num_given: int,
    cap: float | None,
) -> None:
    refs = iter(more)
    if has_noise:
        key_ref = next(refs)
    if num_given:
        given_ref = next(refs)
    float_ref, int_ref = next(refs), next(refs)
    rows, tile = hidden_ref.shape[0], head_ref.shape[0]
    names = ("top", "rest", "moment", "second") + _FLOATS[4:] * has_noise
    int_names = _INTS[: 1 + has_noise]

    j = pl.program_id(1)
    local = j * tile + jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1)
    ids = first_ref[0] + local
    z = jax.lax.dot_general(
        hidden_ref[...],
        head_ref[...],
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if head_ref.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    z = z if cap is None else cap * jnp.tanh(z / cap)
    exists = local < vocab  # the last tile reaches past the end of the head
    for i in range(banned_ref.shape[0]):
        exists &= ids != banned_ref[i]
    z = jnp.where(exists, z, -jnp.inf)

    summary = summarize(z, ids)
    if has_noise:
        words = jax.lax.bitcast_convert_type(key_ref[...], jnp.uint32)
        gumbel = gumbel_noise(words, ids[0])
        summary |= summarize_sample(z, ids, temperature_ref[0] * gumbel)

    def write(summary: Summary) -> None:
        for i, name in enumerate(names):
            float_ref[:, i : i + 1] = summary[name]
        for i, name in enumerate(int_names):
            int_ref[:, i : i + 1] = summary[name]

    @pl.when(j == 0)
    def _first() -> None:
        float_ref[...] = jnp.full_like(float_ref, -jnp.inf)
        int_ref[...] = jnp.zeros_like(int_ref)
        write(summary)

    @pl.when(j > 0)
    def _rest() -> None:
        before = {name: float_ref[:, i : i + 1] for i, name in enumerate(names)}
        before |= {name: int_ref[:, i : i + 1] for i, name in enumerate(int_names)}
        write(merge(before, summary))

    for c in range(num_given):
        is_given = ids == given_ref[:, c : c + 1]
        logit = jnp.where(is_given, z, -jnp.inf).max(axis=1, keepdims=True)
        column = float_ref[:, 8 + c : 9 + c]
        float_ref[:, 8 + c : 9 + c] = jnp.maximum(column, logit)

    if k:
        values_ref, tokens_ref, z_ref = refs

        @pl.when(j == 0)
        def _no_tops() -> None:
            values_ref[...] = jnp.full_like(values_ref, -jnp.inf)
            tokens_ref[...] = jnp.zeros_like(tokens_ref)

        z_ref[...] = z
        _insert_tops(z_ref, ids, values_ref, tokens_ref, k, rows)


def _insert_tops(
    z_ref: Any, ids: jax.Array, values_ref: Any, tokens_ref: Any, k: int, rows: int
) -> None:
    """Merges a tile's logits into the sorted lanes of `values_ref`; earlier ids win ties."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)

    def margin() -> tuple[jax.Array, jax.Array]:
        best = jnp.max(z_ref[...], axis=1, keepdims=True)
        # -inf never beats -inf: what does not exist is not inserted.
        beats = best > values_ref[:, k - 1 : k]
        return best, beats

    def more(state: Any) -> jax.Array:
        return (state[0] < k) & (state[1] > 0)

    def insert(state: Any) -> Any:
        z, values, tokens = z_ref[...], values_ref[...], tokens_ref[...]
        best, beats = margin()
        token = jnp.where(z == best, ids, NO_ID).min(axis=1, keepdims=True)
        place = jnp.sum((values >= best).astype(jnp.int32), axis=1, keepdims=True)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            moved = jnp.where(lane == place, new, pltpu.roll(old, 1, 1))
            return jnp.where(beats, jnp.where(lane < place, old, moved), old)

        values_ref[...] = put(values, best)
        tokens_ref[...] = put(tokens, token)
        z_ref[...] = jnp.where(ids == token, -jnp.inf, z)
        return state[0] + 1, jnp.max(margin()[1].astype(jnp.float32))

    jax.lax.while_loop(more, insert, (0, jnp.max(margin()[1].astype(jnp.float32))))
