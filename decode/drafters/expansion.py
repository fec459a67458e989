"""How a model grows a draft tree: children of a node are its most probable tokens, or drawn.

Letters: B rows, W nodes, n nodes of a level, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from decode.drafters.contracts import Context
from decode.sampling import fold_in
from decode.tree import DraftTree, TreeShape

Score = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def expand(shape: TreeShape, context: Context, score: Score, is_sampled: bool) -> DraftTree:
    """A tree of one shape, level by level.

    Args:
      shape: of the tree.
      context: the root, the law, and the randomness.
      score: of tokens [B, W], as far as they are known, and some nodes: logits [B, n, V] of what
        comes after those. It is called once per level, with all nodes of it that have children.
      is_sampled: whether children are drawn without replacement, in the order of their rank, from
        the filtered law of their parent; else they are the most probable tokens.
    """
    root = context.root
    B = root.shape[0]
    tokens = jnp.zeros((B, shape.num_nodes), jnp.int32).at[:, 0].set(root)
    is_sampled = is_sampled and context.sampling.temperature is not None
    law_of = context.sampling.replace(repetition_penalty=None).law
    laws = None
    for depth in range(shape.depth):
        nodes = tuple(v for v in shape.level(depth) if v in shape.parents)
        logits = score(tokens, nodes)
        children = [
            (v, nodes.index(shape.parents[v - 1]), shape.ranks[v - 1])
            for v in shape.level(depth + 1)
        ]
        index, above, rank = (jnp.array(column) for column in zip(*children, strict=True))
        if is_sampled:
            law = law_of(logits)
            if laws is None:
                laws = jnp.zeros((B, shape.num_nodes, law.shape[-1]), law.dtype)
            laws = laws.at[:, jnp.array(nodes)].set(law)
            # The order of noisy log-probabilities is that of draws without replacement.
            logits = jnp.log(law) + _gumbel(fold_in(context.key, depth), law.shape[1:])
        best = jax.lax.top_k(logits, max(c[2] for c in children) + 1)[1]
        tokens = tokens.at[:, index].set(best[:, above, rank].astype(jnp.int32))
    return shape.tree(tokens, laws=laws)


def _gumbel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, *shape] standard Gumbel noise from a random stream [B, 2] uint32 per row."""
    one = lambda key: jax.random.gumbel(jax.random.wrap_key_data(key), shape)  # noqa: E731
    return jax.vmap(one)(key)
