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
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dlm import lm as lm_lib
from dlm.config import ModelConfig
from dlm.hf.files import format_for
from dlm.hf.format import Stored
from dlm.params import Apart, LowRank, Params, ParamSpec
from dlm.trainable import Learned, Trainable

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
_OUTPUT_FIRST = ("q", "k", "v")  # how their weights are stored, see `param_specs`


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
        """The model as parameters for a forward that multiplies by both: targets are `LowRank`.

        Args:
          cfg: the model.
          frozen: has it.
          own: as `specs`; cast to the dtype of what it changes.
        """

        def both(target: str, weight: jax.Array | Apart, change: Params) -> LowRank:
            cast = jax.tree.map(lambda x: x.astype(weight.dtype), change)
            return LowRank(weight, cast["down"], cast["up"], self.scale)

        return frozen.replace(target=self._replace(frozen.target, own, both))

    def merge(self, params: Params, delta: Params) -> Params:
        """Parameters of a plain model: the change is added in float32, then rounded."""

        def add(target: str, weight: jax.Array | Apart, change: Params) -> jax.Array | Apart:
            if isinstance(weight, Apart):
                of_layers = zip(weight.layers, change["down"], change["up"], strict=True)
                return Apart(
                    tuple(sum_up(target, w, {"down": down, "up": up}) for w, down, up in of_layers)
                )
            return sum_up(target, weight, change)

        def sum_up(target: str, weight: jax.Array, change: Params) -> jax.Array:
            down, up = (change[name].astype(jnp.float32) for name in ("down", "up"))
            product = self.scale * jnp.matmul(down, up, precision="highest")  # [..., I, O]
            if target in _OUTPUT_FIRST:
                product = product.swapaxes(-1, -2)
            wide = jnp.promote_types(weight.dtype, jnp.float32)
            return (weight.astype(wide) + product.reshape(weight.shape)).astype(weight.dtype)

        return self._replace(params, delta, add)

    def _replace(
        self, params: Params, own: Params, new: Callable[[str, jax.Array | Apart, Params], Any]
    ) -> Params:
        def of_stack(layers: Params, own: Params) -> Params:
            return {
                name: {
                    leaf: new(leaf, weight, own[leaf]) if leaf in self.targets else weight
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
    safetensors.numpy.save_file(tensors, root / _TENSORS, metadata={"format": "pt"})
    (root / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
    config = json.loads((root / _CONFIG).read_text(encoding="utf-8"))
    plain = {
        "peft_type": "LORA",
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,  # another scale
    }
    for key, wanted in plain.items():
        if config.get(key, wanted) != wanted:
            raise ValueError(f"{root / _CONFIG}: {key}={config[key]!r} must be {wanted!r}")
    tensors = safetensors.numpy.load_file(root / _TENSORS)
    modules = {
        name: parts
        for name, parts in _modules(cfg, TARGETS).items()
        if f"{_PREFIX}{name.format(0)}.lora_A.weight" in tensors
    }
    ranks = _ranks(root / _CONFIG, config, modules)
    rank = max([config["r"], *ranks.values()])
    targets = tuple(t for t in TARGETS if any(t in parts for parts in modules.values()))
    alpha = config["lora_alpha"] * (rank / config["r"])
    lora = Lora(rank=rank, alpha=alpha, targets=targets)
    read = set()

    def matrix(name: str, letter: str, shape: tuple[int, ...]) -> np.ndarray:
        name = f"{name}.lora_{letter}.weight"
        if name not in tensors or tensors[name].shape != shape:
            found = "missing" if name not in tensors else list(tensors[name].shape)
            raise ValueError(f"{root / _TENSORS}: {name} is {found} and must be {list(shape)}")
        read.add(name)
        return tensors[name].astype(np.float32)

    def stack(
        name: str, target: str, stored: Stored, layers: Sequence[int], spec: Params
    ) -> Params:
        down, up = (np.zeros(spec[side].shape, np.float32) for side in ("down", "up"))
        own, start = ranks[name], stored.start(cfg)
        for row, layer in enumerate(layers):
            module = _PREFIX + name.format(layer)
            a = matrix(module, "A", (own, down.shape[1]))
            b = matrix(module, "B", (_num_out(target, stored, cfg), own))
            down[row, :, :own] = a.T
            up[row, :own] = b[start : start + up.shape[2]].T
        return {"down": jnp.asarray(down), "up": jnp.asarray(up)}

    specs, delta = lora.specs(cfg), {}
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
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    found = {name: ranks.get(_last(name), config["r"]) for name in modules}
    known = set(map(_last, modules))
    scales = {alphas.get(_last(name), config["lora_alpha"]) / found[name] for name in modules}
    if not known.issuperset({*ranks, *alphas}) or scales - {config["lora_alpha"] / config["r"]}:
        raise ValueError(
            f"{file}: alpha_pattern={alphas} and rank_pattern={ranks} must be of modules "
            f"{sorted(known)} and leave alpha / r={config['lora_alpha'] / config['r']:g} as it is"
        )
    return found


def _num_out(target: str, stored: Stored, cfg: ModelConfig) -> int:
    """Rows of B: numbers that come out of a module."""
    num_in = {"o": "nh", "down": "f"}.get(target, "d")
    return stored.shape(cfg)[1 - stored.stored.index(num_in)]


def _last(module: str) -> str:
    return module.rsplit(".", 1)[1]
