"""What is decoded to make training data, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from train.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """What to decode, and how.

    Attributes:
      checkpoint: folder of the model, for `dlm.load`.
      task: {"make": "module:Class", **fields}, see `dlm.tasks`.
      method: name in `decode/diffusion/points.py`.
      block_len: positions per block.
      changes: fields of the method that differ, see `decode.diffusion.points.override`.
      oracle: whether to decode a second time for the filter.
      num_examples: the task's first ones; 0: all.
      prompt_len: P, tokens of the longest prompt.
      gen_len: G, tokens per answer.
      batch_size: rows decoded at once, in each process.
      examples_per_shard: that a file holds; what a stopped run may lose.
      seed: of sampled methods; example i uses seed + i.
      dtype: of the parameters; "": the checkpoint's.
      tensor: devices per process over which heads, MLP and vocabulary are split.
    """

    checkpoint: str
    task: Mapping[str, Any]
    method: str = "one_per_step"
    block_len: int = 32
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    oracle: bool = False
    num_examples: int = 0
    prompt_len: int
    gen_len: int
    batch_size: int = 64
    examples_per_shard: int = 1024
    seed: int = 0
    dtype: str = ""
    tensor: int = 1

    def __post_init__(self) -> None:
        lowest = dict.fromkeys(
            ("block_len", "prompt_len", "gen_len", "batch_size", "examples_per_shard", "tensor"), 1
        ) | {"num_examples": 0, "seed": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least {low}")
