"""Low-rank changes of a model's weights, trained instead of them.

Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685. A
weight W becomes W + (alpha / r) down @ up, with `down` random and `up` zero at first, so training
starts from the model itself. The model's own parameters are never touched.

The change is a pytree of its own. `Lora.attach` puts it beside the weights for a forward that
multiplies by both; `Lora.merge` adds it to them. On disk it has PEFT's format,
`adapter_config.json` and `adapter_model.safetensors`.

Letters: L layers, I and O the flattened input and output axes of a weight, r rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dlm import lm as lm_lib
from dlm.config import ModelConfig
from dlm.hf.files import format_for, read_tensors
from dlm.hf.format import Stored
from dlm.hf.keys import LARGEST
from dlm.json_lines import read_json
from dlm.params import INPUT_FIRST, JOINED, Apart, LowRank, Params, ParamSpec
from dlm.trainable import Learned, Trainable
from dlm.written import write_json, write_tensors

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
_INPUTS = {"o": "nh", "down": "f"}  # letters of what goes in; "d" of others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Trainable):
    """Which weights get a change, and how large it may be.

    Attributes:
      rank: r >= 1.
      alpha: > 0; the change is multiplied by alpha / rank.
      targets: weights of every layer, among `TARGETS`.
    """

    is_model: ClassVar[bool] = True

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r} must be a whole number of at least 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha!r} must be positive")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            what = repr(unknown[0]) if unknown else "nothing"
            raise ValueError(f"targets has {what}; it may have {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def specs(self, cfg: ModelConfig) -> Params:
        """{target: {"down": [L, I, r], "up": [L, r, O]}} of `ParamSpec`.

        One of these for every stack of layers, by its name, where a model has several. The rank is
        split where neither other axis is, so that nothing lies whole on a device.

        Raises:
          ValueError: the MLPs of the model are experts, or have no gate, and are targets.
        """
        absent = TARGETS[4:] if "experts" in cfg.stacks else () if cfg.gated else ("gate",)
        if missing := [target for target in self.targets if target in absent]:
            why = "experts" if "experts" in cfg.stacks else "without a gate"
            left = ", ".join(target for target in TARGETS if target not in absent)
            raise ValueError(
                f"targets has {missing[0]!r}, but MLPs of the model are {why}: name some of {left}"
            )
        D, width = (cfg.d_model, "embed"), (cfg.d_ff, "ffn")
        heads = (cfg.n_heads * cfg.head_dim, "heads")
        kv_heads = (cfg.n_kv_heads * cfg.head_dim, "kv_heads")
        sides = {
            "q": (D, heads),
            "k": (D, kv_heads),
            "v": (D, kv_heads),
            "o": (heads, D),
            "gate": (D, width),
            "up": (D, width),
            "down": (width, D),
        }

        def spec(target: str, L: int) -> Params:
            (num_in, axis_in), (num_out, axis_out) = sides[target]
            r = self.rank
            return {
                "down": ParamSpec((L, num_in, r), ("layers", axis_in, "rank"), num_in**-0.5),
                "up": ParamSpec((L, r, num_out), ("layers", "rank", axis_out)),
            }

        each = {
            kind: {target: spec(target, len(layers)) for target in self.targets}
            for kind, layers in cfg.stacks.items()
        }
        return each if len(each) > 1 else next(iter(each.values()))

    def attach(self, cfg: ModelConfig, frozen: Learned, own: Params) -> Learned:
        """The model with the change beside its weights."""
        return frozen.replace(target=self.beside_weights(frozen.target, own))

    def beside_weights(self, params: Params, own: Params, first: int = 0) -> Params:
        """Parameters for a forward that multiplies by both: targets are `LowRank`.

        Args:
          params: of the model.
          own: as `specs`; cast to the dtype of what it changes.
          first: positions of a window before this one are multiplied by the model's weights alone.
        """

        def both(_: bool, weight: jax.Array, down: jax.Array, up: jax.Array) -> LowRank:
            down, up = (x.astype(weight.dtype) for x in (down, up))
            return LowRank(weight, down, up, self.scale, first)

        return self._replace(params, own, both)

    def merge(self, params: Params, delta: Params) -> Params:
        """Parameters of a plain model: the change is added in float32, then rounded."""

        def add(
            is_input_first: bool, weight: jax.Array, down: jax.Array, up: jax.Array
        ) -> jax.Array:
            down, up = (x.astype(jnp.float32) for x in (down, up))
            product = self.scale * jnp.matmul(down, up, precision="highest")  # [..., I, O]
            if not is_input_first:
                product = product.swapaxes(-1, -2)
            wide = jnp.promote_types(weight.dtype, jnp.float32)
            return (weight.astype(wide) + product.reshape(weight.shape)).astype(weight.dtype)

        return self._replace(params, delta, add)

    def _replace(self, params: Params, own: Params, new: Callable[..., Any]) -> Params:
        """Targets become `new(is_input_first, weight, down, up)`, by layer where they lie apart."""

        def of_leaf(leaf: str, weight: jax.Array | Apart, own: Params) -> Any:
            if not isinstance(weight, Apart):
                return new(leaf in INPUT_FIRST, weight, own[leaf]["down"], own[leaf]["up"])
            of_layer = functools.partial(new, leaf in INPUT_FIRST and not weight.is_turned)
            each = zip(weight.layers, _sides(leaf, weight, own), strict=True)
            return weight.replace(layers=tuple(of_layer(x, *change) for x, change in each))

        def of_stack(layers: Params, own: Params) -> Params:
            return {
                name: {
                    leaf: of_leaf(leaf, weight, own)
                    if any(part in self.targets for part in JOINED.get(leaf, (leaf,)))
                    else weight
                    for leaf, weight in group.items()
                }
                if isinstance(group, dict)
                else group
                for name, group in layers.items()
            }

        layers = params["layers"]
        if "attention" in layers:
            return {**params, "layers": of_stack(layers, own)}
        replaced = {kind: of_stack(stack, own[kind]) for kind, stack in layers.items()}
        return {**params, "layers": replaced}

    def export(self, folder: pathlib.Path, lm: lm_lib.LanguageModel, own: Params) -> None:
        """Writes `folder/adapter`, and the model it makes of `lm`, merged, as `folder/model`."""
        save(folder / "adapter", self, own, lm.cfg)
        merged = jax.jit(self.merge)(lm.params, own)
        lm_lib.save(folder / "model", dataclasses.replace(lm, params=merged))


def laid_apart(params: Params, own: Params) -> Params:
    """A change, as `Lora.specs`, for parameters that lie apart: by layer, joined where they are.

    Put beside them inside a loop it need not be joined in every round.
    """
    if "attention" not in params["layers"]:
        return {kind: _of_stack_apart(params["layers"][kind], own[kind]) for kind in own}
    return _of_stack_apart(params["layers"], own)


def _of_stack_apart(layers: Params, own: Params) -> Params:
    weights = layers["attention"] | layers.get("mlp", {})
    changed = [leaf for leaf in weights if any(part in own for part in JOINED.get(leaf, (leaf,)))]
    laid: Params = {}
    for leaf in changed:
        downs, ups = zip(*_sides(leaf, weights[leaf], own), strict=True)
        laid[leaf] = {"down": Apart(downs), "up": Apart(ups)}
    return laid


def _sides(leaf: str, weight: Apart, own: Params) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Layer by layer, "down" [I, n r] and "up" [n r, O] of a weight that is n targets, and others.

    Each target has its own columns of the one and, alone in its columns, rows of the other.
    """
    if leaf in own:
        yield from zip(own[leaf]["down"], own[leaf]["up"], strict=True)
        return
    parts = JOINED[leaf]
    width = math.prod(weight.layers[0].shape[1:-1])
    *begins, num_out = [width * int(size) for size in np.cumsum((0, *weight.sizes))]
    changed = {part: begin for part, begin in zip(parts, begins, strict=True) if part in own}
    sides = (zip(own[part]["down"], own[part]["up"], strict=True) for part in changed)
    for of_layer in zip(*sides, strict=True):
        downs, ups = zip(*of_layer, strict=True)
        wide = [
            jnp.pad(up, ((0, 0), (begin, num_out - begin - up.shape[-1])))
            for up, begin in zip(ups, changed.values(), strict=True)
        ]
        yield jnp.concatenate(downs, axis=-1), jnp.concatenate(wide)


