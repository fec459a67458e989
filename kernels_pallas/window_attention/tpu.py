"""`window_attention` as a Pallas TPU kernel.

Letters: B batch, T window positions, S cache slots, N query heads, K key/value heads, G = N // K,
H head width, L layers; R = T * G rows of one key/value head (row t * G + g is query head g of the
group at position t).

One program instance works on `heads` key/value heads of one batch row and one tile of query rows.
It walks over tiles of the cache, then over tiles of the window's own keys, with one online softmax:

    grid   batch row | head group | query tile | cache tile 0, 1, ... , window tile 0, 1, ...
                                                 `-- innermost, sequential: m, l, acc in VMEM --'

Which cache tiles a row needs is worked out beforehand and prefetched as scalars, so tiles that no
range touches are neither read nor computed: steps past the last needed tile ask for the same block
again, which moves nothing. The stacked cache stays in HBM and is read by (layer, row, tile): no
slice of it is ever copied.

Masks keep keys on the lane axis. A query row carries the last window position it may see (causal)
or its ancestor bits as words, spread over lanes by comparing `lane >> 5` with the word's number.
Where sight is limited, query rows and keys carry their positions too, and cache tiles that are out
of everybody's sight are not needed.

Bound by bandwidth while R is small: bytes = 2 * (slots in range, rounded up to tiles) * K * H *
itemsize. VMEM: two buffers of `heads` key and value tiles, q and out tiles, and float32 scratch of
heads * rows * (H + 256) * 4 bytes; `plan` chooses tiles so that all of it stays under
`VMEM_BUDGET`. A TPU core runs the grid in order, so a long prefix needs no split over S.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.window_attention.masks import Near

VMEM_BUDGET = 12 * 2**20  # bytes; every TPU since v4 grants a kernel 16 MiB without being asked
LANES = 128
LOWEST = -1e30  # below any real score; finite, so that differences are never NaN


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tile sizes of one call.

    Attributes:
      heads: key/value heads per program instance.
      rows: query rows per tile; a multiple of the dtype's sublane tile.
      cache_tile: cache slots per step.
      window_tile: window positions per step.
      vmem_bytes: what the tiles and the scratch take, double buffers included.
    """

    heads: int
    rows: int
    cache_tile: int
    window_tile: int
    vmem_bytes: int


