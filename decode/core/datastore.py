"""Many texts and a suffix array of them, as two files that are mapped into memory.

A datastore is a folder with

    tokens.npy      [M] int32, one text behind the other, -1 behind each
    suffixes.npy    [M] int32, the slots in the order of what stands there and behind
    datastore.json  of which vocabulary they are

On a device it takes 8 bytes per token of the texts; there may be 2^31 - 1 of them.

What is looked for is drafted (`REST`), or tells how probable a token is behind some others
(`Superposed`): n-grams of every order are counted where they are asked for.

Letters: M slots, B rows, N patterns, n longest pattern, c tokens, m longest context.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlm.config import ModelConfig

SORTED_BY = 32  # tokens: patterns and what follows them may have as many together
_MOST = 2**31 - 1


class Datastore(struct.PyTreeNode):
    """What was loaded.

    Attributes:
      tokens: [M] int32. One text behind the other; -1 behind each.
      suffixes: [M] int32. The slots, sorted by the `SORTED_BY` tokens from each on.
      vocab_size: of the model whose tokens they are. Static.
    """

    tokens: jax.Array
    suffixes: jax.Array
    vocab_size: int = struct.field(pytree_node=False)

    def validate(self, cfg: ModelConfig) -> None:
        """Raises ValueError if it is of another vocabulary than the model's."""
        if self.vocab_size != cfg.vocab_size:
            raise ValueError(
                f"the datastore is of a vocabulary of {self.vocab_size} tokens and the target has "
                f"{cfg.vocab_size}: build it for this model"
            )

    def read(self, slot: jax.Array, num: int) -> jax.Array:
        """[..., num] int32: what stands from slots [...] on; -1 behind the last one."""
        place = slot[..., None] + jnp.arange(num).reshape(*[1] * slot.ndim, num)
        return jnp.take(self.tokens, place, mode="fill", fill_value=-1)

    def find(self, pattern: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where patterns come up: of `suffixes`, those from the first to before the last one.

        Args:
          pattern: [B, N, n] int32. Of the tokens that count the last one may be -1: where a text
            ends.
          length: [N] int32. How many tokens of each count, the first ones.

        Returns:
          First and last, [B, N] int32 each; equal where a pattern comes up nowhere.
        """
        M, n = len(self.suffixes), pattern.shape[-1]
        counts = jnp.arange(n)[None, None, None] < length[None, :, None, None]
        is_upper = jnp.array([False, True])[None, None]

        def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            middle = low + (high - low) // 2
            there = self.read(self.suffixes[jnp.minimum(middle, M - 1)], n)
            side = jnp.where(counts, jnp.sign(there - pattern[:, :, None]), 0)
            first = jnp.argmax(side != 0, axis=-1)[..., None]
            side = jnp.take_along_axis(side, first, axis=-1)[..., 0]
            is_below = (side < 0) | (is_upper & (side == 0))
            goes_up, goes_down = is_below & (low < high), ~is_below & (low < high)
            return jnp.where(goes_up, middle + 1, low), jnp.where(goes_down, middle, high)

        low = jnp.zeros((*pattern.shape[:2], 2), jnp.int32)
        low, _ = jax.lax.fori_loop(0, M.bit_length(), halve, (low, jnp.full_like(low, M)))
        return low[..., 0], low[..., 1]

    def shares(self, context: jax.Array, tokens: jax.Array) -> jax.Array:
        """How often tokens stand behind the last tokens of contexts, of all that stands there.

        Args:
          context: [B, m] int32. The last tokens of texts; -1 where a text is shorter.
          tokens: [B, c] int32. -1: the end of a text.

        Returns:
          [B, m, c] float32 in [0, 1]: behind the last 1, ..., m tokens; 0 where these come up
          nowhere.
        """
        (B, m), c = context.shape, tokens.shape[1]
        patterns, lengths = [], []
        for n in range(1, m + 1):
            before = jnp.broadcast_to(context[:, None, m - n :], (B, 1 + c, n))
            last = jnp.pad(tokens, ((0, 0), (1, 0)))[..., None]  # first the context alone
            filled = jnp.pad(jnp.concatenate([before, last], axis=2), ((0, 0), (0, 0), (0, m - n)))
            patterns.append(filled)
            lengths += [n] + [n + 1] * c
        first, last = self.find(jnp.concatenate(patterns, axis=1), jnp.array(lengths))
        counts = (last - first).reshape(B, m, 1 + c)
        is_there = jnp.flip(context >= 0, axis=1)[:, :, None]
        shares = counts[:, :, 1:] / jnp.maximum(counts[:, :, :1], 1)
        return jnp.where(is_there, shares, 0.0)


def build_datastore(
    texts: Iterable[list[int]], vocab_size: int, folder: str | os.PathLike[str]
) -> None:
    """Writes a datastore, which takes some 50 bytes of memory per token.

    Args:
      texts: token ids.
      vocab_size: of the model.
      folder: where to; made if there is none.

    Raises:
      ValueError: there is no token, one that the model does not have, or too many.
    """
    parts = []
    for text in texts:
        tokens = np.asarray([*text, -1], np.int64)
        if (bad := tokens[:-1][(tokens[:-1] < 0) | (tokens[:-1] >= vocab_size)]).size:
            raise ValueError(f"texts has {bad[0]}, not in [0, vocab_size={vocab_size})")
        parts.append(tokens.astype(np.int32))
    num = sum(map(len, parts))
    if num == len(parts) or num > _MOST:
        raise ValueError(
            f"texts has {num - len(parts)} tokens, which must be at least 1 and, with one more per "
            f"text, at most {_MOST}"
        )
    root = pathlib.Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    tokens = np.concatenate(parts)
    np.save(root / "tokens.npy", tokens)
    np.save(root / "suffixes.npy", sort_suffixes(tokens, SORTED_BY))
    about = {"vocab_size": vocab_size, "num_texts": len(parts)}
    (root / "datastore.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


def load_datastore(folder: str | os.PathLike[str]) -> Datastore:
    """Maps the files into memory, and puts them onto the device from there.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the files do not belong together.
    """
    root = pathlib.Path(folder)
    for name in ("tokens.npy", "suffixes.npy", "datastore.json"):
        if not (root / name).is_file():
            raise FileNotFoundError(f"{root / name} is missing: build the datastore anew")
    tokens, suffixes = (np.load(root / f"{x}.npy", mmap_mode="r") for x in ("tokens", "suffixes"))
    about = json.loads((root / "datastore.json").read_text(encoding="utf-8"))
    for name, array in (("tokens", tokens), ("suffixes", suffixes)):
        if array.dtype != np.int32 or array.shape != (len(tokens),):
            raise ValueError(
                f"{root / name}.npy holds {array.shape} {array.dtype}, which must be "
                f"({len(tokens)},) int32: build the datastore anew"
            )
    return Datastore(jnp.asarray(tokens), jnp.asarray(suffixes), int(about["vocab_size"]))


def sort_suffixes(tokens: np.ndarray, depth: int) -> np.ndarray:
    """The slots [M] int32 of tokens [M], sorted by `depth` tokens or more from each on.

    Prefix doubling (Manber and Myers, "Suffix Arrays", 1990), ended when that many are compared.
    """
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64) + 1  # 0: behind the end
    known = 1
    while known < depth:
        behind = np.zeros_like(rank)
        behind[:-known] = rank[known:] if known < len(rank) else 0
        both = rank * (rank.max() + 1) + behind
        rank = np.unique(both, return_inverse=True)[1].astype(np.int64) + 1
        known *= 2
    return np.argsort(rank, kind="stable").astype(np.int32)
