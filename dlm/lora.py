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
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dlm import lm as lm_lib
from dlm.config import ModelConfig
from dlm.hf.files import format_for
from dlm.params import LowRank, Params, ParamSpec
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

        The rank is split where neither other axis is, so that nothing lies whole on a device.
        """
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

        def spec(target: str) -> Params:
            (num_in, axis_in), (num_out, axis_out) = sides[target]
            L, r = cfg.n_layers, self.rank
            return {
                "down": ParamSpec((L, num_in, r), ("layers", axis_in, "rank"), num_in**-0.5),
                "up": ParamSpec((L, r, num_out), ("layers", "rank", axis_out)),
            }

        return {target: spec(target) for target in self.targets}

    def attach(self, cfg: ModelConfig, frozen: Learned, own: Params) -> Learned:
        """The model as parameters for a forward that multiplies by both: targets are `LowRank`.

        Args:
          cfg: the model.
          frozen: has it.
          own: as `specs`; cast to the dtype of what it changes.
        """

        def both(target: str, weight: jax.Array) -> LowRank:
            change = jax.tree.map(lambda x: x.astype(weight.dtype), own[target])
            return LowRank(weight, change["down"], change["up"], self.scale)

        return frozen.replace(target=self._replace(frozen.target, both))

    def merge(self, params: Params, delta: Params) -> Params:
        """Parameters of a plain model: the change is added in float32, then rounded."""

        def add(target: str, weight: jax.Array) -> jax.Array:
            down, up = (delta[target][name].astype(jnp.float32) for name in ("down", "up"))
            change = self.scale * jnp.matmul(down, up, precision="highest")  # [L, I, O]
            if target in _OUTPUT_FIRST:
                change = change.swapaxes(1, 2)
            wide = jnp.promote_types(weight.dtype, jnp.float32)
            return (weight.astype(wide) + change.reshape(weight.shape)).astype(weight.dtype)

        return self._replace(params, add)

    def _replace(self, params: Params, new: Callable[[str, jax.Array], Any]) -> Params:
        layers = {
            name: {
                leaf: new(leaf, weight) if leaf in self.targets else weight
                for leaf, weight in group.items()
            }
            if isinstance(group, dict)
            else group
            for name, group in params["layers"].items()
        }
        return {**params, "layers": layers}

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
    modules = _modules(cfg)
    tensors, names = {}, []
    for target in lora.targets:
        down, up = (np.asarray(delta[target][name], np.float32) for name in ("down", "up"))
        names.append(modules[target].rsplit(".", 1)[1])
        for layer in range(cfg.n_layers):
            module = _PREFIX + modules[target].format(layer)
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(down[layer].T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(up[layer].T)
    root = pathlib.Path(path)
    root.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": names,
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
        "alpha_pattern": {},  # another scale for some
    }
    for key, wanted in plain.items():
        if config.get(key, wanted) != wanted:
            raise ValueError(f"{root / _CONFIG}: {key}={config[key]!r} must be {wanted!r}")
    modules = _modules(cfg)
    tensors = safetensors.numpy.load_file(root / _TENSORS)
    targets = tuple(
        target
        for target in TARGETS
        if f"{_PREFIX}{modules[target].format(0)}.lora_A.weight" in tensors
    )
    lora = Lora(rank=config["r"], alpha=config["lora_alpha"], targets=targets)
    read = set()

    def stack(target: str, letter: str, shape: tuple[int, ...]) -> jax.Array:
        layers = []
        for layer in range(cfg.n_layers):
            name = f"{_PREFIX}{modules[target].format(layer)}.lora_{letter}.weight"
            if name not in tensors or tensors[name].T.shape != shape[1:]:
                found = "missing" if name not in tensors else list(tensors[name].shape)
                wanted = list(reversed(shape[1:]))
                raise ValueError(f"{root / _TENSORS}: {name} is {found} and must be {wanted}")
            read.add(name)
            layers.append(tensors[name].T.astype(np.float32))
        return jnp.asarray(np.stack(layers))

    delta = {
        target: {
            "down": stack(target, "A", spec["down"].shape),
            "up": stack(target, "B", spec["up"].shape),
        }
        for target, spec in lora.specs(cfg).items()
    }
    if unread := sorted(set(tensors) - read):
        raise ValueError(f"{root / _TENSORS}: {unread[0]} changes nothing of this model")
    return lora, delta


_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def _modules(cfg: ModelConfig) -> dict[str, str]:
    """Name of each target's module in the published format, "{}" standing for the layer."""
    tensors = format_for(cfg).tensors
    groups = dict.fromkeys(("q", "k", "v", "o"), "attention") | dict.fromkeys(TARGETS[4:], "mlp")
    return {
        target: tensors[f"layers/{group}/{target}"].name.removesuffix(".weight")
        for target, group in groups.items()
    }
