"""Attention of a window of queries over a key/value cache and over the window itself.

One operation serves every loop: a token (T = 1), a draft tree, a block, or a whole canvas.

Letters: B batch, T window positions, S cache slots, N query heads, K key/value heads, G = N // K,
H head width, L layers.

Row b's query t attends to
  - the cache slots inside any of row b's `cache_ranges` (a prefix; for the dual cache also a
    suffix), and
  - the window positions inside row b's `window_range`, as far as `mask` allows: all of them
    ("full"), those up to t ("causal"), or those whose bit is set in packed ancestor words.
Of these, with `near`, only to keys that stand less than its `reach` positions away from the query.
A query that may attend to nothing gives zeros.

The cache is passed stacked over layers together with a layer index, so that no implementation has
to be handed a copied slice of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import choose
from kernels_pallas.slots import Cache, Layers, first_slot
from kernels_pallas.window_attention import gpu, tpu
from kernels_pallas.window_attention.masks import Mask, Near
from kernels_pallas.window_attention.reference import window_attention_reference
from kernels_pallas.window_attention.xla import attend_xla

Implementation = Literal["xla", "tpu", "gpu", "reference"]


BACKWARD_SCORES = 2**24  # that a kernel's backward pass stores at a time; of one head at least


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask = "full",
    window_range: jax.Array | None = None,
    cache: Cache | tuple[Layers, Layers] | None = None,
    cache_ranges: jax.Array | None = None,
    layer: jax.Array | int = 0,
    near: Near | None = None,
    slots_axis: str | None = None,
    scale: float | None = None,
    cap: float | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Attends from a window of positions to a cache and to the window's own keys.

    Args:
      q: [B, T, N, H]. Queries, rotated.
      k: [B, T, K, H]. The window's own keys, rotated.
      v: [B, T, K, H]. The window's own values.
      mask: attention inside the window: "full", "causal", or packed ancestor bits
        [B, T, ceil(T / 32)] uint32 (bit j % 32 of word j // 32 set: may attend to position j).
      window_range: [B, 2] int32. First and past-the-last window position that may be attended to;
        None: all T.
      cache: keys and values of earlier calls, each [L, B, K, S, H]; or each L arrays [B, K, S, H],
        which "xla" reads where they lie. Where it has more rows than q, it is about the first ones.
      cache_ranges: [B, R, 2] int32. Up to R ranges [first, past the last) of valid cache slots per
        row; empty where first >= last. Or [B, T, R, 2], of each query, which "xla" serves. None: no
        slot is attended to.
      layer: scalar int32 in [0, L). Which layer of the cache to use.
      near: how far queries see, and where queries and keys stand; None: as far as all else allows.
      slots_axis: inside `jax.shard_map`: the mesh axis over which the cache's slots are split, in
        order; ranges count the slots of all devices. Served by "xla".
      scale: scores are multiplied by it; None: H^(-1/2).
      cap: c of c tanh(z / c), which scores z go through before they are masked; None: they do not.
      implementation: "xla", "tpu", "gpu" (Hopper) or "reference"; None: the best one where it is
        compiled.

    Returns:
      The attended values [B, T, N, H] in q's dtype.

    Raises:
      ValueError: on shapes that do not fit together.
      NotImplementedError: if the named implementation does not exist here.
    """
    if near is not None and near.cached is not None:
        near = near._replace(cached=near.cached[: len(q)])
    if cache is not None and isinstance(cache[0], tuple):
        if implementation not in (None, "xla"):
            raise NotImplementedError(
                f"implementation={implementation!r} must be 'xla' for a cache that lies apart: it "
                "reads a stacked one"
            )
        _check_shapes(q, k, v, mask, cache[0][0].shape)
        return attend_xla(
            q, k, v, mask, window_range, cache, cache_ranges, layer, near, scale=scale, cap=cap
        )
    _check_shapes(q, k, v, mask, None if cache is None else cache[0].shape[1:])
    bits = None if isinstance(mask, str) else mask
    options: dict[str, float | None] = {"scale": scale, "cap": cap}

    def serve(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """Takes the mask's bits as an operand, and its name as it was given."""
        return lambda q, k, v, bits, *rest: attend(
            q, k, v, mask if bits is None else bits, *rest, **options
        )

    def with_gradient(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return serve(functools.partial(_with_xla_gradient, kernel))

    read = None if cache_ranges is None else cache
    if slots_axis is not None and read is not None and cache_ranges is not None:
        implementation = implementation or "xla"
        num_slots = read[0].shape[3]
        cache_ranges = jnp.clip(cache_ranges - first_slot(num_slots, slots_axis), 0, num_slots)
    of_each = None
    if read is not None and cache_ranges is not None and cache_ranges.ndim == 4:
        of_each = "cache_ranges of each query are for 'xla'"
    attend = choose(
        "window_attention",
        implementation,
        xla=serve(functools.partial(attend_xla, slots_axis=slots_axis)),
        reference=serve(window_attention_reference),
        kernels={
            "tpu": (with_gradient(tpu.window_attention_tpu), of_each or tpu.refusal(q, mask)),
            "gpu": (with_gradient(gpu.window_attention_gpu), of_each or gpu.refusal(q, mask, read)),
        },
    )
    return attend(q, k, v, bits, window_range, read, cache_ranges, layer, near)


def _with_xla_gradient(
    kernel: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    window_range: jax.Array | None,
    cache: Cache | None,
    cache_ranges: jax.Array | None,
    layer: jax.Array | int,
    near: Near | None = None,
    **options: float | None,
) -> jax.Array:
    """A kernel whose backward pass is that of `attend_xla`, recomputed head by head."""
    bits, name = (None, mask) if isinstance(mask, str) else (mask, None)

    def run(attend: Callable[..., jax.Array], floats: Any, integers: Any) -> jax.Array:
        q, k, v, cache = floats
        bits, window_range, cache_ranges, layer, near = integers
        chosen = name if bits is None else bits
        return attend(q, k, v, chosen, window_range, cache, cache_ranges, layer, near, **options)

    @jax.custom_vjp
    def attend(floats: Any, integers: Any) -> jax.Array:
        return run(kernel, floats, integers)

    def forward(floats: Any, integers: Any) -> tuple[jax.Array, Any]:
        return attend(floats, integers), (floats, integers)

    def pull(floats: Any, integers: Any, gradient: jax.Array) -> Any:
        return jax.vjp(lambda floats: run(attend_xla, floats, integers), floats)[1](gradient)[0]

    def backward(saved: Any, gradient: jax.Array) -> tuple[Any, None]:
        (q, k, v, cache), (bits, window_range, _, layer, near) = saved
        if cache is not None:
            return pull(saved[0], saved[1], gradient), None
        # A few rows and key/value heads at a time, so that only their scores are stored.
        B, T, K, H = k.shape
        at_once = max(1, BACKWARD_SCORES // (q.shape[2] // K * T * T))

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(B, T, K, -1, H).transpose(0, 2, 1, 3, 4).reshape(B * K, 1, T, -1, H)

        def join(x: jax.Array) -> jax.Array:
            return x.reshape(B, K, T, -1, H).transpose(0, 2, 1, 3, 4).reshape(B, T, -1, H)

        positions = None if near is None else near.positions
        of_rows = (bits, window_range, positions)
        masks = jax.tree.map(lambda x: jnp.repeat(x, K, axis=0)[:, None], of_rows)
        windows = jax.tree.map(split, (q, k, v, gradient))

        def one(operands: Any) -> Any:
            (q, k, v, gradient), (bits, window_range, positions) = operands
            here = None if near is None else Near(near.reach, positions)
            return pull((q, k, v, None), (bits, window_range, None, layer, here), gradient)[:3]

        by_head = jax.lax.map(one, (windows, masks), batch_size=at_once)
        return (*map(join, by_head), None), None

    attend.defvjp(forward, backward)
    return attend((q, k, v, cache), (bits, window_range, cache_ranges, jnp.asarray(layer), near))


def _check_shapes(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    of_layer: tuple[int, ...] | None,
) -> None:
    B, T, N, H = q.shape
    if k.shape != v.shape or k.shape[:2] != (B, T) or k.shape[3] != H or N % k.shape[2]:
        raise ValueError(
            f"k {k.shape} and v {v.shape} must both be [B={B}, T={T}, K, H={H}] "
            f"with K dividing N={N}, as q is {q.shape}"
        )
    if isinstance(mask, str):
        if mask not in ("full", "causal"):
            raise ValueError(f"mask={mask!r} must be 'full', 'causal' or an array of ancestor bits")
    elif mask.shape != (B, T, -(-T // 32)) or mask.dtype != jnp.uint32:
        raise ValueError(
            f"mask {mask.dtype}{mask.shape} must be uint32 [B={B}, T={T}, ceil(T/32)={-(-T // 32)}]"
        )
    if of_layer is not None and (of_layer[0] < B or of_layer[1] != k.shape[2]):
        raise ValueError(
            f"a layer {of_layer} of the cache must be [B={B} or more, K={k.shape[2]}, S, H={H}]: k "
            f"is {k.shape}"
        )
