"""`unembed_stats` as a Pallas Mosaic GPU kernel for Hopper.

Letters: M rows, D model width, V vocabulary.

One thread block per multiprocessor; each walks over the items (row tile, vocabulary tile) that are
its turn, row tiles first, so that blocks which run side by side read the same piece of the head:

    item   D tile 0 | 1 | 2 | ... | last, statistics | next item: D tile 0 | 1 | ...
           `-- logits in registers --'                 `-- copied ahead meanwhile --'

Three warpgroups: one copies tiles of hidden states and head through a ring of buffers in shared
memory (TMA) and runs ahead over the ends of items; two multiply (wgmma) into float32 logits of
their own 128 vocabulary entries, up to 128 rows each, and reduce them to a few numbers per row.
Logits never leave registers. The numbers of all pieces of 128 entries go to memory, 4 bytes for
every 13 entries and row, and XLA merges them exactly, lower ids first on ties.

Noise is drawn in the kernel, from counters, as in the contract; only log1p is written out.

Bound by bandwidth while M <= 128: the head is read once, V * D * itemsize bytes; the hidden states
come from the L2 cache and are a quarter of that traffic at M = 64. At M = 256, where arithmetic and
reading take equally long, it is bound by wgmma. Shared memory: `plan` fills `hopper.SMEM_BUDGET`.

The k most probable ids are left to XLA: an insertion sort over the lanes of a wgmma result would
cost more than the multiplication.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.unembed_stats.noise import Noise, threefry2x32
from kernels_pallas.unembed_stats.summary import NO_ID, Summary, merge

PIECE = 128  # vocabulary entries per warpgroup and item
D_TILE = 64  # 128 bytes, the longest swizzle
HALF = 64  # rows that are summarised together: the height of a wgmma
MAX_IDS = 16  # banned ids, and given ids per row: each costs a pass over the logits
_FLOATS = ("top", "rest", "moment", "second", "noisy_top", "sample_logit")
_INTS = ("token", "sample")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tile sizes of one call.

    Attributes:
      rows: hidden states per item: 64, 128 or 256.
      vocab_tile: vocabulary entries per item: with 256 rows the two warpgroups share them, with
        fewer each has a piece of its own.
      stages: buffers in the ring.
      smem_bytes: what they take.
    """

    rows: int
    vocab_tile: int
    stages: int
    smem_bytes: int

    @property
    def rows_per_warpgroup(self) -> int:
        return min(self.rows, 128)


