"""`window_attention` as a Pallas Mosaic GPU kernel for Hopper.

Letters: B batch, T window positions, S cache slots, N query heads, K key/value heads, G = N // K,
H head width, L layers; R = T * G rows of one key/value head (row t * G + g is query head g of the
group at position t), padded to whole programs.

One program instance (thread block) works on one batch row, one key/value head, 64 or 128 of its
rows and one share of its keys. Its keys are the cache tiles that the row's ranges touch, followed
by the tiles of the window itself; the shares are equal and contiguous:

    steps of row b, head h:   cache tile 3 | 4 | 5 | 17 | 18 | window tile 0 | 1
                              `--- share 0 ---' `--- share 1 ---' `- share 2 -'

Three warpgroups: one copies key and value tiles to a ring of buffers in shared memory (TMA), two
multiply (wgmma) with an online softmax in registers. With at most 64 rows the two take every
other tile and are merged at the end; with more rows each has 64 of its own and both read every
tile. A share ends as (weighted values, maximum, total) in float32, and XLA merges the shares; where
there is one share only, the program divides and writes the result.

Which cache tiles a row needs is worked out beforehand, so tiles that no range touches are neither
read nor computed. The stacked cache stays where it is and is read by (layer, row, head, slot).
Masks are computed from positions in registers; ancestor bits arrive as one word per row and 32
positions. Where sight is limited, rows and keys bring along where they stand, and cache tiles that
are out of everybody's sight are not needed. Cached values outside of every range are overwritten by
zeros in shared memory, so that even NaN there has no influence.

Bound by bandwidth while R <= 64: bytes = 2 * (slots in range, rounded up to tiles) * K * H *
itemsize; by wgmma from about R = 128. One program per multiprocessor: `plan` counts its shared
memory, and chooses as many shares as fill the multiprocessors once.
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
from kernels_pallas.slots import Cache
from kernels_pallas.window_attention.masks import Mask, Near
from kernels_pallas.window_attention.tpu import needed_tiles

ROWS = 64  # rows per warpgroup: the height of a wgmma
COMPUTE_WARPGROUPS = 2
LOWEST = -1e30  # below any real score; finite, so that differences are never NaN
LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tile sizes of one call.

    Attributes:
      row_groups: warpgroups with rows of their own, 1 or 2; with 1 they take every other tile.
      tile: keys per step, of the cache and of the window.
      stages: buffers in the ring.
      splits: shares of the keys.
      smem_bytes: shared memory of one program.
    """

    row_groups: int
    tile: int
    stages: int
    splits: int
    smem_bytes: int

    @property
    def is_staged(self) -> bool:
        """Whether float32 results go through shared memory."""
        return self.row_groups == 1 or self.splits > 1


