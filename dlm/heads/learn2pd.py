"""Learn2PD's filter: which proposals of a block to keep, judged by the block's confidences.

Reference: Bao et al., "Learning to Parallel: Accelerating Diffusion Large Language Models via
Learnable Parallel Decoding", arXiv:2509.25188, Sec. 3.2. Two layers, 2 (C^2 + C) parameters:

    h = relu(W1 c + b1)        o = W2 h + b2        keep_i = sigmoid(o_i) > tau

c [C] holds the confidences of a block of C positions: committed ones too, with the probability that
the model gives its own arg-max there now; positions that do not exist are 0. Weights are stored
input-first, float32.

A filter fits the model, the block length and the confidence it was trained with, and no other.
"""

from __future__ import annotations

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlm.hf import keys
from dlm.hf.files import read_tensors
from dlm.json_lines import read_json
from dlm.lm import LanguageModel, fingerprint
from dlm.params import Params, ParamSpec, init_from_specs
from dlm.written import write_json, write_tensors

_WEIGHTS, _CONFIG = "filter.safetensors", "filter.json"


class Filter(struct.PyTreeNode):
    """A filter and what it belongs to.

    Attributes:
      w1: [C, C] float32.
      b1: [C] float32.
      w2: [C, C] float32.
      b2: [C] float32.
      model: `dlm.lm.fingerprint` of the model; "": of any. Static.
      confidence: name of the confidence component. Static.
    """

    w1: jax.Array
    b1: jax.Array
    w2: jax.Array
    b2: jax.Array
    model: str = struct.field(pytree_node=False, default="")
    confidence: str = struct.field(pytree_node=False, default="Probability")

    @property
    def block_len(self) -> int:
        """C."""
        return self.b1.shape[0]

    def logits(self, confidence: jax.Array) -> jax.Array:
        """o [..., C] of confidences [..., C] in [0, 1], both float32."""
        rows = confidence.reshape(-1, self.block_len)
        hidden = jax.nn.relu(rows @ self.w1 + self.b1[None])
        return (hidden @ self.w2 + self.b2[None]).reshape(confidence.shape)


def filter_specs(block_len: int) -> Params:
    """`ParamSpec`s of w1, b1, w2 and b2.

    Fresh ones have the variance of the public code's linear layers, 1 / (3 C), but are normal where
    those are uniform.

    Raises:
      ValueError: there is no such block.
    """
    if block_len < 1:
        raise ValueError(f"block_len={block_len} must be at least 1")
    stddev = (3 * block_len) ** -0.5
    matrix = ParamSpec((block_len, block_len), (None, None), stddev)
    bias = ParamSpec((block_len,), (None,), stddev)
    return {"w1": matrix, "b1": bias, "w2": matrix, "b2": bias}


def init_filter(key: jax.Array, block_len: int, model: str = "") -> Filter:
    """A fresh filter, see `filter_specs`."""
    return Filter(**init_from_specs(key, filter_specs(block_len), jnp.float32), model=model)


def save_filter(path: str | os.PathLike[str], filter: Filter) -> None:
    """Writes filter.safetensors and filter.json into a folder, made if needed."""
    root = pathlib.Path(path)
    root.mkdir(parents=True, exist_ok=True)
    weights = {name: np.asarray(getattr(filter, name)) for name in filter_specs(filter.block_len)}
    write_tensors(root / _WEIGHTS, weights)
    config = {
        "block_len": filter.block_len,
        "model": filter.model,
        "confidence": filter.confidence,
    }
    write_json(root / _CONFIG, config)


def load_filter(path: str | os.PathLike[str], lm: LanguageModel | None) -> Filter:
    """Reads what `save_filter` wrote.

    Args:
      path: the folder.
      lm: the model it is to be used with; None: not checked.

    Raises:
      FileNotFoundError: there is no filter.
      ValueError: it is broken, or belongs to another model.
    """
    root = pathlib.Path(path)
    if not (root / _CONFIG).is_file():
        raise FileNotFoundError(f"{root / _CONFIG} is missing: {root} holds no filter")
    config = read_json(root / _CONFIG)
    kinds = {"block_len": int, "model": str, "confidence": str}
    if {name: type(value) for name, value in config.items()} != kinds:
        raise ValueError(f"{root / _CONFIG} must say {', '.join(kinds)}, and nothing else")
    weights = read_tensors(root / _WEIGHTS)
    try:
        specs = filter_specs(keys.required(config, "block_len"))
    except ValueError as error:
        raise ValueError(f"{root / _CONFIG}: {error}") from error
    for name, spec in specs.items():
        found = weights[name].shape if name in weights else None
        if found != spec.shape:
            raise ValueError(f"{root / _WEIGHTS}: {name} of shape {found} must be {spec.shape}")
    if unknown := sorted(set(weights) - set(specs)):
        raise ValueError(f"{root / _WEIGHTS}: {unknown[0]} is no part of a filter")
    if lm is not None and config["model"] and config["model"] != fingerprint(lm):
        raise ValueError(
            f"the filter in {root} belongs to model {config['model']}, and this one is "
            f"{fingerprint(lm)}: train a filter for it"
        )
    return Filter(
        **{name: jnp.asarray(value) for name, value in weights.items()},
        model=config["model"],
        confidence=config["confidence"],
    )
