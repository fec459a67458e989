"""One transformer for every model here: a forward over a window of positions.

Pre-norm RMSNorm, rotary embeddings in the rotate-half layout, grouped-query attention, gated SiLU
MLP. The window says whether attention is causal, bidirectional or tree-shaped; the slots say what
is cached.

Letters: B batch, T window positions, D model width, N query heads, K key/value heads, H head
width, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlm.blocks.attention import attend, project_qkv
from dlm.blocks.linear import linear
from dlm.blocks.mlp import mlp
from dlm.blocks.norm import rms_norm
from dlm.blocks.rotary import rotary_angles
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.params import Params
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
      remat: whether to recompute each layer in the backward pass instead of keeping its
        activations.

    Returns:
      Hidden states of the window, the cache, features.

    Raises:
      ValueError: the window contradicts itself or does not fit the slots, see `Window`; there are
        no such `layers`, a feature is of one that is not run, or the cache has another number.
    """
    run = tuple(range(cfg.n_layers)) if layers is None else check_layers(layers, cfg.n_layers)
    if not {*run, cfg.n_layers}.issuperset(feature_layers):
        raise ValueError(f"feature_layers={feature_layers} must be among layers={run} that are run")
    depth = len(run) if slots is None else len(slots.cache.k)
    if depth not in (len(run), cfg.n_layers):
        raise ValueError(f"the cache has {depth} layers and must have {len(run)}, those that run")
    angles = rotary_angles(window.positions, cfg)
    x = params["embed"].at[window.tokens].get(mode="clip")  # [B, T, D]
    if window.mix is not None:
        weight = window.mix[0][..., None]
        x = ((1 - weight) * x.astype(jnp.float32) + weight * window.mix[1]).astype(x.dtype)
    x = constrain(x, "batch", None, None)

    kept, keep = _feature_buffer(cfg, feature_layers, x)

    def layer(carry: Any, xs: tuple[Params | None, jax.Array, jax.Array]) -> tuple[Any, None]:
        x, written, kept = carry
        p, index, place = xs
        if p is None:
            take = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
            p = jax.tree.map(take, params["layers"])
        kept = keep(kept, index, x)
        used = slots if slots is None or written is None else slots.replace(cache=written)
        x, new = decoder_layer(x, p, cfg, angles, window, used, place)
        return (x, new, kept), None

    body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    index = jnp.arange(cfg.n_layers) if layers is None else jnp.array(layers)
    place = index if depth == cfg.n_layers else jnp.arange(len(run))
    given = None if slots is None else slots.cache
    carry = (x, None if slots is None or slots.write_at is None else given, kept)
    carry, _ = jax.lax.scan(body, carry, (None if layers else params["layers"], index, place))
    x, written, kept = carry
    kept = keep(kept, cfg.n_layers, x)
    return ForwardOutput(
        hidden=rms_norm(x, params["final_norm"], cfg.norm_eps),
        cache=given if written is None else written,
        features=None if kept is None else jnp.concatenate([*kept[:-1]], axis=-1),
    )


def check_layers(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """`layers`, rising indices of some of `num_layers`; ValueError if they are not."""
    if not layers or list(layers) != sorted(set(layers) & set(range(num_layers))):
        raise ValueError(f"layers={layers} must be rising layers of the {num_layers} there are")
    return layers


def decoder_layer(
    x: jax.Array,
    p: Params,
    cfg: ModelConfig,
    angles: tuple[jax.Array, jax.Array],
    window: Window,
    slots: Slots | None = None,
    layer: jax.Array | int = 0,
) -> tuple[jax.Array, KVCache | None]:
    """One layer.

    Args:
      x: [B, T, D]. The residual stream.
      p: {"attention_norm", "attention", "mlp_norm", "mlp"}.
      cfg: the model.
      angles: of `rotary_angles`.
      window: whose mask and range count.
      slots: the cache; None: only the window is seen.
      layer: scalar int32. Which layer of the cache is read and written.

    Returns:
      [B, T, D], and the written cache; None if nothing was written.
    """
    with jax.named_scope("attention"):
        h = rms_norm(x, p["attention_norm"], cfg.norm_eps)
        q, k, v = project_qkv(h, p["attention"], cfg, angles)
        attended, written = attend(q, k, v, window, slots, layer)
        x = x + linear(attended, p["attention"]["o"], num_in=2)
    with jax.named_scope("mlp"):
        x = x + mlp(rms_norm(x, p["mlp_norm"], cfg.norm_eps), p["mlp"])
    return constrain(x, "batch", None, None), written


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
