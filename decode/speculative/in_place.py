"""Judging by models that say a token where it stands, in place of the output before it.

A block-diffusion model whose outputs are not shifted (SDAR, LLaDA2) writes from left to right in
blocks of one: MASK at a position, behind nothing but what is decided, says the token there. So a
draft tree is judged with one MASK more per node v,

    row of v         sees the text and the nodes above v, as in any tree, and keys and values stay
    row of its MASK  stands where v's children do; sees the text, v and the nodes above it, itself

and the MASK says what follows v. Of a chain this is the "2L" mask of S2D2, with the root in front
and a MASK behind the last draft, which is the bonus token's.

Reference: "S2D2", arXiv:2603.25702, and the public code (its SDAR path).

Letters: B rows, W nodes, E a drafter's own rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from decode.speculative.contracts import ExtraRows
from decode.speculative.tree import DraftTree


def ask(tree: DraftTree, above: jax.Array, mask_id: int) -> ExtraRows:
    """A MASK behind every node, W rows in the order of the nodes.

    Args:
      tree: of the round.
      above: [B, W, W] bool, as `DraftTree.ancestors`.
      mask_id: the model's MASK.
    """
    itself = jnp.broadcast_to(jnp.eye(above.shape[1], dtype=bool)[None], above.shape)
    return ExtraRows(
        tokens=jnp.full_like(tree.tokens, mask_id),
        offsets=tree.depths + 1,
        sees=jnp.concatenate([above, itself], axis=2),
    )


def join(first: ExtraRows, second: ExtraRows | None) -> ExtraRows:
    """Rows behind other rows, which do not see each other."""
    if second is None:
        return first
    E, num = first.tokens.shape[1], second.tokens.shape[1]
    W = first.sees.shape[2] - E
    blind = jnp.zeros((*second.sees.shape[:2], E), bool)
    of_second = jnp.concatenate([second.sees[..., :W], blind, second.sees[..., W:]], axis=2)
    of_first = jnp.pad(first.sees, ((0, 0), (0, 0), (0, num)))
    return ExtraRows(
        tokens=jnp.concatenate([first.tokens, second.tokens], axis=1),
        offsets=jnp.concatenate([first.offsets, second.offsets], axis=1),
        sees=jnp.concatenate([of_first, of_second], axis=1),
    )
