"""Masks behind a text, with which a model drafts for itself, and a change of it that only they see.

References: An et al., "PARD: Accelerating LLM Inference with Low-Cost PARallel Draft Model
Adaptation", arXiv:2504.18583, and the public code (who sees whom); Samragh et al., "Your LLM Knows
the Future: Uncovering Its Multi-Token Prediction Potential", arXiv:2507.11851 (the gated change).
Behind a token x_s stand masks M_1 .. M_J, learned vectors in the place of embeddings, at the true
positions s + 1 .. s + J. M_g sees the text up to x_s and the masks before it, and guesses the token
behind its own position, x_{s+g+1}; that of s + 1 is what the row of x_s itself is about. Rows of
masks multiply by

    W + down up        in attention and MLP of every layer; up is zero at first

and rows of tokens, which see no mask, by W alone: to the bit they say what the model says. So one
forward can judge drafts and guess the next ones. A row is named by two numbers: s, the last token
that it sees, and g, 0 for the token itself.

Left out: the sampler head behind the masks (Samragh et al.), soft prompts (BiTA, arXiv:2401.12522).

Letters: J masks, n vectors, D model width, R rows, r rank, U draft vocabulary.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from flax import struct

from dlm import vocab
from dlm.config import ModelConfig
from dlm.heads import files
from dlm.heads.draft_vocab import VocabHeads, check_vocab, with_ids
from dlm.lm import LanguageModel
from dlm.lora import TARGETS, Lora, laid_apart
from dlm.params import Params, ParamSpec, is_apart
from dlm.trainable import Learned


class MaskNetwork(struct.PyTreeNode):
    """Masks that are ready to draft or to be trained.

    Attributes:
      own: their parameters, and "ids" [U] if they guess only some tokens.
      num_masks: J, of a set. Static.
      lora: what "change" in `own` is; None: there is none. Static.
    """

    own: Params
    num_masks: int = struct.field(pytree_node=False)
    lora: Lora | None = struct.field(pytree_node=False)

    @property
    def is_shared(self) -> bool:
        """Whether all masks are the same vector, so that sets may be longer than in training."""
        return len(self.own["vectors"]) == 1

    @property
    def ids(self) -> jax.Array | None:
        """[U] int32, ascending: the tokens that they guess; None: all."""
        return self.own.get("ids")

    def head(self, target: Params) -> vocab.Head:
        """The target's output head, of those tokens."""
        head: vocab.Head = vocab.head(target)
        return head if self.ids is None else head[self.ids]

    def embedded(self, groups: jax.Array) -> jax.Array:
        """[..., D] float32: the vectors of masks g [...] int32, from 1."""
        vectors = self.own["vectors"].astype(jnp.float32)
        return vectors.at[jnp.zeros_like(groups) if self.is_shared else groups - 1].get(mode="clip")

    def beside(self, params: Params, first: int) -> Params:
        """A target's parameters for windows whose positions from `first` on are masks."""
        if self.lora is None:
            return params
        return self.lora.beside_weights(params, self.own["change"], first)


def sees(last: jax.Array, group: jax.Array) -> jax.Array:
    """Who sees whom, of rows that are named as the module says.

    Args:
      last: [..., R] int32. s: of a token its own position.
      group: [..., R] int32. g: of a token 0.

    Returns:
      [..., R, R] bool: whether the first row sees the second one.
    """
    (s, g), (other_s, other_g) = (last[..., None], group[..., None]), (last, group)
    other_s, other_g = other_s[..., None, :], other_g[..., None, :]
    is_mask_before = (other_g > 0) & (other_g <= g) & (other_s == s)
    return (other_g == 0) & (other_s <= s) | is_mask_before


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskHeads(VocabHeads):
    """What the masks are; also what `train.trainable` trains beside a model.

    Attributes:
      vocab: tokens they can guess, see `dlm.heads.draft_vocab`; empty: all.
      num_masks: J >= 1.
      is_shared: whether they are one vector (PARD) and not J.
      rank: r >= 0, of the change, in all of a layer's weights, of models with experts those of
        attention; 0: there is none (Samragh et al.: 128).
      vector_rate: > 0, of the vectors' learning rate to that of the change (ours).
    """

    num_masks: int = 7
    is_shared: bool = False
    rank: int = 32
    vector_rate: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("num_masks", 1), ("rank", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not self.vector_rate > 0:
            raise ValueError(f"vector_rate={self.vector_rate} must be positive")

    def specs(self, cfg: ModelConfig) -> Params:
        """{"vectors": [n, D], "change": as `Lora.specs`} of `ParamSpec`."""
        check_vocab(self.ids, cfg)
        n = 1 if self.is_shared else self.num_masks
        specs: Params = {"vectors": ParamSpec((n, cfg.d_model), (None, "embed"), 0.02)}
        if (lora := self._lora(cfg)) is not None:
            specs["change"] = lora.specs(cfg)
        return specs

    def start(self, cfg: ModelConfig, params: Params, own: Params) -> Params:
        """Fresh vectors `own` around the mean of the model's embeddings."""
        mean = params["embed"].mean(axis=0, dtype=jnp.float32)
        vectors = own["vectors"]
        return own | {"vectors": (vectors + mean[None]).astype(vectors.dtype)}

    def attach(self, cfg: ModelConfig, frozen: Learned, own: Params) -> Learned:
        """The model, and the masks."""
        return frozen.replace(own=self.network(cfg, own))

    def rate(self, updates: Params) -> Params:
        """Updates at the two learning rates."""
        return updates | {"vectors": self.vector_rate * updates["vectors"]}

    def network(self, cfg: ModelConfig, own: Params) -> MaskNetwork:
        """For a target `cfg`, with parameters `own`."""
        return MaskNetwork(with_ids(own, self.ids), self.num_masks, self._lora(cfg))

    def _lora(self, cfg: ModelConfig) -> Lora | None:
        has_experts = "experts" in cfg.stacks
        absent = TARGETS[4:] if has_experts else () if cfg.gated else ("gate",)
        targets = tuple(target for target in TARGETS if target not in absent)
        return Lora(rank=self.rank, alpha=float(self.rank), targets=targets) if self.rank else None


def load(path: str | pathlib.Path, lm: LanguageModel) -> MaskNetwork:
    """Trained masks; ValueError if they were trained for another model than `lm`.

    Where weights of the model lie `Apart`, the change does, too.
    """
    heads, own = files.load(path, MaskHeads, lm)
    if "change" in own and any(map(is_apart, jax.tree.leaves(lm.params, is_leaf=is_apart))):
        own = own | {"change": laid_apart(lm.params, own["change"])}
    return heads.network(lm.cfg, own)
