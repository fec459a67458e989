"""Draft networks in the layout of the public codes: safetensors, matrices output-first.

Names are a dict from our path of a parameter to the tensor's.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.typing import DTypeLike

from dlm.hf.files import SINGLE, open_tensors
from dlm.params import Params

_OUTPUT_FIRST = ("fc", "attention/o", "mlp/gate", "mlp/up", "mlp/down")


def published_layer(prefix: str) -> dict[str, str]:
    """Names of a decoder layer's tensors, by ours; norms before attention are another matter."""
    names = {f"attention/{x}": f"{prefix}.self_attn.{x}_proj.weight" for x in "qkvo"}
    names |= {f"mlp/{x}": f"{prefix}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    return names | {"mlp_norm": f"{prefix}.post_attention_layernorm.weight"}


def read_published(path: str | pathlib.Path, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """All tensors of a directory, by our names where they have one.

    Raises:
      FileNotFoundError: there are none.
      ValueError: one of `names` is missing.
    """
    with contextlib.ExitStack() as stack:
        files = open_tensors(pathlib.Path(path), stack)
        if missing := sorted(set(names.values()) - set(files)):
            raise ValueError(f"{path} does not hold such a network: {missing[0]} is missing")
        ours = {theirs: name for name, theirs in names.items()}
        return {ours.get(theirs, theirs): x[:] for theirs, x in files.items()}


def from_published(
    path: str | pathlib.Path,
    stored: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    specs: Params,
    dtype: DTypeLike,
) -> Params:
    """Parameters as `specs`; ValueError if a tensor has not as many numbers."""
    leaves = []
    expected, structure = jax.tree_util.tree_flatten_with_path(specs)
    for at, spec in expected:
        name = jax.tree_util.keystr(at, simple=True, separator="/")
        x = stored[name]
        x = x.T if name.endswith(_OUTPUT_FIRST) else x
        merged = (int(np.prod(spec.shape[:-1])), spec.shape[-1])
        if x.shape not in (spec.shape, merged):
            raise ValueError(
                f"{path}: {names[name]} of shape {list(stored[name].shape)} must have the "
                f"numbers of {list(spec.shape)} to go with this target"
            )
        leaves.append(jnp.asarray(x.reshape(spec.shape), dtype))
    return jax.tree.unflatten(structure, leaves)


def to_published(own: Params, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The tensors of a file, by name."""
    tensors = {}
    for at, leaf in jax.tree_util.tree_flatten_with_path(own)[0]:
        name = jax.tree_util.keystr(at, simple=True, separator="/")
        x = np.asarray(leaf)
        x = x.reshape(-1, x.shape[-1]) if x.ndim == 3 else x
        tensors[names[name]] = np.ascontiguousarray(x.T if name.endswith(_OUTPUT_FIRST) else x)
    return tensors


def write_published(path: str | pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one file into a folder, made if needed."""
    root = pathlib.Path(path)
    root.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, root / SINGLE)
