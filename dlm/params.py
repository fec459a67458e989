"""Parameters: one specification per leaf, from which everything else is derived.

`param_specs` is the single source of shapes, logical axes and initialisers of a model. Fresh
parameters, abstract ones and shardings follow from it, as do the Hugging Face loaders. Smaller
trees that are trained beside a model (`dlm.lora`) have specifications of their own, and use the
same functions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.typing import DTypeLike

from dlm.config import ModelConfig
from dlm.sharding import RULES, Rules, logical_sharding

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter array.

    Attributes:
      shape: of the array.
      axes: a logical axis name (or None) per dimension, resolved by `dlm.sharding.RULES`.
      stddev: of the normal initialiser; None: filled with `fill`.
      fill: constant used when `stddev` is None.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stddev: float | None = None
    fill: float = 0.0


class LowRank(struct.PyTreeNode):
    """A leaf of the parameters that stands for weight + scale * down @ up, never added up.

    Letters: I and O, the flattened axes of the weight that are multiplied over, and the others.

    Attributes:
      weight: the array of the model, [L, ...]; L is missing inside a layer.
      down: [L, I, r].
      up: [L, r, O].
      scale: static.
    """

    weight: jax.Array
    down: jax.Array
    up: jax.Array
    scale: float = struct.field(pytree_node=False)


def param_specs(cfg: ModelConfig) -> Params:
    """The specification of every parameter, as a nested dict.

    Layers are stacked on a leading L axis. The MLP's weights are stored input-first; those of
    queries, keys and values output-first with the width they are multiplied over last, because
    merging (heads, head width) behind another axis would make a TPU copy them. The output head is
    stored like the embedding, one row per token: a tile of the vocabulary is contiguous.
    """
    L, D, F, V = cfg.n_layers, cfg.d_model, cfg.d_ff, cfg.vocab_size
    N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    # Residual branches start small, so that at first the stream is the token itself whatever the
    # depth: small models then learn to copy in about half the steps.
    out = 0.3 / math.sqrt(2 * L)
    attention: Params = {
        "q": ParamSpec((L, N, H, D), ("layers", "heads", None, "embed"), D**-0.5),
        "k": ParamSpec((L, K, H, D), ("layers", "kv_heads", None, "embed"), D**-0.5),
        "v": ParamSpec((L, K, H, D), ("layers", "kv_heads", None, "embed"), D**-0.5),
        "o": ParamSpec((L, N, H, D), ("layers", "heads", None, "embed"), out * (N * H) ** -0.5),
    }
    if cfg.qkv_bias:
        attention["q_bias"] = ParamSpec((L, N, H), ("layers", "heads", None))
        attention["k_bias"] = ParamSpec((L, K, H), ("layers", "kv_heads", None))
        attention["v_bias"] = ParamSpec((L, K, H), ("layers", "kv_heads", None))
    if cfg.qk_norm:
        attention["q_norm"] = ParamSpec((L, H), ("layers", None), fill=1.0)
        attention["k_norm"] = ParamSpec((L, H), ("layers", None), fill=1.0)
    specs: Params = {
        "embed": ParamSpec((V, D), ("vocab", "embed"), D**-0.5),
        "layers": {
            "attention_norm": ParamSpec((L, D), ("layers", None), fill=1.0),
            "attention": attention,
            "mlp_norm": ParamSpec((L, D), ("layers", None), fill=1.0),
            "mlp": {
                "gate": ParamSpec((L, D, F), ("layers", "embed", "ffn"), D**-0.5),
                "up": ParamSpec((L, D, F), ("layers", "embed", "ffn"), D**-0.5),
                "down": ParamSpec((L, F, D), ("layers", "ffn", "embed"), out * F**-0.5),
            },
        },
        "final_norm": ParamSpec((D,), (None,), fill=1.0),
    }
    if not cfg.tie_embeddings:
        specs["unembed"] = ParamSpec((V, D), ("vocab", "embed"), D**-0.5)
    return specs


def num_params(cfg: ModelConfig) -> int:
    """Number of parameters, embeddings included."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(param_specs(cfg)))


@functools.partial(jax.jit, static_argnames=("cfg",))
def init_params(key: jax.Array, cfg: ModelConfig) -> Params:
    """Fresh parameters of a model in `cfg.dtype`; see `init_from_specs`."""
    return init_from_specs(key, param_specs(cfg), cfg.jnp_dtype)


def init_from_specs(key: jax.Array, specs: Params, dtype: DTypeLike) -> Params:
    """Fresh parameters.

    Each leaf draws from its own key, folded from its name, so adding a parameter changes no other.

    Args:
      key: a `jax.random.key`.
      specs: tree of `ParamSpec`.
      dtype: of the parameters.
    """

    def init(path: jax.tree_util.KeyPath, spec: ParamSpec) -> jax.Array:
        if spec.stddev is None:
            return jnp.full(spec.shape, spec.fill, dtype)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return (spec.stddev * jax.random.normal(leaf_key, spec.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(init, specs)


def abstract_params(cfg: ModelConfig, mesh: Mesh | None = None, rules: Rules = RULES) -> Params:
    """`jax.ShapeDtypeStruct` per parameter; with a mesh, each carries its sharding."""
    return abstract_from_specs(param_specs(cfg), cfg.jnp_dtype, mesh, rules)


def abstract_from_specs(
    specs: Params, dtype: DTypeLike, mesh: Mesh | None = None, rules: Rules = RULES
) -> Params:
    """As `abstract_params`, of any tree of `ParamSpec`."""
    shardings = spec_shardings(specs, mesh, rules) if mesh is not None else None

    def abstract(spec: ParamSpec, sharding: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding)

    return jax.tree.map(abstract, specs, *(() if shardings is None else (shardings,)))


def param_shardings(cfg: ModelConfig, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Params:
    """`NamedSharding` per parameter.

    A dimension that its mesh axes do not divide is replicated instead (for example two key/value
    heads on four tensor shards).
    """
    return spec_shardings(param_specs(cfg), mesh, rules)


def spec_shardings(specs: Params, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Params:
    """As `param_shardings`, of any tree of `ParamSpec`."""
    return jax.tree.map(lambda spec: logical_sharding(spec.shape, spec.axes, mesh, rules), specs)
