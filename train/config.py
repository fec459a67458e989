"""The settings of a run: frozen dataclasses, made once from an `ml_collections.ConfigDict`.

Nothing below `train.loop.run` sees a ConfigDict. Whatever is wrong with a user's settings is a
`ConfigError`, whose text is one sentence; `python -m train` prints it without a stack trace.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import numbers
from collections.abc import Mapping
from typing import Any, TypeVar

from flax import traverse_util
from ml_collections import config_dict

Settings = TypeVar("Settings")


class ConfigError(ValueError):
    """Settings that cannot be run, said in one sentence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned from.

    Attributes:
      task: {"make": "module:Class", **fields} of the task, see `dlm.tasks`.
      train: fields of `task` that differ for training.
      valid: fields that differ for validation; None: no validation.
      tokenizer: "word" (the task's `pieces`), "byte", "bpe:6144" (byte-level BPE of so many tokens,
        learned from the task's texts, which must be in memory, see `dlm.bpe`), or a folder with a
        tokenizer.
      prompt_len: P, tokens of the longest prompt; shorter ones are padded on the left. 0: only
        tasks with empty prompts (pre-training).
      completion_len: G, tokens of the longest completion, its EOS included.
      too_long: what becomes of an example that does not fit. "refuse": the run ends with a sentence
        that names it, before the first step if the task has its examples in memory. "cut": its
        prompt loses its first tokens, its completion its last ones and its EOS. "leave_out": it is
        not learned from; all examples are read before the first step.
      batch_size: rows per step, over all processes; 0: all rows of the task in every step.
      buckets: smaller (prompt_len, completion_len) for batches of shorter examples, each of which
        goes to the smallest one it fits. Such a batch has more rows, for about as many tokens; how
        many depends on the mesh too. Every bucket is compiled on its own.
      plain: whether special tokens that are written in texts, such as "<|endoftext|>", are text. If
        not, each is the token, but for MASK, which is refused.
      packing: whether texts, each with its EOS, are joined and cut into rows of completion_len
        tokens; prompts must be empty.
      keep_apart: whether packed texts are kept from seeing each other.
      seed: of the shuffling.
      num_threads: that make batches ahead of time, in each process; 0: none.
      prefetch: batches kept ready, in each process.
    """

    task: Mapping[str, Any]
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    valid: Mapping[str, Any] | None = None
    tokenizer: str = "word"
    prompt_len: int
    completion_len: int
    batch_size: int
    too_long: str = "refuse"
    buckets: tuple[tuple[int, int], ...] = ()
    plain: bool = False
    packing: bool = False
    keep_apart: bool = False
    seed: int = 0
    num_threads: int = 1
    prefetch: int = 4

    def __post_init__(self) -> None:
        _check_at_least(
            "data", self, prompt_len=0, completion_len=1, batch_size=0, num_threads=0, prefetch=1
        )
        if not self.batch_size and (self.packing or self.buckets):
            raise ConfigError(
                "data.batch_size=0 must be at least 1 with data.packing or data.buckets, whose "
                "batches are not the same rows every time"
            )
        if self.too_long not in ("refuse", "cut", "leave_out"):
            raise ConfigError(
                f"data.too_long={self.too_long!r} must be 'refuse', 'cut' or 'leave_out'"
            )
        if self.packing and self.too_long != "refuse":
            raise ConfigError(
                f"data.too_long={self.too_long!r} must be 'refuse' with data.packing=True, for "
                "which no text is too long"
            )
        if self.keep_apart and not self.packing:
            raise ConfigError("data.keep_apart=True needs data.packing=True: other rows are apart")
        for bucket in self.buckets:
            if not _is_bucket(bucket, self.prompt_len, self.completion_len):
                raise ConfigError(
                    f"data.buckets has {bucket!r}, which must be (prompt_len, completion_len) of "
                    f"at most data.prompt_len={self.prompt_len} and "
                    f"data.completion_len={self.completion_len}"
                )
        object.__setattr__(self, "buckets", tuple((P, G) for P, G in self.buckets))
        if self.packing and self.prompt_len:
            raise ConfigError(
                f"data.prompt_len={self.prompt_len} must be 0 with data.packing=True, which is for "
                "texts without prompts"
            )
        if self.packing and self.buckets:
            raise ConfigError(
                f"data.buckets={self.buckets} must be () with data.packing=True, whose rows all "
                "have the same length"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay. Hashable, so static under `jax.jit`.

    All numbers of steps are training steps, also if gradients are accumulated.

    Attributes:
      learning_rate: the highest, reached after the warm-up.
      warmup_steps: steps in which it rises from 0.
      decay_steps: step at which it reaches its end; 0: `train.num_steps`.
      end_factor: the last learning rate over the highest one, in [0, 1]; 1: no decay.
      decay_share: in (0, 1]. Share of the steps, the last ones, over which it falls; before that
        it is constant. 1: it falls from the end of the warm-up.
      beta1, beta2, eps: of Adam.
      weight_decay: decoupled; not applied to norms and biases.
      clip_norm: largest global norm of the gradient; 0: no clipping.
      accumulate: steps whose gradients are averaged into one update, at least 1.
      ema_decay: of the exponential moving average of the parameters, in [0, 1); 0: none. Early on
        the decay is (1 + n) / (10 + n) after n updates, if that is less.
      keep_best: whether the result is what had the lowest loss in any validation, instead of what
        is there at the end.
    """

    learning_rate: float
    warmup_steps: int = 0
    decay_steps: int = 0
    end_factor: float = 0.0
    decay_share: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.0
    keep_best: bool = False

    def __post_init__(self) -> None:
        _check_at_least(
            "optim",
            self,
            learning_rate=0,
            warmup_steps=0,
            decay_steps=0,
            weight_decay=0,
            clip_norm=0,
            accumulate=1,
        )
        if not 0 <= self.end_factor <= 1:
            raise ConfigError(f"optim.end_factor={self.end_factor} must be in [0, 1]")
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"optim.decay_share={self.decay_share} must be in (0, 1]")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, towards what, and from where.

    Attributes:
      objective: {"make": "module:Class", **fields}, see `train.objectives`.
      trainable: likewise, what is learned beside the model of `init_from`, see `train.trainable`;
        None: the model itself.
      num_steps: training steps.
      seed: of initialisation, masks and all other randomness but the order of the data.
      master_dtype: in which parameters are kept and updated; products use `model.dtype`.
      init_from: folder of a model to start from; "": fresh parameters.
      with_mask: {"mask_token": text, ...}, arguments of `dlm.lm.with_mask`, which makes a diffusion
        model to be of that model; None: it stays what it is.
      eval_every: steps between validations; 0: only at the end.
      num_eval_batches: held-out batches of a validation, the same each time.
    """

    objective: Mapping[str, Any]
    trainable: Mapping[str, Any] | None = None
    num_steps: int
    seed: int = 0
    master_dtype: str = "float32"
    init_from: str = ""
    with_mask: Mapping[str, Any] | None = None
    eval_every: int = 0
    num_eval_batches: int = 4

    def __post_init__(self) -> None:
        _check_at_least("train", self, num_steps=1, eval_every=0, num_eval_batches=1)
        if self.master_dtype not in ("float32", "bfloat16", "float64"):
            raise ConfigError(
                f"train.master_dtype={self.master_dtype!r} must be 'float32', 'bfloat16' or "
                "'float64'"
            )
        if self.trainable is not None and not self.init_from:
            raise ConfigError(
                "train.init_from='' must be a model: train.trainable is learned beside one"
            )
        if self.with_mask is not None and not self.init_from:
            raise ConfigError(
                "train.init_from='' must be a model: train.with_mask gives one a MASK token"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Attributes:
    every: steps between checkpoints; 0: only at the end and on preemption.
    keep: how many are kept, the latest ones.
    """

    every: int = 0
    keep: int = 1

    def __post_init__(self) -> None:
        _check_at_least("checkpoint", self, every=0, keep=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Attributes:
    every: steps between lines of `metrics.jsonl`.
    progress: whether a progress bar is shown if standard error is a terminal.
    tensorboard: whether to write TensorBoard files too (extra `log`).
    wandb_project: Weights & Biases project to write to as well (extra `log`); "": none.
    """

    every: int = 20
    progress: bool = True
    tensorboard: bool = False
    wandb_project: str = ""

    def __post_init__(self) -> None:
        _check_at_least("log", self, every=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the device mesh, see `dlm.sharding.make_mesh`; `data * fsdp` shards the batch."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        _check_at_least("mesh", self, data=1, fsdp=1, tensor=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run.

    Attributes:
      model: fields of `dlm.config.ModelConfig`, but for the vocabulary size and the token ids,
        which the tokenizer knows.
      data, optim, train, checkpoint, log, mesh: see their classes.
    """

    model: Mapping[str, Any]
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    mesh: MeshConfig

    def __post_init__(self) -> None:
        shards = self.mesh.data * self.mesh.fsdp
        if self.data.batch_size % shards:
            raise ConfigError(
                f"data.batch_size={self.data.batch_size} must be a multiple of mesh.data * "
                f"mesh.fsdp = {shards}"
            )
        if self.train.num_steps % self.optim.accumulate:
            raise ConfigError(
                f"train.num_steps={self.train.num_steps} must be a multiple of "
                f"optim.accumulate={self.optim.accumulate}"
            )
        if self.optim.keep_best and self.data.valid is None:
            raise ConfigError(
                "optim.keep_best=True needs data.valid: what is best is decided on held-out data"
            )


SECTIONS = {
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
    "mesh": MeshConfig,
}


def from_config_dict(config: config_dict.ConfigDict) -> RunConfig:
    """Settings from sections `model, data, optim, train, checkpoint, log, mesh`.

    Raises:
      ConfigError: a section or field is missing, unknown, of the wrong kind or out of range.
    """
    values = to_dict(config, "")
    if unknown := sorted(set(values) - {"model", *SECTIONS}):
        raise ConfigError(
            f"the config has an unknown section {unknown[0]!r}; it may have model, "
            f"{', '.join(SECTIONS)}"
        )
    if "model" not in values:
        raise ConfigError("the config has no section 'model'")
    sections = {name: _section(name, make, values.get(name, {})) for name, make in SECTIONS.items()}
    return RunConfig(model=values["model"], **sections)


def build(spec: Mapping[str, Any], where: str) -> Any:
    """Calls "module:Class" of `spec["make"]` with the other entries of `spec`.

    Args:
      spec: such as {"make": "dlm.tasks.scan:Scan", "split": "train"}.
      where: the field it is from, for messages.

    Raises:
      ConfigError: there is no such class, or it refuses the fields.
    """
    fields = dict(spec)
    name = fields.pop("make", None)
    module, _, attribute = str(name).partition(":")
    if not module or not attribute:
        raise ConfigError(f'{where}.make={name!r} must be "module:Class"')
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where}.make={name!r} cannot be imported: {error}") from error
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    try:
        return make(**fields)
    except (TypeError, ValueError, OSError, ImportError) as error:
        raise ConfigError(f"{where}: {error}") from error


