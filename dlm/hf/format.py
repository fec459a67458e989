"""What a published format is: names of sizes, of tensors, and values taken for granted.

One per family in `dlm.hf.formats`; `dlm.hf.files` and `dlm.hf.weights` read and write with them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from dlm.config import ModelConfig

TOKEN_IDS = ("mask_token_id", "eos_token_id", "bos_token_id", "pad_token_id")


def letter_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Size of each letter in `Stored.layout`."""
    return {
        "d": cfg.d_model,
        "n": cfg.n_heads,
        "k": cfg.n_kv_heads,
        "h": cfg.head_dim,
        "f": cfg.d_ff,
        "v": cfg.vocab_size,
    }


@dataclasses.dataclass(frozen=True)
class Stored:
    """How one parameter is stored: one tensor, or one per layer.

    Attributes:
      name: of the tensor; "{}" stands for the layer.
      layout: its dimensions, "->" ours (without L). "nh d -> nhd" is a matrix of N * H rows and D
        columns which we hold as [N, H, D]. Letters as in `dlm.models.decoder`.
    """

    name: str
    layout: str

    @property
    def stored(self) -> list[str]:
        """One group of letters per dimension of the tensor."""
        return self.layout.split(" -> ")[0].split()

    @property
    def ours(self) -> str:
        return self.layout.split(" -> ")[1]

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Of the stored tensor."""
        size = letter_sizes(cfg)
        return tuple(math.prod(size[letter] for letter in group) for group in self.stored)


@dataclasses.dataclass(frozen=True)
class Format:
    """One published format.

    Attributes:
      model_type: as config.json says it.
      architecture: likewise.
      fields: field of ModelConfig -> its key in config.json.
      absent: key -> its value where it is absent or null; other keys of `fields` must be there.
      fixed: key -> (values that the transformer here implements, value where it is absent). The
        latter are the defaults of the published code, even where nobody publishes such a model.
      implied: fields of ModelConfig that have one value in this format.
      extra: further entries of config.json that the published code wants to see.
      tensors: path of our leaf -> how it is stored.
      default_ids: token ids that stand in no file of some of its models; see `TOKEN_IDS`.
      is_causal: made from an autoregressive model: its heads may have any width, and its rotary
        frequencies may be stretched (`rope_scaling`, `rope_parameters`).
      has_mask: whether its models have a MASK token; None: they may. False: those that are written
        have none.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, str]
    absent: Mapping[str, Callable[[dict[str, Any]], Any]]
    fixed: Mapping[str, tuple[tuple[Any, ...], Any]]
    implied: Mapping[str, Any]
    extra: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    default_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    is_causal: bool = False
    has_mask: bool | None = None

    def refuse(self, cfg: ModelConfig) -> str | None:
        """Why a model cannot be written in this format, in one sentence; None if it can."""
        said = {*self.fields, *TOKEN_IDS, "dtype"} | ({"rope_scaling"} if self.is_causal else set())
        for field in dataclasses.fields(ModelConfig):
            name, value = field.name, getattr(cfg, field.name)
            needed = self.implied.get(name, field.default)
            if name not in said and value != needed:
                return f"{self.model_type} needs {name}={needed}, not {value}"
            if name in self.fields and value is None:
                return f"{self.model_type} needs {name}, and it is None"
        if self.has_mask is not None and self.has_mask != (cfg.mask_token_id is not None):
            needed = "a token" if self.has_mask else "None"
            return f"{self.model_type} needs mask_token_id to be {needed}, not {cfg.mask_token_id}"
        if not self.is_causal and cfg.head_dim * cfg.n_heads != cfg.d_model:
            needed = f"d_model={cfg.d_model} / n_heads={cfg.n_heads}"
            return f"{self.model_type} needs head_dim to be {needed}, not {cfg.head_dim}"
        return None
