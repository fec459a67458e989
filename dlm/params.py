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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.typing import DTypeLike

from dlm.config import ModelConfig
from dlm.sharding import RULES, Rules, logical_sharding

Params = dict[str, Any]

INPUT_FIRST = ("o", "gate", "up", "down")  # how their weights are stored, see `param_specs`

# Of weights that lie apart, those that are multiplied by the same; their name, being one.
JOINED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}

APART_BYTES = 2**20  # of a layer's weights


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter array.

    Attributes:
      shape: of the array.
      axes: a logical axis name (or None) per dimension, resolved by `dlm.sharding.RULES`.
      stddev: of the normal initialiser; None: filled with `fill`.
      fill: constant used when `stddev` is None.
      dtype: of the parameter; None: that of the others.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stddev: float | None = None
    fill: float = 0.0
    dtype: str | None = None


class LowRank(struct.PyTreeNode):
    """A leaf of the parameters that stands for weight + scale * down @ up, never added up.

    Letters: I and O, the flattened axes of the weight that are multiplied over, and the others.

    Attributes:
      weight: [L, ...]. The array of the model. L is missing inside a layer, here and below, and
        where layers lie `Apart`.
      down: [L, I, r].
      up: [L, r, O].
      scale: static.
      first: >= 0; positions of a window before this one are multiplied by the weight alone. Static.
    """

    weight: jax.Array
    down: jax.Array
    up: jax.Array
    scale: float = struct.field(pytree_node=False)
    first: int = struct.field(pytree_node=False, default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.weight.shape


class Apart(struct.PyTreeNode):
    """A leaf of the parameters that is an array per layer, and not one of them all.

    CPUs copy what a scan takes out of a stack before they multiply by it; an array of its own they
    read where it is, and fastest if what is multiplied over comes last.

    Attributes:
      layers: L arrays of the same shape, or as many `LowRank`.
      is_turned: whether the last axis of each has become its first. Static.
      sizes: how much of each array's first axis is whose, where several parameters are one of
        `JOINED`, as one product with them takes less time than several; (): it is one. Static.
    """

    layers: tuple[Any, ...]
    is_turned: bool = struct.field(pytree_node=False, default=False)
    sizes: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack that it stands for, [L, ...]."""
        first, *rest = self.layers[0].shape
        return (len(self.layers), *((*rest, first) if self.is_turned else (first, *rest)))

    def __iter__(self) -> Iterator[Any]:
        """Layer by layer, as a stack."""
        return map(self.layer, range(len(self.layers)))

    def layer(self, number: int) -> Any:
        """That of the stack."""
        x = self.layers[number]
        return jnp.moveaxis(x, 0, -1) if self.is_turned else x

    def entry(self, layer: int, *index: int) -> jax.Array:
        """The number at an index of the stack."""
        *rest, last = index
        x: jax.Array = self.layers[layer]
        return x[(last, *rest)] if self.is_turned else x[index]

    @property
    def dtype(self) -> jnp.dtype:
        return self.layers[0].dtype


def is_apart(x: Any) -> bool:
    """Says to functions of trees that such a leaf is one."""
    return isinstance(x, Apart)


class OfLayer(struct.PyTreeNode):
    """A leaf of a layer's parameters that lies among those of all layers, and is not taken out.

    Attributes:
      stack: [L, ...].
      layer: scalar int32.
    """

    stack: jax.Array | Apart
    layer: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer's own."""
        return self.stack.shape[1:]


class LogitCap(struct.PyTreeNode):
    """Says among parameters, without a leaf, that logits z go through cap tanh(z / cap).

    Attributes:
      cap: > 0. Static.
    """

    cap: float = struct.field(pytree_node=False)


def param_specs(cfg: ModelConfig) -> Params:
    """The specification of every parameter, as a nested dict.

    Layers are stacked on a leading L axis, as "layers"; where some have experts and others do not,
    those of each kind are, as "layers/dense" and "layers/experts", see `ModelConfig.stacks`. The
    MLP's weights are stored input-first; those of queries, keys and values output-first with the
    width they are multiplied over last, because merging (heads, head width) behind another axis
    would make a TPU copy them. The output head is stored like the embedding, one row per token: a
    tile of the vocabulary is contiguous.
    """
    D, V = cfg.d_model, cfg.vocab_size
    stacks = {kind: _layer_specs(cfg, kind, len(layers)) for kind, layers in cfg.stacks.items()}
    specs: Params = {
        "embed": ParamSpec((V, D), ("vocab", "embed"), D**-0.5),
        "layers": stacks if len(stacks) > 1 else next(iter(stacks.values())),
        **_norm_specs(cfg, "final_norm"),
    }
    if cfg.learned_positions:
        specs["positions"] = ParamSpec((cfg.max_seq_len, D), (None, "embed"), D**-0.5)
    if not cfg.tie_embeddings:
        specs["unembed"] = ParamSpec((V, D), ("vocab", "embed"), D**-0.5)
    if cfg.logit_cap is not None:
        specs["logit_cap"] = LogitCap(cfg.logit_cap)
    return specs


def stacks(params: Params, cfg: ModelConfig) -> dict[str, Params]:
    """The stacked layers of each kind, whose numbers are `cfg.stacks`; in any tree like them."""
    kinds = list(cfg.stacks)
    layers: Params = params["layers"]
    return {kinds[0]: layers} if len(kinds) == 1 else {kind: layers[kind] for kind in kinds}


def _layer_specs(cfg: ModelConfig, kind: str, L: int) -> Params:
    """Of L layers of a kind."""
    D, N, K, H = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    # Residual branches start small, so that at first the stream is the token itself whatever the
    # depth: small models then learn to copy in about half the steps.
    out = 0.3 / math.sqrt(2 * cfg.n_layers)
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
    if cfg.o_bias:
        attention["o_bias"] = ParamSpec((L, D), ("layers", None))
    fill = 0.0 if cfg.norm == "rms_offset" else 1.0
    if cfg.joint_qk_norm:
        attention["q_norm"] = ParamSpec((L, N, H), ("layers", "heads", None), fill=fill)
        attention["k_norm"] = ParamSpec((L, K, H), ("layers", "kv_heads", None), fill=fill)
    elif cfg.qk_norm:
        attention["q_norm"] = ParamSpec((L, H), ("layers", None), fill=fill)
        attention["k_norm"] = ParamSpec((L, H), ("layers", None), fill=fill)
    layer: Params = {"attention": attention}
    if kind == "experts":
        layer["moe"] = _moe_specs(cfg, L, out)
    else:
        layer["mlp"] = _mlp_specs(cfg, L, cfg.d_ff, out)
    for part in ("attention", "mlp"):
        if cfg.norm_places != "after":
            layer |= _norm_specs(cfg, f"{part}_norm", L)
        if cfg.norm_places != "before":
            layer |= _norm_specs(cfg, f"{part}_out_norm", L)
    return layer


def _mlp_specs(cfg: ModelConfig, L: int, F: int, out: float) -> Params:
    """Of L MLPs of hidden width F."""
    D = cfg.d_model
    specs = {
        "up": ParamSpec((L, D, F), ("layers", "embed", "ffn"), D**-0.5),
        "down": ParamSpec((L, F, D), ("layers", "ffn", "embed"), out * F**-0.5),
    }
    if cfg.gated:
        specs["gate"] = ParamSpec((L, D, F), ("layers", "embed", "ffn"), D**-0.5)
    if cfg.mlp_bias:
        into = {f"{name}_bias": ParamSpec((L, F), ("layers", "ffn")) for name in specs}
        specs |= into | {"down_bias": ParamSpec((L, D), ("layers", None))}
    return specs


def _moe_specs(cfg: ModelConfig, L: int, out: float) -> Params:
    """Of L layers of experts."""
    assert cfg.experts is not None
    D, E, F = cfg.d_model, cfg.experts.num_experts, cfg.experts.d_ff
    into = ParamSpec((L, E, D, F), ("layers", "experts", "embed", "ffn"), D**-0.5)
    specs: Params = {
        "router": ParamSpec((L, E, D), ("layers", None, "embed"), D**-0.5),
        "gate": into,
        "up": into,
        "down": ParamSpec((L, E, F, D), ("layers", "experts", "ffn", "embed"), out * F**-0.5),
    }
    if cfg.experts.bias != "none":  # it decides between scores that are almost equal
        specs["bias"] = ParamSpec((L, E), ("layers", None), dtype="float32")
    if cfg.experts.shared_d_ff:
        specs["shared"] = _mlp_specs(cfg, L, cfg.experts.shared_d_ff, out)
    if cfg.experts.has_shared_gate:
        specs["shared_gate"] = ParamSpec((L, D, 1), ("layers", "embed", None), D**-0.5)
    return specs


def _norm_specs(cfg: ModelConfig, name: str, L: int | None = None) -> Params:
    """Of a norm, or of L of them."""
    shape, axes = ((cfg.d_model,), (None,)) if L is None else ((L, cfg.d_model), ("layers", None))
    fill = 0.0 if cfg.norm == "rms_offset" else 1.0
    specs = {name: ParamSpec(shape, axes, fill=fill)}
    if cfg.norm == "layer":
        specs[f"{name}_bias"] = ParamSpec(shape, axes)
    return specs


def may_lie_apart(leaf: str, spec: ParamSpec) -> bool:
    """Whether a parameter, named by its path, may be `Apart`: those that products are made with.

    Not the weights of experts, few of which are read.
    """
    is_factor = leaf.rsplit("/", 1)[-1] in ("q", "k", "v", "o", "gate", "up", "down")
    return leaf.startswith("layers/") and is_factor and "experts" not in spec.axes


def laid_apart(
    specs: Params,
    whole: Callable[[str], Any],
    layers: Callable[[str], Iterable[Any]],
    at: str = "",
) -> Params:
    """Parameters of which what can lies apart.

    Args:
      specs: of `ParamSpec`, as `param_specs` gives.
      whole: makes a parameter, named by its path.
      layers: makes one, layer by layer.
      at: the path of `specs`, and a slash.
    """
    laid: Params = {}
    for name, spec in specs.items():
        leaf = f"{at}{name}"
        if isinstance(spec, dict):
            laid[name] = laid_apart(spec, whole, layers, f"{leaf}/")
        elif not isinstance(spec, ParamSpec):
            laid[name] = spec
        elif not may_lie_apart(leaf, spec):
            laid[name] = whole(leaf)
        else:
            among = (x for x, parts in JOINED.items() if name in parts and specs.keys() >= {*parts})
            one = next(among, name)
            if one not in laid:
                parts = JOINED.get(one, (name,))
                laid[one] = _in_one([layers(f"{at}{part}") for part in parts], name in INPUT_FIRST)
    return laid


def _in_one(parts: Sequence[Iterable[Any]], is_turned: bool) -> Apart:
    """Each layer of some parameters in an array, first axes behind each other, maybe turned."""
    arrays = []
    for of_layer in zip(*parts, strict=True):
        if is_turned:
            of_layer = tuple(x.transpose(x.ndim - 1, *range(x.ndim - 1)) for x in of_layer)
        sizes = tuple(x.shape[0] for x in of_layer)
        arrays.append(jnp.concatenate(of_layer) if len(parts) > 1 else jnp.asarray(of_layer[0]))
    return Apart(tuple(arrays), is_turned, sizes if len(parts) > 1 else ())


def parted(params: Params) -> Params:
    """Parameters as `param_specs` names them: what was joined is views of it, on the host."""
    found: Params = {}
    for name, x in params.items():
        if name in JOINED and is_apart(x):
            ends = np.cumsum(x.sizes)[:-1]
            each = zip(*(np.split(np.asarray(layer), ends) for layer in x.layers), strict=True)
            whose = zip(JOINED[name], each, strict=True)
            found |= {part: Apart(tuple(layers), x.is_turned) for part, layers in whose}
        else:
            found[name] = parted(x) if isinstance(x, dict) else x
    return found


def is_faster_apart(cfg: ModelConfig) -> bool:
    """Whether this process decodes faster if what can lies apart, see `Apart`.

    It does on a CPU, if a layer has too many weights for its copy to stay near: `APART_BYTES`.
    """
    specs = jax.tree_util.tree_leaves_with_path(param_specs(cfg))
    named = ((jax.tree_util.keystr(path, simple=True, separator="/"), spec) for path, spec in specs)
    of_all = sum(math.prod(spec.shape) for leaf, spec in named if may_lie_apart(leaf, spec))
    of_one = of_all // cfg.n_layers * cfg.jnp_dtype.itemsize
    return jax.default_backend() == "cpu" and of_one >= APART_BYTES


def apart(params: Params, cfg: ModelConfig) -> Params:
    """Parameters as `param_specs(cfg)` of which what can lies apart, on one device."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
    return laid_apart(param_specs(cfg), named.__getitem__, named.__getitem__)


def num_params(cfg: ModelConfig) -> int:
    """Number of parameters, embeddings included."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(param_specs(cfg)))


def num_expert_params(cfg: ModelConfig) -> int:
    """Number of parameters of experts that a router chooses among; every token uses k / E of it."""
    if cfg.experts is None:
        return 0
    of_one = 3 * cfg.d_model * cfg.experts.d_ff
    return of_one * cfg.experts.num_experts * len(cfg.stacks.get("experts", ()))


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
      dtype: of the parameters, but for those that have one of their own.
    """

    def init(path: jax.tree_util.KeyPath, spec: ParamSpec) -> jax.Array:
        if spec.stddev is None:
            return jnp.full(spec.shape, spec.fill, spec.dtype or dtype)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return (spec.stddev * jax.random.normal(leaf_key, spec.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(init, specs)


def cast_params(params: Params, cfg: ModelConfig) -> Params:
    """Parameters of a model in `cfg.dtype`, but for those that have a dtype of their own."""
    return jax.tree.map(
        lambda spec, x: x.astype(spec.dtype or cfg.jnp_dtype), param_specs(cfg), params
    )


def abstract_params(cfg: ModelConfig, mesh: Mesh | None = None, rules: Rules = RULES) -> Params:
    """`jax.ShapeDtypeStruct` per parameter; with a mesh, each carries its sharding."""
    return abstract_from_specs(param_specs(cfg), cfg.jnp_dtype, mesh, rules)


def abstract_from_specs(
    specs: Params, dtype: DTypeLike, mesh: Mesh | None = None, rules: Rules = RULES
) -> Params:
    """As `abstract_params`, of any tree of `ParamSpec`."""
    shardings = spec_shardings(specs, mesh, rules) if mesh is not None else None

    def abstract(spec: ParamSpec, sharding: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype or dtype, sharding=sharding)

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