def plan(T: int, S: int, N: int, K: int, H: int, itemsize: int) -> Plan:
    """Chooses tiles: few rows allow many heads and long cache tiles, many rows the opposite."""
    sublanes = 32 // itemsize
    num_rows = -(-T * (N // K) // sublanes) * sublanes
    rows = min(num_rows, 512)
    window_tile = min(512, -(-T // sublanes) * sublanes)
    cache_tile = min(512, -(-max(S, 1) // LANES) * LANES)

    def vmem(heads: int) -> int:
        width = -(-H // LANES) * LANES
        buffers = 4 * heads * (cache_tile + window_tile) * width * itemsize  # k, v; twice
        queries = 4 * heads * rows * width * itemsize  # q, out; twice
        scratch = heads * rows * (width + 2 * LANES) * 4
        scores = 3 * rows * max(cache_tile, window_tile) * 4
        # Float32 operands are split into three bfloat16 parts, one head at a time.
        parts = 0 if itemsize == 2 else 3 * (rows + max(cache_tile, window_tile)) * width * 2
        return buffers + queries + scratch + scores + parts

    heads = max(h for h in range(1, K + 1) if K % h == 0 and (h == 1 or vmem(h) <= VMEM_BUDGET))
    return Plan(heads, rows, cache_tile, window_tile, vmem(heads))


def refusal(q: jax.Array, mask: str | jax.Array) -> str | None:
    """Why the kernel cannot serve this call, in words; None if it can."""
    T, H = q.shape[1], q.shape[3]
    if H % 64:
        return f"head width {H} is not a multiple of 64"
    if not isinstance(mask, str) and T > 512:
        return f"ancestor bits over {T} window positions are more than 512"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{q.dtype} is neither float32 nor bfloat16"
    return None


def window_attention_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: str | jax.Array,
    window_range: jax.Array | None,
    cache: tuple[jax.Array, jax.Array] | None,
    cache_ranges: jax.Array | None,
    layer: jax.Array | int,
    near: Near | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """[B, T, N, H]: attention as `window_attention` defines it, without the write.

    Args:
      interpret: runs the kernel on CPU, for tests.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    S = 0 if cache is None or cache_ranges is None else cache[0].shape[3]
    tiles = plan(T, S, N, K, H, q.dtype.itemsize)
    num_row_tiles = -(-T * G // tiles.rows)
    num_cache_tiles = -(-S // tiles.cache_tile)
    num_window_tiles = -(-T // tiles.window_tile)

    def pad(x: jax.Array, axis: int, tile: int = tiles.rows) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % tile)
        return jnp.pad(x, widths)

    rows = pad(q.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H), 2)
    k, v = (pad(x.swapaxes(1, 2), 2, tiles.window_tile) for x in (k, v))
    # The last window position each query row may see: -1 for the rows that only pad.
    last_seen = jnp.arange(T) if isinstance(mask, str) and mask == "causal" else jnp.full(T, T - 1)
    last_seen = pad(jnp.repeat(last_seen, G) + 1, 0)[:, None].astype(jnp.int32) - 1
    if window_range is None:
        window_range = jnp.tile(jnp.array([[0, T]], jnp.int32), (B, 1))
    operands = [rows, last_seen, k, v]
    reach = jnp.zeros((), jnp.int32) if near is None else near.reach.astype(jnp.int32)
    scalars = [
        jnp.stack([jnp.asarray(layer, jnp.int32), reach]),
        window_range.astype(jnp.int32),
    ]

    def whole_tile(b: Any, h: Any, i: Any, j: Any, *_: Any) -> tuple[Any, ...]:
        return (b, h, i, 0)

    def window_block(b: Any, h: Any, i: Any, j: Any, *_: Any) -> tuple[Any, ...]:
        return (b, h, jnp.maximum(j - num_cache_tiles, 0), 0)

    row_spec = pl.BlockSpec((None, tiles.heads, tiles.rows, H), whole_tile)
    window_spec = pl.BlockSpec((None, tiles.heads, tiles.window_tile, H), window_block)
    in_specs = [
        row_spec,
        pl.BlockSpec((tiles.rows, 1), lambda b, h, i, j, *_: (i, 0)),
        window_spec,
        window_spec,
    ]
    if near is not None:  # positions of query rows on sublanes, those of keys on lanes
        operands += [
            pad(jnp.repeat(near.positions.astype(jnp.int32), G, axis=1)[..., None], 1),
            pad(near.positions.astype(jnp.int32)[:, None], 2, tiles.window_tile),
        ]
        in_specs += [
            pl.BlockSpec((None, tiles.rows, 1), lambda b, h, i, j, *_: (b, i, 0)),
            pl.BlockSpec(
                (None, 1, tiles.window_tile), lambda *at: (at[0], 0, window_block(*at)[2])
            ),
        ]
    num_ranges = 0
    if S:
        assert cache is not None and cache_ranges is not None
        num_ranges = cache_ranges.shape[1]
        is_near = None if near is None else near.of_any()
        order, count = needed_tiles(cache_ranges, num_cache_tiles, tiles.cache_tile, is_near)
        scalars += [cache_ranges.reshape(B, -1).astype(jnp.int32), order, count]

        def cache_block(b: Any, h: Any, i: Any, j: Any, *scalars: Any) -> tuple[Any, ...]:
            layer, _, _, order, _ = scalars
            return (layer[0], b, h, order[b, jnp.minimum(j, num_cache_tiles - 1)], 0)

        cache_spec = pl.BlockSpec((None, None, tiles.heads, tiles.cache_tile, H), cache_block)
        operands += list(cache)
        in_specs += [cache_spec, cache_spec]
        if near is not None:
            assert near.cached is not None
            operands.append(near.cached.astype(jnp.int32)[:, None])
            in_specs.append(
                pl.BlockSpec(
                    (None, 1, tiles.cache_tile), lambda *at: (at[0], 0, cache_block(*at)[3])
                )
            )
    if not isinstance(mask, str):
        words = jax.lax.bitcast_convert_type(jnp.repeat(mask, G, axis=1), jnp.int32)
        operands.append(pad(words, 1))
        in_specs.append(
            pl.BlockSpec((None, tiles.rows, words.shape[2]), lambda b, h, i, j, *_: (b, i, 0))
        )

    kernel = functools.partial(
        _kernel,
        tiles=tiles,
        num_slots=S,
        num_cache_tiles=num_cache_tiles,
        num_ranges=num_ranges,
        has_bits=not isinstance(mask, str),
        is_causal=isinstance(mask, str) and mask == "causal",
        group=G,
        scale=H**-0.5 if scale is None else scale,
        cap=cap,
        is_near=near is not None,
    )
    stats = pltpu.VMEM((tiles.heads, tiles.rows, LANES), jnp.float32)
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(rows.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, K // tiles.heads, num_row_tiles, num_cache_tiles + num_window_tiles),
            in_specs=in_specs,
            out_specs=row_spec,
            scratch_shapes=[
                stats,
                stats,
                pltpu.VMEM((tiles.heads, tiles.rows, H), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * T * (S + T) * H,
            bytes_accessed=2 * (B * K * (S + T) + B * N * T) * H * q.dtype.itemsize,
            transcendentals=B * N * T * (S + T),
        ),
        interpret=interpret,
        name="window_attention",
    )(*scalars, *operands)
    out = out[:, :, : T * G].reshape(B, K, T, G, H)
    return out.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def needed_tiles(
    ranges: jax.Array, num_tiles: int, tile: int, is_near: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Which cache tiles the ranges [B, R, 2] touch: ids in order [B, num_tiles], and count [B].

    Entries past the count repeat the last needed tile. With `is_near` [B, S] bool, only tiles that
    have such a slot are needed.
    """
    start = jnp.arange(num_tiles, dtype=jnp.int32)[None, None] * tile
    first, stop = ranges[..., :1], ranges[..., 1:]
    needed = ((first < stop) & (first < start + tile) & (stop > start)).any(axis=1)
    if is_near is not None:
        padded = jnp.pad(is_near, ((0, 0), (0, num_tiles * tile - is_near.shape[1])))
        needed &= padded.reshape(len(padded), num_tiles, tile).any(axis=2)
    count = needed.sum(axis=1).astype(jnp.int32)
    order = jnp.argsort(~needed, axis=1, stable=True).astype(jnp.int32)
    last = jnp.take_along_axis(order, jnp.maximum(count - 1, 0)[:, None], axis=1)
    return jnp.where(jnp.arange(num_tiles)[None] < count[:, None], order, last), count


def _kernel(
    *operands: Any,
    tiles: Plan,
    num_slots: int,
    num_cache_tiles: int,
    num_ranges: int,
    has_bits: bool,
    is_causal: bool,
    group: int,
    scale: float,
    cap: float | None,
    is_near: bool,
) -> None:
    refs = iter(operands)
    layer_ref = next(refs)  # the layer, which only the index maps use, and the reach
    window_ref = next(refs)
    if num_cache_tiles:
        ranges_ref, order_ref, count_ref = next(refs), next(refs), next(refs)
    q_ref, last_seen_ref, k_ref, v_ref = (next(refs) for _ in range(4))
    if is_near:
        row_place_ref, key_place_ref = next(refs), next(refs)
    if num_cache_tiles:
        cache_k_ref, cache_v_ref = next(refs), next(refs)
        if is_near:
            slot_place_ref = next(refs)
    if has_bits:
        words_ref = next(refs)
    out_ref, m_ref, l_ref, acc_ref = refs

    b, row_tile, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    exact = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None

    @pl.when(j == 0)
    def _start() -> None:
        m_ref[...] = jnp.full_like(m_ref, LOWEST)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def attend(keys: Any, values: Any, allowed: jax.Array, num_real: Any = None) -> None:
        """Adds one tile of keys; `num_real`: how many of them exist, if not all.

        A row that has seen nothing yet counts masked keys as if they were real (its maximum is
        LOWEST); the first real key wipes that out, and rows without one end as zeros.
        """
        for h in range(tiles.heads):
            s = jax.lax.dot_general(
                q_ref[h],
                keys[h],
                (((1,), (1,)), ((), ())),
                precision=exact,
                preferred_element_type=jnp.float32,
            )
            s = s * scale
            s = s if cap is None else cap * jnp.tanh(s / cap)
            s = jnp.where(allowed, s, LOWEST)
            m = m_ref[h][:, :1]
            m_next = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
            keep = jnp.exp(m - m_next)
            p = jnp.exp(s - m_next)
            value = values[h]
            if num_real is not None:  # what lies past the array's end may be NaN
                slot = jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
                value = jnp.where(slot < num_real, value, jnp.zeros_like(value))
            attended = jax.lax.dot_general(
                p.astype(value.dtype),
                value,
                (((1,), (0,)), ((), ())),
                precision=exact,
                preferred_element_type=jnp.float32,
            )
            total = keep * l_ref[h][:, :1] + jnp.sum(p, axis=1, keepdims=True)
            l_ref[h] = jnp.broadcast_to(total, (tiles.rows, LANES))
            m_ref[h] = jnp.broadcast_to(m_next, (tiles.rows, LANES))
            acc_ref[h] = acc_ref[h] * keep + attended

    if num_cache_tiles:

        @pl.when(j < count_ref[b])
        def _cache() -> None:
            start = order_ref[b, jnp.minimum(j, num_cache_tiles - 1)] * tiles.cache_tile
            shape = (tiles.rows, tiles.cache_tile)
            slot = start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            allowed = jnp.zeros(shape, jnp.bool_)
            for r in range(num_ranges):
                first, stop = ranges_ref[b, 2 * r], ranges_ref[b, 2 * r + 1]
                allowed |= (slot >= first) & (slot < stop)
            if is_near:
                allowed &= jnp.abs(row_place_ref[...] - slot_place_ref[...]) < layer_ref[1]
            is_ragged = num_slots % tiles.cache_tile != 0
            attend(cache_k_ref, cache_v_ref, allowed, num_slots - start if is_ragged else None)

    start = (j - num_cache_tiles) * tiles.window_tile
    visible = jnp.bool_(True)
    if is_causal:  # whole tiles right of the diagonal
        last_row = (row_tile + 1) * tiles.rows - 1
        visible = start <= jax.lax.div(last_row, jnp.int32(group))

    @pl.when((j >= num_cache_tiles) & visible)
    def _window() -> None:
        shape = (tiles.rows, tiles.window_tile)
        lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        position = start + lane
        allowed = (position >= window_ref[b, 0]) & (position < window_ref[b, 1])
        allowed &= position <= last_seen_ref[...]
        if has_bits:
            word = jnp.zeros(shape, jnp.int32)
            for w in range(words_ref.shape[1]):
                word = jnp.where(lane >> 5 == w, words_ref[:, w : w + 1], word)
            allowed &= (jax.lax.shift_right_logical(word, lane & 31) & 1) == 1
        if is_near:
            allowed &= jnp.abs(row_place_ref[...] - key_place_ref[...]) < layer_ref[1]
        attend(k_ref, v_ref, allowed)

    @pl.when(j == pl.num_programs(3) - 1)
    def _finish() -> None:
        for h in range(tiles.heads):
            has_seen = m_ref[h][:, :1] > LOWEST
            total = jnp.where(has_seen, l_ref[h][:, :1], 1.0)
            out = jnp.where(has_seen, acc_ref[h] / total, 0.0)
            out_ref[h] = out.astype(out_ref.dtype)
