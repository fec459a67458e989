"""A draft vocabulary: those tokens of the target's that heads can draft.

A few thousand tokens make up nearly all of a text. Heads that draft only those multiply with a
matrix of so many rows, and a text with other tokens costs them nothing but drafts that are wrong.
Such a vocabulary is written by `python -m scripts.draft_vocab`.

Reference: Zhao et al., "FR-Spec: Accelerating Large-Vocabulary Language Models via Frequency-Ranked
Speculative Sampling", arXiv:2502.14856; EAGLE-3's networks have one, too.

Letters: V vocabulary, U draft vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp

from dlm.config import ModelConfig
from dlm.heads import files
from dlm.params import Params
from dlm.trainable import Learned

Vocab = str | tuple[int, ...]


def read_vocab(vocab: Vocab) -> tuple[int, ...]:
    """The tokens, ascending, of a JSON file with the list of them, or of a list; empty: all."""
    if isinstance(vocab, str):
        vocab = json.loads(pathlib.Path(vocab).read_text(encoding="utf-8")) if vocab else ()
    return tuple(sorted(set(vocab)))


def check_vocab(ids: tuple[int, ...], cfg: ModelConfig) -> None:
    """Raises ValueError unless all tokens, ascending, are of the target `cfg`."""
    for token in (*ids[:1], *ids[-1:]):
        if not 0 <= token < cfg.vocab_size:
            raise ValueError(f"vocab has {token}, not in [0, vocab_size={cfg.vocab_size})")


def with_ids(own: Params, ids: tuple[int, ...]) -> Params:
    """Parameters of heads, with the tokens that their matrices are about as "ids" [U] int32.

    If they are about all, there are no "ids".
    """
    return own | {"ids": jnp.asarray(ids, jnp.int32)} if ids else own


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabHeads(files.Heads):
    """Heads with a draft vocabulary.

    Attributes:
      vocab: tokens they can draft, or a JSON file with the list of them; empty: all.
    """

    vocab: Vocab = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab", read_vocab(self.vocab))

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens they can draft, ascending; empty: all."""
        assert not isinstance(self.vocab, str)
        return self.vocab

    def attach(self, cfg: ModelConfig, frozen: Learned, own: Params) -> Learned:
        """The model, and the heads' parameters with the tokens they are about."""
        return frozen.replace(own=with_ids(own, self.ids))


def spread(logits: jax.Array, ids: jax.Array, num_tokens: int) -> jax.Array:
    """Logits of all tokens; those that cannot be drafted have -inf.

    Args:
      logits: [..., U] float32.
      ids: [U] int32. Which tokens these are.
      num_tokens: V.

    Returns:
      [..., V] float32.
    """
    every = jnp.full((*logits.shape[:-1], num_tokens), -jnp.inf, logits.dtype)
    return every.at[..., ids].set(logits)
