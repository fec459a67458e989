"""A language model as it is used: parameters, configuration and tokenizer, from one directory.

Example (from the root of the repository):
    >>> import tempfile, dlm
    >>> lm = dlm.load("tests/golden/llada_small", dtype="bfloat16")
    >>> lm.cfg.mask_token_id, lm.tokenizer
    (94, None)
    >>> dlm.save(tempfile.mkdtemp() + "/copy", lm)
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dlm.config import ModelConfig
from dlm.hf.files import read_config
from dlm.hf.gguf import load_gguf_params, read_gguf_config
from dlm.hf.gguf_file import open_gguf
from dlm.hf.gguf_tokenizer import load_gguf_tokenizer
from dlm.hf.weights import load_params, save_hf
from dlm.params import Params
from dlm.sharding import RULES, Rules
from dlm.tokenizer import Tokenizer, has_tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """What decoding and training take. Making one checks that the tokenizer fits.

    Attributes:
      params: as `param_specs(cfg)`.
      cfg: the model.
      tokenizer: None: only token ids go in and out.
      mesh: over which the parameters are spread; None: they are on one device.
    """

    params: Params = dataclasses.field(repr=False)
    cfg: ModelConfig
    tokenizer: Tokenizer | None = None
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            _check_tokenizer(self.tokenizer, self.cfg)


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> LanguageModel:
    """Loads a published model, or one that `save` wrote.

    Args:
      path: a directory with `config.json`, weights, and maybe a tokenizer; or a .gguf file.
      dtype: of the parameters, such as "bfloat16"; by default the file's.
      mesh: where to put the parameters; None: on the default device.
      rules: logical axes to mesh axes.

    Raises:
      FileNotFoundError: the directory or a file in it is missing.
      ValueError: a file is broken, the model is of an unknown kind, or the tokenizer is not its.
    """
    if pathlib.Path(path).suffix == ".gguf":
        file = open_gguf(path)
        cfg, inside = read_gguf_config(file, dtype), load_gguf_tokenizer(file)
        _check_tokenizer(inside, cfg)
        return LanguageModel(load_gguf_params(file, cfg, mesh, rules), cfg, inside, mesh)
    cfg = read_config(path, dtype)
    tokenizer = load_tokenizer(path) if has_tokenizer(path) else None
    if tokenizer is not None:
        _check_tokenizer(tokenizer, cfg)  # before the weights, which take long
    return LanguageModel(load_params(path, cfg, mesh, rules), cfg, tokenizer, mesh)


def save(path: str | os.PathLike[str], lm: LanguageModel) -> None:
    """Writes a model and its tokenizer in a published format; see `dlm.hf.weights.save_hf`.

    Args:
      path: a new or an empty directory.
      lm: the model.
    """
    save_hf(path, lm.params, lm.cfg, lm.tokenizer)


def fingerprint(lm: LanguageModel) -> str:
    """16 hexadecimal digits that tell models apart: of the configuration and of some weights.

    64 values of every parameter, rounded to bfloat16, so that the dtype it was loaded in does not
    matter; nor does where the files lie. Settings at their defaults do not count, so a setting that
    a later version adds leaves the models of today what they are.
    """
    digest = hashlib.sha256()
    for field in sorted(dataclasses.fields(lm.cfg), key=lambda field: field.name):
        value = getattr(lm.cfg, field.name)
        if field.name != "dtype" and value != field.default:
            digest.update(f"{field.name}={value!r};".encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(lm.params):
        index = np.unravel_index(np.linspace(0, leaf.size - 1, 64).astype(np.int64), leaf.shape)
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf[index].astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()[:16]


def _check_tokenizer(tokenizer: Tokenizer, cfg: ModelConfig) -> None:
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"wrong tokenizer: its vocab_size={tokenizer.vocab_size} must be at most the model's "
            f"{cfg.vocab_size}"
        )
    for name in ("mask_token_id", "eos_token_id"):
        ours, its = getattr(cfg, name), getattr(tokenizer, name)
        if its is not None and its != ours:
            raise ValueError(f"wrong tokenizer: its {name}={its} must be the model's {ours}")
