"""One transformer for every model here: a forward over a window of positions.

A layer is attention and an MLP, or experts, each with norms around it; `ModelConfig` says of which
kinds. The window says whether attention is causal, bidirectional or tree-shaped; the slots say what
is cached.

Layers are run by `jax.lax.scan`. What differs between them without changing the shapes of their
parameters (how far they see, which rotary table they use) is data that is scanned over. Layers with
experts and layers without are different programs: runs of them, or of a pattern of them, are
scanned one after the other.

Letters: B batch, T window positions, D model width, N query heads, K key/value heads, H head
width, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlm.blocks.attention import attend, project_qkv
from dlm.blocks.linear import linear
from dlm.blocks.mlp import mlp
from dlm.blocks.moe import WEIGHTS, moe
from dlm.blocks.norm import norm
from dlm.blocks.rotary import Angles, rotary_angles
from dlm.cache import KVCache, fill_layer, write_positions
from dlm.config import ModelConfig
from dlm.params import OfLayer, Params, is_apart, stacks
from dlm.sharding import constrain
from dlm.window import Slots, Window


@struct.dataclass
class ForwardOutput:
    """What a forward returns.

    Attributes:
      hidden: [B, T, D] in the model's dtype. Final hidden states, normalised: multiply by
        `dlm.vocab.head` for logits.
      cache: the written cache, or the one that was given.
      features: [B, T, n * D] in the model's dtype. The residual stream at the n `feature_layers`,
        side by side; None if there are none.
    """

    hidden: jax.Array
    cache: KVCache | None
    features: jax.Array | None = None


def forward(
    params: Params,
    cfg: ModelConfig,
    window: Window,
    slots: Slots | None = None,
    *,
    feature_layers: tuple[int, ...] = (),
    layers: tuple[int, ...] | None = None,
    sublayers: jax.Array | None = None,
    remat: bool = False,
) -> ForwardOutput:
    """Runs the model over a window of positions.

    Args:
      params: as `param_specs(cfg)`.
      cfg: the model.
      window: the tokens, where they stand and what of each other they see.
      slots: the cache, what is read of it and where the window is written; None: there is none.
      feature_layers: indices of layers, at whose entrance the residual stream is kept as a
        feature; `cfg.n_layers` is what leaves the last one, before the final norm. Static.
      layers: indices of the layers that are run, rising; None: all. Their weights are read where
        they lie. A cache of all `cfg.n_layers` is used at their own numbers, one of `len(layers)`
        in the order in which they run. Static.
      sublayers: [B, L, 2] bool. Of each row, the attention and the MLP of which layers are run;
        None: all. As data: another choice compiles nothing, and what no row runs is not computed,
        nor are its weights read. What a cache is left with of attention that was not run is of no
        meaning.
      remat: whether to recompute each layer in the backward pass instead of keeping its
        activations.

    Returns:
      Hidden states of the window, the cache, features.

    Raises:
      ValueError: the window contradicts itself or does not fit the slots, see `Window`; there are
        no such `layers`, a feature is of one that is not run, or the cache has another number;
        `sublayers` are of another model.
    """
    run = tuple(range(cfg.n_layers)) if layers is None else check_layers(layers, cfg.n_layers)
    if not {*run, cfg.n_layers}.issuperset(feature_layers):
        raise ValueError(f"feature_layers={feature_layers} must be among layers={run} that are run")
    depth = len(run) if slots is None else slots.cache.num_layers
    if depth not in (len(run), cfg.n_layers):
        raise ValueError(f"the cache has {depth} layers and must have {len(run)}, those that run")
    if sublayers is not None and sublayers.shape[1:] != (cfg.n_layers, 2):
        raise ValueError(f"sublayers has shape {sublayers.shape}, not [B, {cfg.n_layers}, 2]")
    x = params["embed"].at[window.tokens].get(mode="clip")  # [B, T, D]
    if window.mix is not None:
        weight = window.mix[0][..., None]
        x = ((1 - weight) * x.astype(jnp.float32) + weight * window.mix[1]).astype(x.dtype)
    if cfg.embed_scale != 1:
        x = x * jnp.asarray(cfg.embed_scale, x.dtype)
    if cfg.learned_positions:
        x = x + params["positions"].at[window.positions].get(mode="clip")
    x = constrain(x, "batch", None, None)

    tables, table = _rotary_tables(cfg, run, window, slots)
    kept, keep = _feature_buffer(cfg, feature_layers, x)
    leaves_experts = slots is not None  # else gradients may be wanted
    of_kind = {
        kind: _in_place(stack, leaves_experts) for kind, stack in stacks(params, cfg).items()
    }
    of_all = cfg.kinds("mlp")
    kinds = tuple(of_all[i] for i in run)

    def layer(kind: str, carry: Any, taken: list[jax.Array] | None, at: _Place) -> Any:
        x, filled, kept = carry
        take = lambda index: lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)  # noqa: E731
        stack, join = of_kind[kind]
        of_layer = lambda: join(  # noqa: E731
            jax.tree.map(take(at.own), stack) if taken is None else taken, at.own
        )
        angles = tables if at.table is None else jax.tree.map(take(at.table), tables)
        kept = keep(kept, at.layer, x)
        read = angles, window, slots, at.cached, at.reach
        if sublayers is None:
            x, new = decoder_layer(x, of_layer(), cfg, *read)
        else:
            is_run = jax.lax.dynamic_index_in_dim(sublayers, at.layer, axis=1, keepdims=False)
            x, new = _run_where(is_run, x, of_layer, cfg, *read)
        if filled is not None and target is not None:
            filled = fill_layer(filled, new, at.cached, target.write_rows)
        is_late = target is not None and filled is None
        return (x, filled, kept), new if is_late else None

    def cycle(kinds: tuple[str, ...], carry: Any, xs: Any) -> tuple[Any, list[KVCache | None]]:
        news = []
        for kind, (taken, at) in zip(kinds, xs, strict=True):
            one: Callable[..., Any] = functools.partial(layer, kind)
            one = jax.checkpoint(one, prevent_cse=False) if remat else one
            carry, new = one(carry, taken, at)
            news.append(new)
        return carry, news

    place = _Place(
        layer=np.array(run),
        own=np.array([cfg.stacks[kind].index(i) for i, kind in zip(run, kinds, strict=True)]),
        cached=np.array(run) if depth == cfg.n_layers else np.arange(len(run)),
        table=table,
        reach=_reach(cfg, run),
    )
    # A window of all slots replaces the old contents, which nobody reads, layer by layer. What
    # other windows leave is written once, behind all layers: a loop that reads and writes the same
    # array would copy the whole of it in every round.
    target = None if slots is None or slots.write_at is None else slots
    fills = (
        target is not None
        and window.tokens.shape[1] == target.cache.num_slots
        and not is_apart(target.cache.k)
    )
    carry = (x, target.cache if target is not None and fills else None, kept)
    late: list[KVCache] = []
    for start, period, count in repeats(kinds):
        in_cycle = kinds[start : start + period]
        xs = []
        for j, kind in enumerate(in_cycle):
            own = slice(start + j, start + period * count, period)
            at = jax.tree.map(lambda x, own=own: jnp.asarray(x[own]), place)
            # Weights that are all run, in order, are scanned; of others each is read where it lies,
            # if it is run at all. Without a cache gradients may be wanted, so scans are, too.
            is_scanned = count == len(cfg.stacks[kind]) and (sublayers is None or slots is None)
            xs.append((of_kind[kind][0] if is_scanned else None, at))
        carry, news = jax.lax.scan(functools.partial(cycle, in_cycle), carry, xs)
        if target is not None and not fills:
            join = lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:])  # noqa: E731
            late.append(jax.tree.map(join, *news))
    x, written, kept = carry
    if target is not None and late:
        new = jax.tree.map(lambda *x: jnp.concatenate(x), *late)
        written = target.store(new, None if depth == len(run) else run)
    kept = keep(kept, cfg.n_layers, x)
    hidden = final_hidden(params, cfg, x)
    if written is not None and written.positions is not None:
        assert slots is not None and slots.write_at is not None
        written = write_positions(written, window.positions, slots.write_at, slots.write_rows)
    return ForwardOutput(
        hidden=hidden,
        cache=slots.cache if slots is not None and written is None else written,
        features=None if kept is None else jnp.concatenate([*kept[:-1]], axis=-1),
    )


def final_hidden(params: Params, cfg: ModelConfig, x: jax.Array) -> jax.Array:
    """What the output head reads, [..., D], of the residual stream [..., D] behind some layer."""
    hidden = norm(x, params, "final_norm", cfg)
    if cfg.logit_scale != 1:
        hidden = hidden * jnp.asarray(cfg.logit_scale, hidden.dtype)
    return hidden


def _in_place(
    layers: Params, leaves_experts: bool
) -> tuple[list[jax.Array], Callable[[list[jax.Array], jax.Array], Params]]:
    """What of stacked layers is taken out, and how that and a number make a layer's parameters.

    What lies apart stays where it lies; so do the weights of experts, if that is wanted.
    """
    found, tree = jax.tree_util.tree_flatten_with_path(layers, is_leaf=is_apart)
    experts = [f"moe/{name}" for name in WEIGHTS] if leaves_experts else []
    stays = [
        is_apart(x) or jax.tree_util.keystr(path, simple=True, separator="/") in experts
        for path, x in found
    ]
    leaves = [x for _, x in found]

    def join(taken: list[jax.Array], own: jax.Array) -> Params:
        rest = iter(taken)
        p: Params = jax.tree.unflatten(
            tree,
            [
                OfLayer(x, own) if is_here else next(rest)
                for x, is_here in zip(leaves, stays, strict=True)
            ],
        )
        return p

    return [x for x, is_here in zip(leaves, stays, strict=True) if not is_here], join


class _Place(struct.PyTreeNode):
    """Where a layer stands; of several layers, an array of numbers each.

    Attributes:
      layer: its number in the model.
      own: its number among those of its kind.
      cached: its number in the cache.
      table: which of the rotary tables it uses; None: there is one, or none.
      reach: only keys at positions less than this away are seen; None: all layers see all.
    """

    layer: Any
    own: Any
    cached: Any
    table: Any = None
    reach: Any = None


def _reach(cfg: ModelConfig, run: tuple[int, ...]) -> np.ndarray | None:
    """How far each layer sees; None: no layer's sight is limited."""
    if cfg.sliding_window is None:
        return None
    is_sliding = np.array([kind == "sliding" for kind in cfg.kinds("attention")])[list(run)]
    return np.where(is_sliding, cfg.sliding_window, 2**30) if is_sliding.any() else None


