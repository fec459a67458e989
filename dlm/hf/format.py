"""What a published format is: names of sizes, of tensors, and values taken for granted.

One per family in `dlm.hf.formats`; `dlm.hf.files`, `dlm.hf.weights` and `dlm.hf.saving` use them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dlm.config import ModelConfig

TOKEN_IDS = ("mask_token_id", "eos_token_id", "bos_token_id", "pad_token_id")


def letter_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Size of each letter in `Stored.layout`."""
    experts = cfg.experts
    return {
        "d": cfg.d_model,
        "n": cfg.n_heads,
        "k": cfg.n_kv_heads,
        "h": cfg.head_dim,
        "f": cfg.d_ff,
        "v": cfg.vocab_size,
        "p": cfg.max_seq_len,
        "e": 0 if experts is None else experts.num_experts,
        "g": 0 if experts is None else experts.d_ff,
        "s": 0 if experts is None else experts.shared_d_ff,
        "a": 1,
    }


@dataclasses.dataclass(frozen=True)
class Stored:
    """How one parameter is stored: one tensor, or one per layer, or one per layer and expert.

    Attributes:
      name: of the tensor; "{}" stands for the layer, "{expert}" for the expert.
      layout: its dimensions, "->" ours (without L). "nh d -> nhd" is a matrix of N * H rows and D
        columns which we hold as [N, H, D]. Letters as in `dlm.models.decoder`, and e experts of
        width g, s the width of shared ones, p positions, a 1. The e of tensors per expert is only
        on our side, in front.
      joined: where one tensor holds several of our parameters side by side, the groups of letters
        of all of them, in order; they share one dimension of the tensor.
      part: which of them this one is.
    """

    name: str
    layout: str
    joined: tuple[str, ...] = ()
    part: int = 0

    @property
    def stored(self) -> list[str]:
        """One group of letters per dimension of the tensor."""
        return self.layout.split(" -> ")[0].split()

    @property
    def ours(self) -> str:
        return self.layout.split(" -> ")[1]

    @property
    def is_per_expert(self) -> bool:
        return "{expert}" in self.name

    @property
    def axis(self) -> int | None:
        """The dimension of the tensor that several parameters share; None: none is."""
        return self.stored.index(self.joined[self.part]) if self.joined else None

    def part_shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Of what the tensor holds of this parameter."""
        size = letter_sizes(cfg)
        return tuple(math.prod(size[letter] for letter in group) for group in self.stored)

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Of the stored tensor."""
        dims = list(self.part_shape(cfg))
        if self.axis is not None:
            dims[self.axis] = sum(self._joined_sizes(cfg))
        return tuple(dims)

    def start(self, cfg: ModelConfig) -> int:
        """Where this parameter begins on the shared dimension."""
        return sum(self._joined_sizes(cfg)[: self.part])

    def names(self, layers: Sequence[int], cfg: ModelConfig) -> list[str]:
        """Of all its tensors, for layers that have the parameter."""
        numbers = layers if "{}" in self.name else (0,)
        experts = range(letter_sizes(cfg)["e"]) if self.is_per_expert else (0,)
        return [self.name.format(i, expert=e) for i in numbers for e in experts]

    def _joined_sizes(self, cfg: ModelConfig) -> list[int]:
        size = letter_sizes(cfg)
        return [math.prod(size[letter] for letter in group) for group in self.joined]


def locate(leaf: str, cfg: ModelConfig) -> tuple[str, tuple[int, ...]]:
    """The key of `Format.tensors` for one of our leaves, and the layers that it stacks.

    Models some of whose layers have experts keep two stacks, see `dlm.params.param_specs`.
    """
    head, _, rest = leaf.partition("/")
    if head != "layers":
        return leaf, ()
    kinds = list(cfg.stacks)
    if len(kinds) == 1:
        return leaf, cfg.stacks[kinds[0]]
    kind, _, rest = rest.partition("/")
    return f"layers/{rest}", cfg.stacks[kind]


def _nothing(given: Any) -> dict[str, Any]:
    return {}


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
      is_causal: made from an autoregressive model: its heads may have any width.
      has_mask: whether its models have a MASK token; None: they may. False: those that are written
        have none.
      read: further fields of ModelConfig, of config.json; ValueError if it says what cannot be.
      write: keys of config.json that `read` reads as what a model is.
      keys: all keys that `read` looks at.
      ignored: how names of tensors end that say nothing.
      prefix: how names of tensors begin, which files may leave out.
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
    read: Callable[[dict[str, Any]], dict[str, Any]] = _nothing
    write: Callable[[ModelConfig], dict[str, Any]] = _nothing
    keys: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # a constant that old files carry
    prefix: str = ""

    def config_keys(self, cfg: ModelConfig) -> dict[str, Any]:
        """What config.json is to say of a model's sizes and layers."""
        skipped = () if self.is_causal else ("head_dim",)
        said = {key: getattr(cfg, name) for name, key in self.fields.items() if name not in skipped}
        fixed = {key: supported[0] for key, (supported, _) in self.fixed.items()}
        return {**self.extra, **fixed, **said, **self.write(cfg)}

    def refuse(self, cfg: ModelConfig) -> str | None:
        """Why a model cannot be written in this format, in one sentence; None if it can."""
        try:
            read = self.read(self.config_keys(cfg))
        except ValueError as error:
            return f"{self.model_type} cannot say what the model is: {error}"
        for name, value in read.items():
            if getattr(cfg, name) != value:
                return f"{self.model_type} cannot say {name}={getattr(cfg, name)}"
        said = {*self.fields, *TOKEN_IDS, *read, "more_eos_ids", "never_causal", "dtype", "family"}
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