def plan(B: int, T: int, S: int, N: int, K: int, H: int, itemsize: int) -> Plan:
    """Few rows: short tiles and many shares, to keep all memory busy; many rows: long tiles."""
    row_groups = 1 if T * (N // K) <= ROWS else 2
    num_programs = B * K * -(-T * (N // K) // (ROWS * row_groups))
    num_tiles = -(-S // 64) + -(-T // 64)
    # Each share has to be worth its start: at least four tiles.
    splits = max(1, min(hopper.NUM_SMS // num_programs, num_tiles // 4))
    is_staged = row_groups == 1 or splits > 1
    tile = 64 if is_staged else 128
    fixed = ROWS * row_groups * (H * itemsize + (H + 2) * 4 * is_staged)
    stages = min(4, (hopper.SMEM_BUDGET - fixed) // (2 * tile * H * itemsize))
    if row_groups == 1:  # even: each warpgroup keeps to its own buffers and waits for every filling
        stages = stages // 2 * 2
    return Plan(row_groups, tile, stages, splits, fixed + stages * 2 * tile * H * itemsize)


def refusal(
    q: jax.Array,
    mask: str | jax.Array,
    cache: tuple[jax.Array, jax.Array] | None = None,
) -> str | None:
    """Why the kernel cannot serve this call, in words; None if it can."""
    T, H = q.shape[1], q.shape[3]
    if why_not := hopper.refusal():
        return why_not
    if H not in (64, 128):
        return f"head width {H} is neither 64 nor 128"
    if not isinstance(mask, str) and T > 512:
        return f"ancestor bits over {T} window positions are more than 512"
    for x in (q, *(cache or ())):
        if x.dtype != jnp.bfloat16:
            return f"{x.dtype} is not bfloat16"
    if cache is not None and cache[0].shape[3] % 8:
        return (
            f"{cache[0].shape[3]} cache slots are not a multiple of 8, as `init_cache` makes them"
        )
    return None


def window_attention_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    window_range: jax.Array | None,
    cache: Cache | None,
    cache_ranges: jax.Array | None,
    layer: jax.Array | int,
    near: Near | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """[B, T, N, H]: attention as `window_attention` defines it, without the write."""
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    S = 0 if cache is None or cache_ranges is None else cache[0].shape[3]
    tiles = plan(B, T, S, N, K, H, q.dtype.itemsize)
    num_programs = -(-T * G // (ROWS * tiles.row_groups))
    num_rows = num_programs * ROWS * tiles.row_groups

    def pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % multiple)
        return jnp.pad(x, widths)

    rows = q.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    rows = pad(rows, 2, ROWS * tiles.row_groups).reshape(B * K, num_rows, H)
    k, v = (pad(x.swapaxes(1, 2), 2, tiles.tile).reshape(B * K, -1, H) for x in (k, v))
    if window_range is None:
        window_range = jnp.tile(jnp.array([[0, T]], jnp.int32), (B, 1))
    window_range = jnp.minimum(window_range.astype(jnp.int32), T)
    operands = [rows, k, v, window_range]
    num_ranges = rows_of_layer = 0
    if S:
        assert cache is not None and cache_ranges is not None
        num_ranges, rows_of_layer = cache_ranges.shape[1], cache[0].shape[1] * K
        if tiles.tile > S:  # shorter than a tile: one layer of it is small
            cache = tuple(
                pad(jax.lax.dynamic_slice_in_dim(c, layer, 1), 3, tiles.tile) for c in cache
            )  # type: ignore[assignment]
            layer = 0
        is_near = None if near is None else near.of_any()
        order, count = needed_tiles(cache_ranges, -(-S // tiles.tile), tiles.tile, is_near)
        operands += [
            *(c.reshape(-1, *c.shape[3:]) for c in cache),
            cache_ranges.reshape(B, -1).astype(jnp.int32),
            order,
            count,
            jnp.asarray(layer, jnp.int32).reshape(1),
        ]
    if not isinstance(mask, str):  # [B, words, R']: rows on the minor axis, whole tiles of words
        words = jax.lax.bitcast_convert_type(jnp.repeat(mask, G, axis=1), jnp.int32)
        words = pad(pad(words, 2, tiles.tile // 32), 1, ROWS * tiles.row_groups)
        operands.append(words.swapaxes(1, 2))

    if near is not None:
        places = near.positions.astype(jnp.int32)
        of_rows = pad(jnp.repeat(places, G, axis=1), 1, ROWS * tiles.row_groups)
        operands += [near.reach.astype(jnp.int32).reshape(1), of_rows]
        operands.append(pad(places, 1, tiles.tile))
        if S:
            assert near.cached is not None
            operands.append(pad(near.cached.astype(jnp.int32), 1, tiles.tile))

    if tiles.splits == 1:
        out_type = [jax.ShapeDtypeStruct((B * K, num_rows, H), q.dtype)]
    else:
        shape = (B * K, tiles.splits, num_rows)
        out_type = [jax.ShapeDtypeStruct((*shape, H), jnp.float32)]
        out_type += [jax.ShapeDtypeStruct(shape, jnp.float32)] * 2
    outs = plgpu.kernel(
        functools.partial(
            _kernel,
            tiles=tiles,
            num_programs=num_programs,
            num_heads=K,
            rows_of_layer=rows_of_layer,
            num_ranges=num_ranges,
            has_cache=S > 0,
            has_bits=not isinstance(mask, str),
            is_causal=isinstance(mask, str) and mask == "causal",
            group=G,
            scale=H**-0.5 if scale is None else scale,
            cap=cap,
            is_near=near is not None,
        ),
        out_type=out_type,
        scratch_types=_scratch(tiles, H, q.dtype),
        grid=(B * K * tiles.splits * num_programs,),
        grid_names=("program",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="window_attention",
    )(*operands)
    out = outs[0] if tiles.splits == 1 else _merge_shares(*(x[:, :, : T * G] for x in outs))
    out = out[:, : T * G].reshape(B, K, T, G, H).astype(q.dtype)
    return out.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def _merge_shares(acc: jax.Array, top: jax.Array, total: jax.Array) -> jax.Array:
    """Attended values [B * K, R, H] float32 of shares: acc [.., splits, R, H], others [.., R].

    `top` is in units of log 2. A share that saw no key for a row has top LOWEST and no weight.
    """
    highest = top.max(axis=1, keepdims=True)
    weight = jnp.where(top > LOWEST, jnp.exp2(top - highest), 0.0)
    total = (weight * total).sum(axis=1)
    # The weight may be zero where acc is not a number: see `attend`.
    out = jnp.where(weight[..., None] > 0, weight[..., None] * acc, 0.0).sum(axis=1)
    return out / jnp.where(total > 0, total, 1.0)[..., None]


def _scratch(tiles: Plan, H: int, dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of one program."""
    scratch = {
        "q": hopper.swizzled(tiles.row_groups, ROWS, H, dtype=dtype),
        "k": hopper.swizzled(tiles.stages, tiles.tile, H, dtype=dtype),
        "v": hopper.swizzled(tiles.stages, tiles.tile, H, dtype=dtype),
        "q_loaded": plgpu.Barrier(num_barriers=tiles.row_groups),
        "k_loaded": plgpu.Barrier(num_barriers=tiles.stages),
        "v_loaded": plgpu.Barrier(num_barriers=tiles.stages),
        "freed": plgpu.Barrier(num_arrivals=tiles.row_groups, num_barriers=tiles.stages),
    }
    if tiles.row_groups == 2:
        scratch["cleaned"] = plgpu.Barrier(num_arrivals=2)
    else:
        scratch["merging"] = plgpu.Barrier()
    if tiles.is_staged:
        scratch["acc"] = hopper.swizzled(tiles.row_groups, ROWS, H, dtype=jnp.float32)
        scratch["top"] = plgpu.SMEM((tiles.row_groups, ROWS), jnp.float32)
        scratch["total"] = plgpu.SMEM((tiles.row_groups, ROWS), jnp.float32)
    return scratch


def _kernel(
    *operands: Any,
    tiles: Plan,
    num_programs: int,
    num_heads: int,
    rows_of_layer: int,
    num_ranges: int,
    has_cache: bool,
    has_bits: bool,
    is_causal: bool,
    group: int,
    scale: float,
    cap: float | None,
    is_near: bool,
    **scratch: Any,
) -> None:
    refs = iter(operands)
    q_ref, k_ref, v_ref, window_ref = (next(refs) for _ in range(4))
    if has_cache:
        cache_k_ref, cache_v_ref, ranges_ref, order_ref, count_ref, layer_ref = (
            next(refs) for _ in range(6)
        )
    words_ref = next(refs) if has_bits else None
    if is_near:
        reach_ref, row_place_ref, key_place_ref = (next(refs) for _ in range(3))
        slot_place_ref = next(refs) if has_cache else None
    out_refs = tuple(refs)
    q, k, v = scratch["q"], scratch["k"], scratch["v"]
    k_loaded, v_loaded, freed = scratch["k_loaded"], scratch["v_loaded"], scratch["freed"]
    H = q.shape[-1]
    key_groups = COMPUTE_WARPGROUPS // tiles.row_groups

    program = jax.lax.axis_index("program")
    row_program = jax.lax.rem(program, num_programs)
    rest = jax.lax.div(program, num_programs)
    split, pair = jax.lax.rem(rest, tiles.splits), jax.lax.div(rest, tiles.splits)
    b = jax.lax.div(pair, num_heads)
    first_row = row_program * (ROWS * tiles.row_groups)

    # This share's steps: `num_steps` tiles from number `first_step` of the row's tiles on, of
    # which the first `num_cached` are cache tiles.
    count = count_ref[b] if has_cache else jnp.int32(0)
    num_window_tiles = jnp.int32(k_ref.shape[1] // tiles.tile)
    if is_causal:  # no tiles right of the diagonal
        last_row = first_row + (ROWS * tiles.row_groups - 1)
        diagonal = jax.lax.div(jax.lax.div(last_row, group), tiles.tile) + 1
        num_window_tiles = jnp.minimum(num_window_tiles, diagonal)
    total_steps = count + num_window_tiles
    share = jax.lax.div(total_steps + (tiles.splits - 1), tiles.splits)
    first_step = split * share
    num_steps = jnp.clip(total_steps - first_step, 0, share)
    num_cached = jnp.clip(count - first_step, 0, num_steps)

    def slot_of(step: Any) -> Any:
        return jax.lax.rem(step, tiles.stages)

    def cache_start(step: Any) -> Any:
        return order_ref[b, first_step + step] * tiles.tile

    def window_start(step: Any) -> Any:
        return (first_step + step - count) * tiles.tile

    def load(step: Any, _: Any) -> None:
        slot = slot_of(step)

        @pl.when(step >= tiles.stages)
        def _wait_until_read() -> None:
            plgpu.barrier_wait(freed.at[slot])

        def copy(keys: Any, values: Any, row: Any, start: Any) -> None:
            here = (row, pl.ds(start, tiles.tile))
            plgpu.copy_gmem_to_smem(keys.at[here], k.at[slot], k_loaded.at[slot])
            plgpu.copy_gmem_to_smem(values.at[here], v.at[slot], v_loaded.at[slot])

        if has_cache:

            @pl.when(step < num_cached)
            def _cache() -> None:
                row = layer_ref[0] * rows_of_layer + pair
                copy(cache_k_ref, cache_v_ref, row, cache_start(step))

        @pl.when(step >= num_cached)
        def _window() -> None:
            copy(k_ref, v_ref, pair, window_start(step))

    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")
        for i in range(tiles.row_groups):
            rows = q_ref.at[pair, pl.ds(first_row + i * ROWS, ROWS)]
            plgpu.copy_gmem_to_smem(rows, q.at[i], scratch["q_loaded"].at[i])
        jax.lax.fori_loop(0, num_steps, load, None)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        row_group = warpgroup if tiles.row_groups == 2 else 0
        key_group = 0 if tiles.row_groups == 2 else warpgroup
        my_row = first_row + row_group * ROWS
        shape = (ROWS, tiles.tile)
        ranges = [(ranges_ref[b, 2 * r], ranges_ref[b, 2 * r + 1]) for r in range(num_ranges)]
        first_seen, stop_seen = window_ref[b, 0], window_ref[b, 1]

        def iota(dimension: int) -> jax.Array:
            return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)

        def in_ranges(slot: jax.Array) -> jax.Array:
            allowed = jnp.zeros(slot.shape, jnp.bool_)
            for first, stop in ranges:
                allowed |= (slot >= first) & (slot < stop)
            return allowed

        def in_sight(key_places: Any, start: Any) -> jax.Array:
            """Keys from `start` on that stand less than the reach away."""
            rows = hopper.load(
                row_place_ref.at[b, pl.ds(my_row, ROWS)],
                layout=plgpu.Layout.WGMMA.reduce(1),
                optimized=False,
            )
            keys = hopper.load(
                key_places.at[b, pl.ds(start, tiles.tile)],
                layout=plgpu.Layout.WGMMA.reduce(0),
                optimized=False,
            )
            away = jax.lax.broadcast_in_dim(rows, shape, [0]) - jax.lax.broadcast_in_dim(
                keys, shape, [1]
            )
            return (away < reach_ref[0]) & (away > -reach_ref[0])

        def in_window(start: Any) -> jax.Array:
            position = start + iota(1)
            allowed = (position >= first_seen) & (position < stop_seen)
            if is_causal:  # position <= row // group
                allowed &= position * group <= my_row + iota(0)
            if words_ref is not None:
                word = jnp.zeros(shape, jnp.int32)
                for w in range(tiles.tile // 32):
                    row_words = hopper.load(
                        words_ref.at[b, jax.lax.div(start, 32) + w, pl.ds(my_row, ROWS)],
                        layout=plgpu.Layout.WGMMA.reduce(1),
                        optimized=False,
                    )
                    row_words = jax.lax.broadcast_in_dim(row_words, shape, [0])
                    word = jnp.where(iota(1) >> 5 == w, row_words, word)
                allowed &= (jax.lax.shift_right_logical(word, iota(1) & 31) & 1) == 1
            if is_near:
                allowed &= in_sight(key_place_ref, start)
            return allowed

        def in_cache(start: Any) -> jax.Array:
            allowed = in_ranges(start + iota(1))
            return allowed & in_sight(slot_place_ref, start) if is_near else allowed

        def clean(slot: Any, start: Any) -> None:
            """Zeros the values outside of all ranges: a weight of zero does not undo NaN."""
            num_around = jnp.int32(0)  # ranges that the tile lies in as a whole
            for first, stop in ranges:
                num_around += ((first <= start) & (stop >= start + tiles.tile)).astype(jnp.int32)

            @pl.when(num_around == 0)
            def _partial() -> None:
                @pl.when(row_group == 0)
                def _once() -> None:
                    position = start + plgpu.broadcasted_iota(
                        jnp.int32, (tiles.tile, H), 0, layout=plgpu.Layout.WGMMA
                    )
                    values = hopper.load(v.at[slot], layout=plgpu.Layout.WGMMA)
                    v[slot] = jnp.where(in_ranges(position), values, jnp.zeros_like(values))
                    plgpu.commit_smem()

                if tiles.row_groups == 2:
                    plgpu.barrier_arrive(scratch["cleaned"])
                    plgpu.barrier_wait(scratch["cleaned"])

        def attend(is_cache: bool, i: Any, carry: Any) -> Any:
            """Adds one tile of keys.

            A row that has seen nothing yet counts masked keys as if they were real (its maximum
            is LOWEST); the first real key wipes that out, and rows without one end as zeros.
            """
            acc, top, total = carry
            step = i * key_groups + key_group
            slot = slot_of(step)
            start = cache_start(step) if is_cache else window_start(step)
            allowed = in_cache(start) if is_cache else in_window(start)
            plgpu.barrier_wait(k_loaded.at[slot])

            def multiply_keys(ref: Any) -> jax.Array:
                plgpu.wgmma(ref, q.at[row_group], k.at[slot].transpose((1, 0)))
                return ref[...]

            s = pl.run_scoped(multiply_keys, plgpu.ACC(shape, jnp.float32))
            s = s * (scale * LOG2_E) if cap is None else _cap(s, scale, cap)
            s = jnp.where(allowed, s, LOWEST)
            new_top = jnp.maximum(top, s.max(axis=1))
            keep = jnp.exp2(top - new_top)
            p = jnp.exp2(s - jax.lax.broadcast_in_dim(new_top, shape, [0]))
            total = total * keep + p.sum(axis=1)
            plgpu.barrier_wait(v_loaded.at[slot])
            if is_cache:
                clean(slot, start)
            attended = _weigh(p.astype(q.dtype), v.at[slot])

            @pl.when(step + tiles.stages < num_steps)  # else nobody waits for it
            def _free() -> None:
                plgpu.barrier_arrive(freed.at[slot])

            acc = acc * jax.lax.broadcast_in_dim(keep, acc.shape, [0]) + attended
            return acc, new_top, total

        plgpu.barrier_wait(scratch["q_loaded"].at[row_group])
        column = plgpu.Layout.WGMMA.reduce(1)
        carry = (
            plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), column),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), column),
        )
        my_cached, my_steps = (
            jax.lax.div(n - key_group + (key_groups - 1), key_groups)
            for n in (num_cached, num_steps)
        )
        if has_cache:
            carry = jax.lax.fori_loop(0, my_cached, functools.partial(attend, True), carry)
        carry = jax.lax.fori_loop(my_cached, my_steps, functools.partial(attend, False), carry)
        if tiles.row_groups == 2:
            _write(carry, out_refs, (pair, split), my_row, row_group, scratch)
        else:
            _merge_and_write(carry, out_refs, (pair, split), my_row, warpgroup, scratch)


def _cap(scores: jax.Array, scale: float, cap: float) -> jax.Array:
    """cap tanh(scale s / cap) in units of log 2, of scores s; tanh by way of exp2."""
    power = jnp.exp2(jnp.abs(scores) * (-2 * LOG2_E * scale / cap))  # in (0, 1]
    bent = (1 - power) / (1 + power)
    return jnp.where(scores < 0, -bent, bent) * (cap * LOG2_E)


def _weigh(weights: jax.Array, values: Any) -> jax.Array:
    """[ROWS, H] float32 from weights [ROWS, tile] in registers and values [tile, H].

    A function of its own because the interpreter lacks a wgmma from registers: tests replace it.
    """

    def multiply(ref: Any) -> jax.Array:
        plgpu.wgmma(ref, weights, values)
        return ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, values.shape[1]), jnp.float32))


def _merge_and_write(
    carry: Any, out_refs: Any, where: Any, row: Any, warpgroup: Any, scratch: Any
) -> None:
    """Warpgroup 1 hands its part of the keys to warpgroup 0, which writes the merged result."""
    acc, top, total = carry
    stages = (scratch["acc"], scratch["top"], scratch["total"])

    @pl.when(warpgroup == 1)
    def _hand_over() -> None:
        for stage, value in zip(stages, carry, strict=True):
            stage[0] = value
        plgpu.barrier_arrive(scratch["merging"])

    @pl.when(warpgroup == 0)
    def _take() -> None:
        plgpu.barrier_wait(scratch["merging"])
        column = plgpu.Layout.WGMMA.reduce(1)
        other_acc = hopper.load(stages[0].at[0], layout=plgpu.Layout.WGMMA)
        other_top, other_total = (hopper.load(x.at[0], layout=column) for x in stages[1:])
        highest = jnp.maximum(top, other_top)
        keep, other_keep = jnp.exp2(top - highest), jnp.exp2(other_top - highest)

        def spread(x: jax.Array) -> jax.Array:
            return jax.lax.broadcast_in_dim(x, acc.shape, [0])

        merged = (
            acc * spread(keep) + other_acc * spread(other_keep),
            highest,
            total * keep + other_total * other_keep,
        )
        _write(merged, out_refs, where, row, 0, scratch)


def _write(carry: Any, out_refs: Any, where: Any, row: Any, row_group: Any, scratch: Any) -> None:
    """Writes a share of 64 rows; the quotient itself if there is no other share."""
    acc, top, total = carry
    pair, split = where
    rows = pl.ds(row, ROWS)
    if len(out_refs) == 1:
        q = scratch["q"]  # not needed any more
        has_seen = top > LOWEST
        inverse = jnp.where(has_seen, 1.0 / jnp.where(has_seen, total, 1.0), 0.0)
        out = acc * jax.lax.broadcast_in_dim(inverse, acc.shape, [0])
        q[row_group] = out.astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q.at[row_group], out_refs[0].at[pair, rows])
    else:
        stages = (scratch["acc"], scratch["top"], scratch["total"])
        for stage, value in zip(stages, carry, strict=True):
            stage[row_group] = value
        plgpu.commit_smem()
        for stage, out_ref in zip(stages, out_refs, strict=True):
            plgpu.copy_smem_to_gmem(stage.at[row_group], out_ref.at[pair, split, rows])
    plgpu.wait_smem_to_gmem(0)
