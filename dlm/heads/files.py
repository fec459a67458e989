"""Draft heads on disk: a JSON file with what they are, and safetensors."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dlm.hf.files import MOST_LAYERS, instead, read_tensors
from dlm.json_lines import read_json
from dlm.lm import LanguageModel, fingerprint
from dlm.params import Params
from dlm.trainable import Trainable
from dlm.written import write_json, write_tensors

_CONFIG, _WEIGHTS = "heads.json", "heads.safetensors"
Kind = TypeVar("Kind")


@dataclasses.dataclass(frozen=True)
class Heads(Trainable):
    """What all draft heads are as a `train.trainable`: something beside a model."""

    def export(self, folder: pathlib.Path, lm: LanguageModel, own: Params) -> None:
        """Writes `folder/model`, for the module's `load`."""
        save(folder / "model", self, lm, own)


def save(path: str | pathlib.Path, heads: Heads, lm: LanguageModel, own: Params) -> None:
    """Writes heads into a folder, made if needed, with the fingerprint of their model.

    Args:
      path: the folder.
      heads: what they are.
      lm: the model that they were trained for.
      own: their parameters.
    """
    root = pathlib.Path(path)
    root.mkdir(parents=True, exist_ok=True)
    flat = {
        jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(leaf)
        for p, leaf in jax.tree_util.tree_flatten_with_path(own)[0]
    }
    write_tensors(root / _WEIGHTS, flat)
    config = {"kind": type(heads).__name__, **dataclasses.asdict(heads), "model": fingerprint(lm)}
    write_json(root / _CONFIG, config)


def load(path: str | pathlib.Path, kind: type[Kind], lm: LanguageModel) -> tuple[Kind, Params]:
    """Reads what `save` wrote.

    Args:
      path: the folder.
      kind: of heads that are expected.
      lm: the model that they are to be used with.

    Raises:
      FileNotFoundError: there are none.
      ValueError: they are of another kind, of another model, or broken.
    """
    root = pathlib.Path(path)
    if not (root / _CONFIG).is_file():
        raise FileNotFoundError(
            f"{root / _CONFIG} is missing: {root} holds no draft heads of a run{instead(root)}"
        )
    config = read_json(root / _CONFIG)
    found, model = config.pop("kind", None), config.pop("model", None)
    if found != kind.__name__:
        raise ValueError(f"{root} holds {found}, not {kind.__name__}")
    if model != fingerprint(lm):
        raise ValueError(
            f"the heads in {root} were trained for model {model}, and this one is "
            f"{fingerprint(lm)}: train heads for it"
        )
    for name, value in config.items():
        if name.startswith(("n_", "num_")) and isinstance(value, int) and value > MOST_LAYERS:
            raise ValueError(
                f"{root / _CONFIG}: {name}={value!r:.60} must be at most {MOST_LAYERS}"
            )
    try:
        heads: Any = kind(**config)
        specs = heads.specs(lm.cfg)
    except (OverflowError, TypeError, ValueError) as error:  # no such field, or no such size
        raise ValueError(f"{root / _CONFIG} does not say what {found} are: {error}") from error
    flat = read_tensors(root / _WEIGHTS)
    expected, structure = jax.tree_util.tree_flatten_with_path(specs)
    leaves = []
    for p, spec in expected:
        name = jax.tree_util.keystr(p, simple=True, separator="/")
        if name not in flat or flat[name].shape != spec.shape:
            shape = flat[name].shape if name in flat else None
            raise ValueError(f"{root / _WEIGHTS}: {name} of shape {shape} must be {spec.shape}")
        leaves.append(jnp.asarray(flat[name], lm.cfg.jnp_dtype))
    return heads, jax.tree.unflatten(structure, leaves)