def to_json(settings: RunConfig) -> dict[str, Any]:
    """The settings as JSON reads them back: nested dicts and lists, for files and comparison."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def defaults() -> dict[str, dict[str, Any]]:
    """What fields are that nobody gives, of every section, as `to_json` has them."""
    values = {
        section: {
            field.name: field.default if field.default_factory is dataclasses.MISSING
            else field.default_factory()
            for field in dataclasses.fields(make)
            if field.default is not field.default_factory  # it has one of them
        }
        for section, make in SECTIONS.items()
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = json.loads(json.dumps(values))
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that differ between two results of `to_json`, as {"section.field": (old, new)}."""
    flat_old, flat_new = (
        traverse_util.flatten_dict(dict(d), sep=".", keep_empty_nodes=True) for d in (old, new)
    )
    return {
        name: (flat_old.get(name), flat_new.get(name))
        for name in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(name) != flat_new.get(name)
    }


def to_dict(config: config_dict.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """As `ConfigDict.to_dict`, but names a placeholder that has no value."""
    values = {}
    for name in config:
        try:
            value = config[name]
            is_missing = value is None and config.get_type(name) is not type(None)
        except config_dict.RequiredValueError:
            is_missing = True
        if is_missing:
            raise ConfigError(f"the config needs a value for --config.{prefix}{name}")
        is_section = isinstance(value, config_dict.ConfigDict)
        values[name] = to_dict(value, f"{prefix}{name}.") if is_section else value
    return values


def from_fields(make: type[Settings], config: config_dict.ConfigDict) -> Settings:
    """Settings without sections, of a frozen dataclass.

    Raises:
      ConfigError: a field is missing, unknown, of the wrong kind or out of range.
    """
    return _fields(make, to_dict(config), "")


def _section(name: str, make: type, values: Any) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{name}={values!r} must be a section")
    return _fields(make, values, f"{name}.")


def _fields(make: Any, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(make)}
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(
            f"the config has an unknown field {prefix}{unknown[0]}; {prefix[:-1] or 'it'} may have "
            f"{', '.join(fields)}"
        )
    missing = [
        key
        for key, field in fields.items()
        if key not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"the config lacks the field {prefix}{missing[0]}")
    for key, value in values.items():
        said = fields[key].type
        if said == "int" and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
            raise ConfigError(f"{prefix}{key}={value!r} must be a whole number")
        if said == "bool" and not isinstance(value, bool):
            raise ConfigError(f"{prefix}{key}={value!r} must be True or False")
        if key == "seed" and not 0 <= value < 2**32:
            raise ConfigError(f"{prefix}seed={value} must be in [0, 2^32)")
    try:
        return make(**values)
    except TypeError as error:
        raise ConfigError(f"{prefix[:-1] or 'the config'}: {error}") from error


def _is_bucket(bucket: Any, prompt_len: int, completion_len: int) -> bool:
    return (
        isinstance(bucket, list | tuple)
        and len(bucket) == 2
        and all(type(length) is int for length in bucket)
        and 0 <= bucket[0] <= prompt_len
        and 1 <= bucket[1] <= completion_len
    )


def _check_at_least(section: str, config: Any, **lowest: float) -> None:
    for name, low in lowest.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= low:
            raise ConfigError(f"{section}.{name}={value!r} must be a number of at least {low}")