def _rotary_tables(
    cfg: ModelConfig, run: tuple[int, ...], window: Window, slots: Slots | None
) -> tuple[Angles | None, np.ndarray | None]:
    """The rotary tables of the layers that are run, stacked, and which of them each uses.

    One table is not stacked, and then nothing is said about layers; where no layer rotates there
    is none.
    """
    length = None
    if cfg.rope_scaling is not None and cfg.rope_scaling.needs_length:
        length = _furthest(window) + 1 if slots is None else slots.length
    has_local = cfg.local_rope_theta is not None
    kinds = list(zip(cfg.kinds("positions"), cfg.kinds("attention"), strict=True))
    names = [
        "none" if rotates == "none" else "local" if has_local and sees == "sliding" else "global"
        for rotates, sees in (kinds[i] for i in run)
    ]
    used = sorted(set(names))
    if used == ["none"]:
        return None, None
    made = {
        name: rotary_angles(window.positions, cfg, length=length, is_local=name == "local")
        for name in used
        if name != "none"
    }
    if "none" in used:  # turned by nothing
        other = next(iter(made.values()))
        scale = None if other.query_scale is None else jnp.ones_like(other.query_scale)
        made["none"] = Angles(jnp.ones_like(other.cos), jnp.zeros_like(other.sin), scale)
    if len(used) == 1:
        return made[used[0]], None
    stacked = jax.tree.map(lambda *tables: jnp.stack(tables), *(made[name] for name in used))
    return stacked, np.array([used.index(name) for name in names])


