"""Where the end of a text has come up before.

Letters: B rows, S slots of the text, M slots of what is searched.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def match_lengths(source: jax.Array, tokens: jax.Array, length: jax.Array, most: int) -> jax.Array:
    """How many tokens up to each slot are the last ones of the text.

    Args:
      source: [B, M] int32. What is searched.
      tokens: [B, S] int32. Texts.
      length: [B] int32. Tokens of them.
      most: tokens that are compared.

    Returns:
      [B, M] int32 in [0, most].
    """
    slot = jnp.arange(source.shape[1])[None]

    def further(back: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        alike, found = carry
        place = length[:, None] - 1 - back
        last = jnp.take_along_axis(tokens, jnp.maximum(place, 0), axis=1)
        before = jnp.take_along_axis(source, jnp.maximum(slot - back, 0), axis=1)
        alike &= (before == last) & (slot >= back) & (place >= 0)
        return alike, found + alike

    start = jnp.ones(source.shape, bool), jnp.zeros(source.shape, jnp.int32)
    return jax.lax.fori_loop(0, most, further, start)[1]