def plan(M: int, itemsize: int) -> Plan:
    """The smallest row tile that holds all rows, and all of shared memory."""
    rows = next((rows for rows in (64, 128) if rows >= M), 256)
    vocab_tile = PIECE if rows == 256 else 2 * PIECE
    stage = (rows + vocab_tile) * D_TILE * itemsize
    return Plan(rows, vocab_tile, hopper.SMEM_BUDGET // stage, hopper.SMEM_BUDGET // stage * stage)


def refusal(
    head: jax.Array,
    k: int,
    given_ids: jax.Array | None,
    banned_ids: jax.Array | None,
    cap: float | None = None,
) -> str | None:
    """Why the kernel cannot serve this call, in words; None if it can."""
    V, D = head.shape
    if why_not := hopper.refusal():
        return why_not
    if cap is not None:
        return "caps of logits are only served by the other implementations"
    if head.dtype != jnp.bfloat16:
        return f"the head is {head.dtype} and not bfloat16"
    if D % D_TILE:
        return f"model width {D} is not a multiple of {D_TILE}"
    if V < 2 * PIECE:
        return f"a vocabulary of {V} is smaller than a tile of {2 * PIECE}"
    if k:
        return f"k={k}: the most probable ids are only found by the other implementations"
    if given_ids is not None and given_ids.shape[1] > MAX_IDS:
        return f"given_ids has {given_ids.shape[1]} columns, more than {MAX_IDS}"
    if banned_ids is not None and banned_ids.shape[0] > MAX_IDS:
        return f"banned_ids has {banned_ids.shape[0]} entries, more than {MAX_IDS}"
    return None


def summarize_gpu(
    hidden: jax.Array,
    head: jax.Array,
    first_id: jax.Array | int,
    banned_ids: jax.Array | None,
    noise: Noise | None,
    given_ids: jax.Array | None,
    *,
    k: int = 0,
) -> Summary:
    """The summary of all of `head` [V, D]; `first_id`: vocabulary id of its first row.

    Args: otherwise as `unembed_stats`; k must be 0.
    """
    M, V = hidden.shape[0], head.shape[0]
    num_given = 0 if given_ids is None else given_ids.shape[1]
    tiles = plan(M, head.dtype.itemsize)
    num_rows = -(-M // tiles.rows) * tiles.rows
    num_pieces = -(-V // tiles.vocab_tile) * (tiles.vocab_tile // PIECE)
    num_items = (num_rows // tiles.rows) * -(-V // tiles.vocab_tile)

    def pad_rows(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, num_rows - M), (0, 0)))

    operands = [pad_rows(hidden.astype(head.dtype)), head]
    operands.append(jnp.asarray(first_id, jnp.int32).reshape(1))
    if banned_ids is not None:
        operands.append(banned_ids.astype(jnp.int32))
    if noise is not None:
        operands.append(jnp.asarray(noise.temperature, jnp.float32).reshape(1))
        operands.append(pad_rows(jax.lax.bitcast_convert_type(noise.key, jnp.int32)).T)
    if given_ids is not None:
        operands.append(pad_rows(given_ids.astype(jnp.int32)).T)

    has_noise = noise is not None
    num_floats, num_ints = 4 + 2 * has_noise + num_given, 1 + has_noise
    floats, ints = plgpu.kernel(
        functools.partial(
            _kernel,
            tiles=tiles,
            vocab=V,
            num_items=num_items,
            num_banned=0 if banned_ids is None else banned_ids.shape[0],
            has_noise=has_noise,
            num_given=num_given,
        ),
        out_type=[
            jax.ShapeDtypeStruct((num_pieces, num_floats, num_rows), jnp.float32),
            jax.ShapeDtypeStruct((num_pieces, num_ints, num_rows), jnp.int32),
        ],
        scratch_types={
            "hidden": hopper.swizzled(tiles.stages, tiles.rows, D_TILE, dtype=head.dtype),
            "head": hopper.swizzled(tiles.stages, tiles.vocab_tile, D_TILE, dtype=head.dtype),
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
            "freed": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
            "floats": plgpu.SMEM((2, num_floats, HALF), jnp.float32),
            "ints": plgpu.SMEM((2, num_ints, HALF), jnp.int32),
        },
        grid=(min(hopper.NUM_SMS, num_items),),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="unembed_stats",
    )(*operands)
    pieces = {name: floats[:, i, :M] for i, name in enumerate(_FLOATS[: 4 + 2 * has_noise])}
    pieces |= {name: ints[:, i, :M] for i, name in enumerate(_INTS[:num_ints])}
    summary = _merge_pieces(pieces)
    if given_ids is not None:
        summary["given_logits"] = floats[:, num_floats - num_given :, :M].max(axis=0).T
    return summary


def _merge_pieces(pieces: Summary) -> Summary:
    """`summary.merge` of all pieces at once: columns [P, M], lower ids first, to [M, 1]."""
    tops = pieces["top"]
    top, winner = tops.max(axis=0), jnp.argmax(tops, axis=0)[None]  # the first on ties
    is_winner = jnp.arange(tops.shape[0])[:, None] == winner
    shift = jnp.where(tops > -jnp.inf, tops - top[None], -jnp.inf)  # <= 0
    scale = jnp.exp(shift)
    rest = jnp.where(is_winner, 0.0, 1.0) + pieces["rest"]  # what is not the arg-max of all
    moment = pieces["moment"] + jnp.where(scale > 0, shift, 0.0) * rest
    merged = {
        "top": top,
        "token": jnp.take_along_axis(pieces["token"], winner, axis=0)[0],
        "second": jnp.where(is_winner, pieces["second"], tops).max(axis=0),
        "rest": (scale * rest).sum(axis=0),
        "moment": (scale * moment).sum(axis=0),
    }
    if "sample" in pieces:
        winner = jnp.argmax(pieces["noisy_top"], axis=0)[None]
        for name in ("noisy_top", "sample", "sample_logit"):
            merged[name] = jnp.take_along_axis(pieces[name], winner, axis=0)[0]
    return {name: column[:, None] for name, column in merged.items()}


def _kernel(
    hidden_ref: Any,
    head_ref: Any,
    first_ref: Any,
    *more: Any,
    tiles: Plan,
    vocab: int,
    num_items: int,
    num_banned: int,
    has_noise: bool,
    num_given: int,
    hidden: Any,
    head: Any,
    loaded: Any,
    freed: Any,
    floats: Any,
    ints: Any,
) -> None:
    refs = iter(more)
    banned_ref: Any = next(refs) if num_banned else None
    temperature_ref: Any = next(refs) if has_noise else None
    key_ref: Any = next(refs) if has_noise else None
    given_ref: Any = next(refs) if num_given else None
    float_ref, int_ref = refs
    num_row_tiles = hidden_ref.shape[0] // tiles.rows
    num_blocks = min(hopper.NUM_SMS, num_items)
    num_steps = hidden_ref.shape[1] // D_TILE  # of an item
    block = jax.lax.axis_index("block")
    my_items = jax.lax.div(num_items - 1 - block, num_blocks) + 1
    warpgroup = jax.lax.axis_index("warpgroup")
    width = 32 if has_noise else PIECE  # noise needs registers: strip by strip
    float_names = _FLOATS[: 4 + 2 * has_noise] + tuple(f"given {c}" for c in range(num_given))

    def first_row_and_entry(i: Any) -> tuple[Any, Any]:
        item = block + i * num_blocks
        row_tile = jax.lax.rem(item, num_row_tiles)
        return row_tile * tiles.rows, jax.lax.div(item, num_row_tiles) * tiles.vocab_tile

    def slot_of(step: Any) -> Any:
        return jax.lax.rem(step, tiles.stages)

    @pl.when(warpgroup == 2)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def load(step: Any, _: Any) -> None:
            slot = slot_of(step)
            row, entry = first_row_and_entry(jax.lax.div(step, num_steps))
            width = pl.ds(jax.lax.rem(step, num_steps) * D_TILE, D_TILE)

            @pl.when(step >= tiles.stages)
            def _wait_until_read() -> None:
                plgpu.barrier_wait(freed.at[slot])

            rows, entries = pl.ds(row, tiles.rows), pl.ds(entry, tiles.vocab_tile)
            plgpu.copy_gmem_to_smem(hidden_ref.at[rows, width], hidden.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(head_ref.at[entries, width], head.at[slot], loaded.at[slot])

        jax.lax.fori_loop(0, my_items * num_steps, load, None)

    @pl.when(warpgroup < 2)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        # Two warpgroups: halves of the rows if there are 256, else halves of the vocabulary tile.
        my_row = warpgroup * 128 if tiles.rows == 256 else 0
        my_entry = 0 if tiles.rows == 256 else warpgroup * PIECE
        rows = pl.ds(my_row, tiles.rows_per_warpgroup)
        entries = pl.ds(my_entry, PIECE)

        def free(step: Any) -> None:
            @pl.when(step + tiles.stages < my_items * num_steps)  # else nobody waits for it
            def _free() -> None:
                plgpu.barrier_arrive(freed.at[slot_of(step)])

        def work(i: Any, _: Any) -> None:
            def logits(ref: Any) -> jax.Array:
                def multiply(d: Any, _: Any) -> None:
                    slot = slot_of(i * num_steps + d)
                    plgpu.barrier_wait(loaded.at[slot])
                    plgpu.wgmma(
                        ref, hidden.at[slot, rows], head.at[slot, entries].transpose((1, 0))
                    )
                    plgpu.wgmma_wait(1)  # all but this one

                    @pl.when(d > 0)
                    def _free_the_one_before() -> None:
                        free(i * num_steps + d - 1)

                jax.lax.fori_loop(0, num_steps, multiply, None)
                z = ref[...]
                free((i + 1) * num_steps - 1)
                return z

            all_z = pl.run_scoped(logits, plgpu.ACC((tiles.rows_per_warpgroup, PIECE), jnp.float32))
            row, entry = first_row_and_entry(i)
            entry = entry + my_entry
            for half in range(tiles.rows_per_warpgroup // HALF):
                here = pl.ds(row + my_row + half * HALF, HALF)
                key0, key1 = (_column(key_ref, c, here) if has_noise else None for c in range(2))
                given = [_column(given_ref, c, here) for c in range(num_given)]
                strips = []
                for start in range(0, PIECE, width):
                    z = all_z[half * HALF : (half + 1) * HALF, start : start + width]
                    local = entry + start + _columns_iota(width)
                    ids = first_ref[0] + local
                    exists = local < vocab  # the last tile reaches past the end of the head
                    for b in range(num_banned):
                        exists &= ids != banned_ref[b]
                    z = jnp.where(exists, z, -jnp.inf)
                    strip = _summarize(z, ids)
                    if has_noise:
                        gumbel = temperature_ref[0] * _gumbel_noise(key0, key1, ids)
                        strip |= _summarize_sample(z, ids, gumbel)
                    for c, given_id in enumerate(given):
                        is_given = ids == _spread(given_id, width)
                        strip[f"given {c}"] = jnp.where(is_given, z, -jnp.inf).max(axis=1)
                    strips.append(strip)
                summary = functools.reduce(_merge_strips, strips)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for c, name in enumerate(float_names):
                    floats[warpgroup, c] = summary[name]
                for c, name in enumerate(_INTS[: 1 + has_noise]):
                    ints[warpgroup, c] = summary[name]
                plgpu.commit_smem()
                piece = jax.lax.div(entry, PIECE)
                plgpu.copy_smem_to_gmem(floats.at[warpgroup], float_ref.at[piece, :, here])
                plgpu.copy_smem_to_gmem(ints.at[warpgroup], int_ref.at[piece, :, here])

        jax.lax.fori_loop(0, my_items, work, None)
        plgpu.wait_smem_to_gmem(0)


def _columns_iota(width: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (HALF, width), 1, layout=plgpu.Layout.WGMMA)


def _column(ref: Any, c: int, rows: Any) -> jax.Array:
    """[HALF]: numbers of some rows, from `ref` [columns, M]."""
    return hopper.load(ref.at[c, rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _spread(column: jax.Array, width: int) -> jax.Array:
    """[HALF, width] from [HALF]."""
    return jax.lax.broadcast_in_dim(column, (HALF, width), [0])


def _merge_strips(a: Summary, b: Summary) -> Summary:
    merged = merge(a, b)
    return merged | {name: jnp.maximum(a[name], b[name]) for name in a if name not in merged}


def _summarize(z: jax.Array, ids: jax.Array) -> Summary:
    """`summary.summarize` with columns [HALF], which is how a wgmma result reduces."""
    width = z.shape[1]
    top = z.max(axis=1)
    token = jnp.where(z == _spread(top, width), ids, NO_ID).min(axis=1)
    is_top = ids == _spread(token, width)
    # All may be banned: then top is -inf and every weight must be zero.
    gap = z - _spread(jnp.where(top > -jnp.inf, top, 0.0), width)
    weight = jnp.where(is_top, 0.0, jnp.exp(gap))
    return {
        "top": top,
        "token": token,
        "second": jnp.where(is_top, -jnp.inf, z).max(axis=1),
        "rest": weight.sum(axis=1),
        "moment": jnp.where(weight > 0, weight * gap, 0.0).sum(axis=1),
    }


def _summarize_sample(z: jax.Array, ids: jax.Array, gumbel: jax.Array) -> Summary:
    """`summary.summarize_sample` with columns [HALF]."""
    width = z.shape[1]
    noisy = z + gumbel
    noisy_top = noisy.max(axis=1)
    sample = jnp.where(noisy == _spread(noisy_top, width), ids, NO_ID).min(axis=1)
    is_sample = ids == _spread(sample, width)
    sample_logit = jnp.where(is_sample, z, -jnp.inf).max(axis=1)
    return {"noisy_top": noisy_top, "sample": sample, "sample_logit": sample_logit}


def _gumbel_noise(key0: Any, key1: Any, ids: jax.Array) -> jax.Array:
    """`noise.gumbel_noise` for keys [HALF] int32 and ids [HALF, n], without log1p.

    Up to w = 1/16 the series of -log1p(-w) has eight terms to full precision; beyond, 1 - w is
    exact enough that its logarithm is.
    """
    width = ids.shape[1]
    key0, key1 = (_spread(jax.lax.bitcast_convert_type(x, jnp.uint32), width) for x in (key0, key1))
    counter = ids.astype(jnp.uint32)
    high, low = threefry2x32(key0, key1, counter, jnp.zeros_like(counter))
    w = high.astype(jnp.float32) * 2.0**-32 + (low.astype(jnp.float32) + 0.5) * 2.0**-64
    w = jnp.minimum(w, 1 - 2.0**-24)
    series = jnp.full_like(w, 1 / 8)
    for term in range(7, 0, -1):
        series = series * w + 1 / term
    exponential = jnp.where(w < 1 / 16, series * w, -jnp.log(1 - w))
    return -jnp.log(exponential)