def save(path: str | os.PathLike[str], lora: Lora, delta: Params, cfg: ModelConfig) -> None:
    """Writes a change in PEFT's format.

    Args:
      path: a folder, made if needed; an adapter in it is replaced.
      lora: what `delta` is.
      delta: as `lora.specs(cfg)`.
      cfg: the model it changes; tensors get the names of its published format.
    """
    modules = _modules(cfg, lora.targets)
    tensors: dict[str, np.ndarray] = {}
    for kind, layers in cfg.stacks.items():
        own = delta[kind] if len(cfg.stacks) > 1 else delta
        for name, parts in modules.items():
            changes = [
                (
                    stored,
                    np.asarray(own[target]["down"], np.float32),
                    np.asarray(own[target]["up"], np.float32),
                )
                for target, stored in parts.items()
            ]
            num_out = _num_out(*next(iter(parts.items())), cfg)
            for row, layer in enumerate(layers):
                module = _PREFIX + name.format(layer)
                # Of several parts of one matrix each has its own rows of A and block of B.
                a = np.ascontiguousarray(np.concatenate([down[row].T for _, down, _ in changes]))
                b = np.zeros((num_out, len(a)), np.float32)
                for i, (stored, _, up) in enumerate(changes):
                    start, rank = stored.start(cfg), up.shape[1]
                    b[start : start + up.shape[2], i * rank : (i + 1) * rank] = up[row].T
                tensors[f"{module}.lora_A.weight"] = a
                tensors[f"{module}.lora_B.weight"] = b
    several = {_last(name): len(parts) for name, parts in modules.items() if len(parts) > 1}
    root = pathlib.Path(path)
    root.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "rank_pattern": {name: num * lora.rank for name, num in several.items()},
        "alpha_pattern": {name: num * lora.alpha for name, num in several.items()},
        "target_modules": list(map(_last, modules)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_tensors(root / _TENSORS, tensors, metadata={"format": "pt"})
    write_json(root / _CONFIG, config)


def load(path: str | os.PathLike[str], cfg: ModelConfig) -> tuple[Lora, Params]:
    """Reads a change in PEFT's format.

    Args:
      path: a folder that `save` or PEFT wrote.
      cfg: the model it changes.

    Returns:
      What it is, and float32 parameters as `Lora.specs(cfg)`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: it changes something else than the weights here can, or another model.
    """
    root = pathlib.Path(path)
    config = _read_config(root / _CONFIG)
    tensors = read_tensors(root / _TENSORS)
    modules = {
        name: parts
        for name, parts in _modules(cfg, TARGETS).items()
        if f"{_PREFIX}{name.format(0)}.lora_A.weight" in tensors
    }
    ranks = _ranks(root / _CONFIG, config, modules)
    rank = max(ranks.values(), default=config["r"])
    targets = tuple(t for t in TARGETS if any(t in parts for parts in modules.values()))
    alpha = config["lora_alpha"] * (rank / config["r"])
    try:
        lora = Lora(rank=rank, alpha=alpha, targets=targets)
    except ValueError as error:
        names = ", ".join(sorted(tensors)[:3])
        raise ValueError(
            f"{root} changes no weights that can be: {error}; it has {names}"
        ) from error
    read = set()

    def matrix(name: str, letter: str, shape: tuple[int, ...]) -> np.ndarray:
        name = f"{name}.lora_{letter}.weight"
        if name not in tensors or tensors[name].shape != shape:
            found = "missing" if name not in tensors else list(tensors[name].shape)
            raise ValueError(f"{root / _TENSORS}: {name} is {found} and must be {list(shape)}")
        read.add(name)
        return tensors[name].astype(np.float32)

    specs, delta = lora.specs(cfg), {}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, parts in modules.items():  # all are there before memory is taken for them
        target, stored = next(iter(parts.items()))
        num_in, num_out = _num_in(target, stored, cfg), _num_out(target, stored, cfg)
        for layer in range(cfg.n_layers):
            module, own = _PREFIX + name.format(layer), ranks[name]
            a = matrix(module, "A", (own, num_in))
            found[name.format(layer)] = a, matrix(module, "B", (num_out, own))

    def stack(
        name: str, target: str, stored: Stored, layers: Sequence[int], spec: Params
    ) -> Params:
        down, up = (np.zeros(spec[side].shape, np.float32) for side in ("down", "up"))
        own, start = ranks[name], stored.start(cfg)
        for row, layer in enumerate(layers):
            a, b = found[name.format(layer)]
            down[row, :, :own] = a.T
            up[row, :own] = b[start : start + up.shape[2]].T
        return {"down": jnp.asarray(down), "up": jnp.asarray(up)}

    for kind, layers in cfg.stacks.items():
        of_kind = specs[kind] if len(cfg.stacks) > 1 else specs
        delta[kind] = {
            target: stack(name, target, stored, layers, of_kind[target])
            for name, parts in modules.items()
            for target, stored in parts.items()
        }
    if unread := sorted(set(tensors) - read):
        raise ValueError(f"{root / _TENSORS}: {unread[0]} changes nothing of this model")
    return lora, delta if len(delta) > 1 else delta[next(iter(delta))]


_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Keys of adapter_config.json that count, and what is implemented; null counts as absent. The last
# one: with others, such as "pissa", the model's own weights were changed before training.
_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "use_rslora": (False,),  # another scale
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "layer_replication": (),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "megatron_config": (),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
_READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
# What changes nothing, or shows in the tensors, of which each must be read.
_HARMLESS = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
]


