"""What a run starts from: its own model, the one of `train.init_from`, or a fresh one."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from dlm import lm, tasks
from dlm.bpe import learn_bpe
from dlm.config import ModelConfig, check_precision
from dlm.hf.files import format_for
from dlm.hf.tokenizer import load_tokenizer
from dlm.params import Params, cast_params, num_params
from dlm.tokenizer import Tokenizer, byte_tokenizer, word_tokenizer
from dlm.trainable import Learned, Trainable
from train import checkpoint
from train.config import ConfigError, RunConfig
from train.step import EVERYTHING


@dataclasses.dataclass
class RunModel:
    """What a run starts from.

    Attributes:
      cfg: the model.
      tokenizer: its own.
      generation: how its authors generate with it, see `dlm.lm.LanguageModel`; what is exported
        keeps it.
      given: parameters to start from; None: fresh ones, or those of a checkpoint. Set to None once
        they are in the state.
      frozen: what something is learned beside, whose target is {} if it is not needed; None: the
        model itself is learned.
    """

    cfg: ModelConfig
    tokenizer: Tokenizer
    generation: Mapping[str, Any]
    given: Params | None
    frozen: Learned | None

    def fingerprint(self) -> str | None:
        """Of what stays as it is, see `dlm.lm.fingerprint`; None: nothing does."""
        if self.frozen is None:
            return None
        params = {"target": self.frozen.target, "beside": self.frozen.beside or {}}
        return lm.fingerprint(lm.LanguageModel(params, self.cfg))


def open_model(
    settings: RunConfig,
    folder: pathlib.Path,
    start: int | None,
    trainable: Trainable,
    task: tasks.Task,
    mesh: Mesh,
) -> RunModel:
    """The model of a run, and what of it stays as it is.

    Args:
      settings: of the run.
      folder: its workdir.
      start: the step it goes on from; None: it is new.
      trainable: what is learned.
      task: knows the pieces of a word tokenizer.
      mesh: where loaded parameters lie.

    Raises:
      ConfigError: the model cannot be read or made, or has no room for the data.
    """
    try:
        check_precision("train.master_dtype", settings.train.master_dtype)
        check_precision("model.dtype", settings.model.get("dtype", ""))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    given: Params | None = None
    generation: Mapping[str, Any] = {}
    if start is not None:
        logging.info("Resuming %s after step %d.", folder, start)
        cfg, tokenizer, generation = checkpoint.read_model(folder)
        if trainable.needs_target and trainable is not EVERYTHING:
            given = load_model(settings, mesh)[1].params
    elif settings.train.init_from:
        logging.info("Starting from the model in %s.", settings.train.init_from)
        tokenizer, model = load_model(settings, mesh, trainable.needs_target)
        cfg, generation, given = model.cfg, model.generation, model.params
    else:
        logging.info("Starting from fresh parameters.")
        tokenizer = make_tokenizer(settings, task)
        cfg = model_config(settings, tokenizer)
    frozen: Learned | None = None
    if trainable is not EVERYTHING:
        target = cast_params(given, cfg) if given else {}
        try:
            frozen, given = Learned(target, beside=trainable.beside(cfg, mesh)), None
        except (OSError, ValueError) as error:
            raise ConfigError(f"train.trainable: {error}") from error
    try:
        specs = trainable.specs(cfg)
    except ValueError as error:
        raise ConfigError(f"train.trainable: {error}") from error
    logging.info("Learning %s of %s parameters: %s", *_counts(specs, cfg), cfg)
    return RunModel(cfg, tokenizer, generation, given, frozen)


def make_tokenizer(settings: RunConfig, task: tasks.Task) -> Tokenizer:
    name = settings.data.tokenizer
    if name == "byte":
        return byte_tokenizer()
    if name == "word":
        if not task.pieces:
            raise ConfigError(
                f"data.tokenizer='word' needs a task with `pieces`, which "
                f"{type(task).__name__} has not; use 'byte' or a folder with a tokenizer"
            )
        return word_tokenizer(task.pieces)
    kind, _, size = name.partition(":")
    try:
        if kind == "bpe" and size.isdecimal():
            return learn_bpe(_texts(task, name), int(size))
        return load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.tokenizer={name!r}: {error}") from error


def _texts(task: tasks.Task, name: str) -> list[str]:
    """The prompts and completions of a task, for a tokenizer to be learned from."""
    if not task.loaded or not isinstance(task.loaded[0], tasks.Example):
        raise ConfigError(
            f"data.tokenizer={name!r} is learned from a task that has its texts in memory, which "
            f"{type(task).__name__} has not; use 'byte' or a folder with a tokenizer"
        )
    return [text for example in task.loaded for text in (example.prompt, example.completion)]


def model_config(settings: RunConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model section, completed by what the tokenizer knows; ConfigError if it cannot be."""
    try:
        cfg = ModelConfig(
            **settings.model,
            vocab_size=tokenizer.vocab_size,
            mask_token_id=tokenizer.mask_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error
    return _check_length(cfg, settings)


def load_model(
    settings: RunConfig, mesh: Mesh, has_weights: bool = True
) -> tuple[Tokenizer, lm.LanguageModel]:
    """The model in `train.init_from`, and its tokenizer; of the model section `dtype` is used.

    Without weights its parameters are {}. With `train.with_mask` it is what that makes of it.
    """
    path, with_mask = settings.train.init_from, settings.train.with_mask
    try:
        model = lm.load(path, mesh=mesh) if has_weights else lm.describe(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"train.init_from={path!r}: {error}") from error
    if with_mask is not None:
        try:
            model = lm.with_mask(model, **with_mask)
            format_for(model.cfg)  # in which it will be written
        except (TypeError, ValueError) as error:
            raise ConfigError(f"train.with_mask={dict(with_mask)}: {error}") from error
    if model.tokenizer is None:
        raise ConfigError(f"train.init_from={path!r} must be a model with a tokenizer")
    if (num := model.tokenizer.vocab_size) > model.cfg.vocab_size:
        raise ConfigError(
            f"train.init_from={path!r} has a tokenizer with {num} tokens, which must be at most "
            f"the {model.cfg.vocab_size} rows of its embedding"
        )
    for name, said in settings.model.items():
        if name != "dtype" and said != (own := getattr(model.cfg, name, said)):
            logging.warning(
                "model.%s=%r is not used: that of train.init_from is %r.", name, said, own
            )
    dtype = settings.model.get("dtype", model.cfg.dtype)
    cfg = dataclasses.replace(model.cfg, dtype=dtype, never_causal=False)  # it learns anew
    return model.tokenizer, dataclasses.replace(model, cfg=_check_length(cfg, settings))


def _check_length(cfg: ModelConfig, settings: RunConfig) -> ModelConfig:
    length = settings.data.prompt_len + settings.data.completion_len
    if length > cfg.max_seq_len:
        raise ConfigError(
            f"max_seq_len={cfg.max_seq_len} of the model must be at least data.prompt_len + "
            f"data.completion_len = {length}"
        )
    return cfg


def _counts(specs: Params, cfg: ModelConfig) -> tuple[str, str]:
    """Parameters that are learned, and those of the model, as text."""
    own = sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs))
    return f"{own:,}", f"{num_params(cfg):,}"
