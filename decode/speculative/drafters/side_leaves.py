"""Chains whose nodes have siblings that are leaves, the more the less sure the chain is (SWIFT).

Letters: B rows, J depth, R most children of a node, W nodes, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from decode.speculative.tree import DraftTree

# Children of a node whose first child is more probable than 0.95, 0.8, 0.5, or not.
ABOVE = (0.95, 0.8, 0.5)
CHILDREN, DRAWN_CHILDREN = (3, 5, 8, 10), (1, 3, 5, 10)


def are_drafted(children: jax.Array, sure: jax.Array, table: tuple[int, ...]) -> jax.Array:
    """Which children of some depths become nodes, [B, J, R] bool; the arguments are `grow`'s."""
    steps = (sure[..., None] <= jnp.array(ABOVE)[None, None]).sum(axis=2)
    most = jnp.array(table)[steps]  # [B, J]
    return (jnp.arange(children.shape[2])[None, None] < most[..., None]) & (children >= 0)


def grow(
    root: jax.Array,
    children: jax.Array,
    sure: jax.Array,
    num: jax.Array,
    table: tuple[int, ...],
    num_nodes: int,
    laws: jax.Array | None = None,
) -> DraftTree:
    """A chain whose nodes have siblings that are leaves; stored by depth, in order.

    Args:
      root: [B] int32.
      children: [B, J, R] int32. Of each depth the chain's token and its siblings; -1: none.
      sure: [B, J] float32. How probable the chain's token is.
      num: [B] int32. Depths that there are.
      table: how many children a depth has whose token is more probable than each of `ABOVE`, and
        otherwise.
      num_nodes: W; what does not fit is left out.
      laws: [B, J, V] float32. What the children of each depth were drawn from; None if they were
        not.
    """
    B, J, R = children.shape
    W, rows = num_nodes, jnp.arange(B)[:, None]
    exists = are_drafted(children, sure, table) & (jnp.arange(J)[None] < num[:, None])[..., None]
    flat = exists.reshape(B, J * R)
    place = jnp.where(flat, jnp.cumsum(flat, axis=1), W)  # of the node; the root is at 0
    of_chain = place.reshape(B, J, R)[:, :, 0]
    above = jnp.pad(of_chain[:, :-1], ((0, 0), (1, 0)))  # [B, J]: nodes that have children

    def put(first: jax.Array | int, other: int, values: jax.Array) -> jax.Array:
        at = jnp.full((B, W), other, jnp.int32).at[:, 0].set(first)
        return at.at[rows, place].set(values.astype(jnp.int32), mode="drop")

    each = lambda x: jnp.repeat(x, R, axis=1)  # noqa: E731
    depths = jnp.broadcast_to(jnp.arange(1, J + 1, dtype=jnp.int32)[None], (B, J))
    probs = None
    if laws is not None:
        probs = jnp.zeros((B, W, laws.shape[2])).at[rows, above].set(laws, mode="drop")
    return DraftTree(
        tokens=put(root, 0, children.reshape(B, J * R)),
        parents=put(-1, 0, each(above)),
        depths=put(0, 1, each(depths)),
        is_valid=put(1, 0, jnp.ones_like(flat)) > 0,
        probs=probs,
        drawn="none" if laws is None else "without",
    )