def _read_config(file: pathlib.Path) -> dict[str, Any]:
    """adapter_config.json, without keys that are null."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {file.parent} holds no adapter")
    config = {key: value for key, value in read_json(file).items() if value is not None}
    for key, value in config.items():
        if key in _FIXED and value not in _FIXED[key]:
            right = " or ".join(map(repr, _FIXED[key])) or "absent"
            raise ValueError(f"{file}: {key}={value!r:.60} must be {right}")
        if key not in (*_FIXED, *_READ, *_HARMLESS):
            raise ValueError(
                f"{file}: {key}={value!r:.60} is not known here and may change what the adapter "
                "does; without effect, take it out"
            )
    patterns = [config.setdefault(key, {}) for key in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise ValueError(f"{file}: rank_pattern and alpha_pattern must be objects")
    ranks = [config.get("r"), *patterns[0].values()]
    alphas = [config.get("lora_alpha"), *patterns[1].values()]
    if not all(type(rank) is int and 0 < rank <= LARGEST for rank in ranks):
        raise ValueError(
            f"{file}: r and entries of rank_pattern are {ranks!r:.60}, not integers above 0"
        )
    if not all(type(alpha) in (int, float) and 0 < alpha <= LARGEST for alpha in alphas):
        raise ValueError(
            f"{file}: lora_alpha and entries of alpha_pattern are {alphas!r:.60}, not numbers "
            "above 0"
        )
    return config


def _modules(cfg: ModelConfig, targets: Sequence[str]) -> dict[str, dict[str, Stored]]:
    """Modules of the published format, "{}" standing for the layer, and the targets in each."""
    form = format_for(cfg)
    modules: dict[str, dict[str, Stored]] = {}
    for target in targets:
        group = "attention" if target in TARGETS[:4] else "mlp"
        if (stored := form.tensors.get(f"layers/{group}/{target}")) is not None:
            modules.setdefault(stored.name.removesuffix(".weight"), {})[target] = stored
    return modules


def _ranks(file: pathlib.Path, config: dict[str, Any], modules: Iterable[str]) -> dict[str, int]:
    """Of each module; ValueError unless alpha / r is the same for all."""
    ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
    found = {name: ranks.get(_last(name), config["r"]) for name in modules}
    known = set(map(_last, modules))
    scales = {alphas.get(_last(name), config["lora_alpha"]) / found[name] for name in modules}
    if not known.issuperset({*ranks, *alphas}) or scales - {config["lora_alpha"] / config["r"]}:
        raise ValueError(
            f"{file}: alpha_pattern={alphas} and rank_pattern={ranks} must be of modules "
            f"{sorted(known)} and leave alpha / r={config['lora_alpha'] / config['r']:g} as it is"
        )
    return found


def _num_in(target: str, stored: Stored, cfg: ModelConfig) -> int:
    """Columns of A: numbers that go into a module."""
    return stored.shape(cfg)[stored.stored.index(_INPUTS.get(target, "d"))]


def _num_out(target: str, stored: Stored, cfg: ModelConfig) -> int:
    """Rows of B: numbers that come out of a module."""
    return stored.shape(cfg)[1 - stored.stored.index(_INPUTS.get(target, "d"))]


def _last(module: str) -> str:
    return module.rsplit(".", 1)[1]