def _furthest(window: Window) -> jax.Array:
    """[B] int32: the last position of each row that is real."""
    if window.range is None:
        return window.positions.max(axis=1)
    place = jnp.arange(window.positions.shape[1])[None]
    is_real = (place >= window.range[:, :1]) & (place < window.range[:, 1:])
    return jnp.where(is_real, window.positions, 0).max(axis=1)


def repeats(kinds: Sequence[str]) -> list[tuple[int, int, int]]:
    """(start, period, count) of patterns that, each repeated `count` times, give `kinds`.

    From left to right, the pattern whose repetitions reach furthest; of those the shortest.
    """
    found, start = [], 0
    while start < len(kinds):
        best = (1, 1)
        for period in range(1, (len(kinds) - start) // 2 + 1):
            count = 1
            cycle = kinds[start : start + period]
            while kinds[start + count * period : start + (count + 1) * period] == cycle:
                count += 1
            if count > 1 and period * count > best[0] * best[1]:
                best = (period, count)
        found.append((start, *best))
        start += best[0] * best[1]
    return found


def check_layers(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """`layers`, rising indices of some of `num_layers`; ValueError if they are not."""
    if not layers or list(layers) != sorted(set(layers) & set(range(num_layers))):
        raise ValueError(f"layers={layers} must be rising layers of the {num_layers} there are")
    return layers


def decoder_layer(
    x: jax.Array,
    p: Params,
    cfg: ModelConfig,
    angles: Angles | None,
    window: Window,
    slots: Slots | None = None,
    layer: jax.Array | int = 0,
    reach: jax.Array | int | None = None,
) -> tuple[jax.Array, KVCache]:
    """One layer.

    Args:
      x: [B, T, D]. The residual stream.
      p: its parameters: {"attention", "mlp" or "moe"} and their norms.
      cfg: the model.
      angles: of `rotary_angles`; None: nothing is rotated.
      window: whose mask and range count.
      slots: the cache; None: only the window is seen.
      layer: scalar int32. Which layer of the cache is read.
      reach: only keys at positions less than this away are seen; None: all.

    Returns:
      [B, T, D], and the keys and values of the window, each [B, K, T, H].
    """

    x, new = _attention(x, p, cfg, angles, window, slots, layer, reach)
    return constrain(_mlp(x, p, cfg), "batch", None, None), new


def _run_where(
    is_run: jax.Array,
    x: jax.Array,
    of_layer: Callable[[], Params],
    cfg: ModelConfig,
    angles: Angles | None,
    window: Window,
    slots: Slots | None,
    layer: jax.Array,
    reach: jax.Array | None,
) -> tuple[jax.Array, KVCache]:
    """As `decoder_layer`, of whose two halves each row has those that `is_run` [B, 2] bool says.

    `of_layer` makes the parameters: inside of branches, as otherwise they would be taken out of the
    stack where nobody multiplies by them.
    """
    B, T, _ = x.shape
    of_row = lambda half: is_run[:, half, None, None]  # noqa: E731

    def attention(x: jax.Array) -> tuple[jax.Array, KVCache]:
        return _attention(x, of_layer(), cfg, angles, window, slots, layer, reach)

    def no_attention(x: jax.Array) -> tuple[jax.Array, KVCache]:
        nothing = jnp.zeros((B, cfg.n_kv_heads, T, cfg.head_dim), x.dtype)
        return x, KVCache(nothing, nothing)

    attended, new = jax.lax.cond(is_run[:, 0].any(), attention, no_attention, x)
    x = jnp.where(of_row(0), attended, x)
    passed = jax.lax.cond(is_run[:, 1].any(), lambda x: _mlp(x, of_layer(), cfg), lambda x: x, x)
    return constrain(jnp.where(of_row(1), passed, x), "batch", None, None), new


def _enter(x: jax.Array, p: Params, cfg: ModelConfig, name: str) -> jax.Array:
    """What one half of a layer reads of the residual stream."""
    return x if cfg.norm_places == "after" else norm(x, p, f"{name}_norm", cfg)


def _leave(x: jax.Array, given: jax.Array, p: Params, cfg: ModelConfig, name: str) -> jax.Array:
    """The residual stream behind one half of a layer."""
    if cfg.norm_places != "before":
        given = norm(given, p, f"{name}_out_norm", cfg)
    if cfg.residual_scale != 1:
        given = given * jnp.asarray(cfg.residual_scale, given.dtype)
    return x + given


def _attention(
    x: jax.Array,
    p: Params,
    cfg: ModelConfig,
    angles: Angles | None,
    window: Window,
    slots: Slots | None,
    layer: jax.Array | int,
    reach: jax.Array | int | None,
) -> tuple[jax.Array, KVCache]:
    """The first half of `decoder_layer`."""
    with jax.named_scope("attention"):
        q, k, v = project_qkv(_enter(x, p, cfg, "attention"), p["attention"], cfg, angles)
        attended = attend(
            q, k, v, window, slots, layer,
            reach=reach, scale=cfg.attention_scale, cap=cfg.attention_cap,
        )  # fmt: skip
        given = linear(attended, p["attention"]["o"], num_in=2)
        if cfg.o_bias:
            given = given + p["attention"]["o_bias"][None, None]
        x = _leave(x, given, p, cfg, "attention")
    return x, KVCache(k.swapaxes(1, 2), v.swapaxes(1, 2))


def _mlp(x: jax.Array, p: Params, cfg: ModelConfig) -> jax.Array:
    """The second half of `decoder_layer`."""
    with jax.named_scope("mlp"):
        entered = _enter(x, p, cfg, "mlp")
        if "moe" in p:
            assert cfg.experts is not None
            given = moe(entered, p["moe"], cfg.experts, cfg.activation)
        else:
            given = mlp(entered, p["mlp"], cfg.activation)
        return _leave(x, given, p, cfg, "mlp")


def _feature_buffer(
    cfg: ModelConfig, layers: tuple[int, ...], x: jax.Array
) -> tuple[jax.Array | None, Callable[..., jax.Array | None]]:
    """Where features are kept [n + 1, B, T, D], the last for what nobody asked for; how to."""
    if not layers:
        return None, lambda kept, layer, x: None
    slots = np.full(cfg.n_layers + 1, len(layers))
    slots[list(layers)] = range(len(layers))
    buffer = constrain(jnp.zeros((len(layers) + 1, *x.shape), x.dtype), None, "batch", None, None)
    return buffer, lambda kept, layer, x: kept.at[jnp.asarray(slots)[layer]].set(x)
