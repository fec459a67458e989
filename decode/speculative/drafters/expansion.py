"""How a model grows a draft tree: of a shape that is given, or where it is probable.

Letters: B rows, W nodes, n nodes of a level, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.streams import fold_in, wrap
from decode.speculative.contracts import Context, Drafter
from decode.speculative.tree import DraftTree, TreeShape
from dlm.config import ModelConfig
from dlm.heads.draft_vocab import spread

Score = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def expand(
    shape: TreeShape,
    context: Context,
    score: Score,
    is_sampled: bool,
    ids: jax.Array | None = None,
) -> DraftTree:
    """A tree of one shape, level by level.

    Args:
      shape: of the tree.
      context: the root, the distribution, and the randomness.
      score: of tokens [B, W], as far as they are known, and some nodes: logits [B, n, U] of what
        comes after those. It is called once per level, with all nodes of it that have children.
      is_sampled: whether children are drawn without replacement, in the order of their rank, from
        the filtered distribution of their parent; else they are the most probable tokens.
      ids: [U] int32. The tokens that logits are about; None: all.
    """
    root = context.root
    B = root.shape[0]
    tokens = jnp.zeros((B, shape.num_nodes), jnp.int32).at[:, 0].set(root)
    is_sampled = is_sampled and context.sampling.temperature is not None
    probs_of = context.sampling.replace(repetition_penalty=None).probs
    probs = None
    for depth in range(shape.depth):
        nodes = tuple(v for v in shape.level(depth) if v in shape.parents)
        logits = score(tokens, nodes)
        children = [
            (v, nodes.index(shape.parents[v - 1]), shape.ranks[v - 1])
            for v in shape.level(depth + 1)
        ]
        index, above, rank = (jnp.array(column) for column in zip(*children, strict=True))
        tokens_of = ids
        if is_sampled:
            if ids is not None:
                logits = spread(logits, ids, context.params["embed"].shape[0])
            level_probs = probs_of(logits)
            tokens_of = None
            if probs is None:
                probs = jnp.zeros((B, shape.num_nodes, level_probs.shape[-1]), level_probs.dtype)
            probs = probs.at[:, jnp.array(nodes)].set(level_probs)
            # The order of noisy log-probabilities is that of draws without replacement.
            noise = gumbel(fold_in(context.key, depth), level_probs.shape[1:])
            logits = jnp.log(level_probs) + noise
        best = jax.lax.top_k(logits, max(c[2] for c in children) + 1)[1]
        best = best if tokens_of is None else tokens_of[best]
        tokens = tokens.at[:, index].set(best[:, above, rank].astype(jnp.int32))
    return shape.tree(tokens, probs=probs)


def expand_best(
    width: int,
    levels: int,
    budget: int,
    context: Context,
    score: Callable[[jax.Array, jax.Array, tuple[int, ...], tuple[int, ...]], jax.Array],
    drafted: jax.Array | None = None,
) -> DraftTree:
    """The most probable nodes of a tree that is grown where it is probable.

    Reference: Li et al., "EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees",
    arXiv:2406.16858, Sec. 4. A node's value is the sum of log-probabilities on the way to it. Of
    every level the `width` best nodes are expanded, each into its `width` most probable children;
    of all nodes seen, the `budget` best are kept. No node is better than its parent, and of equals
    the parent comes first, so what is kept is a tree.

    Args:
      width: k.
      levels: levels below the root, at least 1.
      budget: nodes of the result, the root aside; at most k + (levels - 1) k^2.
      context: the root.
      score: of expanded nodes' tokens [B, E] and parents [B, E] (index among them, root: -1), the
        depth of each, and some of them: logits [B, n, U] of what comes after those.
      drafted: [U] int32. The tokens that logits are about; None: all.
    """
    root = context.root
    B, E = root.shape[0], 1 + width * (levels - 1)
    depths = (0, *(1 + i // width for i in range(E - 1)))
    tokens = jnp.zeros((B, E), jnp.int32).at[:, 0].set(root)
    parents = jnp.full((B, E), -1, jnp.int32)
    frontier: tuple[int, ...] = (0,)
    value = jnp.zeros((B, 1))  # of the frontier
    number = jnp.full((B, 1), -1, jnp.int32)  # of the frontier, among all candidates
    found: list[tuple[jax.Array, jax.Array, jax.Array]] = []  # tokens, values, parents' numbers
    count = 0
    for level in range(1, levels + 1):
        log_p = jax.nn.log_softmax(score(tokens, parents, depths, frontier))
        best, ids = jax.lax.top_k(log_p, width)  # [B, n, k]
        ids = ids if drafted is None else drafted[ids]
        n = len(frontier)
        values = (value[..., None] + best).reshape(B, n * width)
        ids = ids.reshape(B, n * width).astype(jnp.int32)
        found.append((ids, values, jnp.repeat(number, width, axis=1)))
        if level < levels:
            value, chosen = jax.lax.top_k(values, width)
            slots = tuple(1 + width * (level - 1) + i for i in range(width))
            tokens = tokens.at[:, slots[0] : slots[-1] + 1].set(
                jnp.take_along_axis(ids, chosen, axis=1)
            )
            above = jnp.array(frontier, jnp.int32)[chosen // width]
            parents = parents.at[:, slots[0] : slots[-1] + 1].set(above)
            number = (count + chosen).astype(jnp.int32)
            frontier = slots
        count += n * width

    all_tokens, all_values, all_parents = (
        jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True)
    )
    kept = jnp.sort(jax.lax.top_k(all_values, budget)[1], axis=1)  # in the order they were made
    above = jnp.take_along_axis(all_parents, kept, axis=1)
    place = jax.vmap(jnp.searchsorted)(kept, above).astype(jnp.int32) + 1
    nodes = jnp.where(above < 0, 0, place)
    made = [len(part[0][0]) for part in found]
    depth_of = jnp.concatenate([jnp.full(m, d + 1, jnp.int32) for d, m in enumerate(made)])
    first = lambda x, of_root: jnp.concatenate(  # noqa: E731
        [jnp.broadcast_to(of_root, (B, 1)).astype(jnp.int32), x], axis=1
    )
    return DraftTree(
        tokens=first(jnp.take_along_axis(all_tokens, kept, axis=1), root[:, None]),
        parents=first(nodes, jnp.int32(-1)),
        depths=first(depth_of[kept], jnp.int32(0)),
        is_valid=jnp.ones((B, budget + 1), bool),
    )


@struct.dataclass
class BestTree(Drafter):
    """What drafters of the most probable tree share.

    Attributes:
      width: >= 1, nodes that are expanded per level, and children of each. Static.
      levels: >= 1, levels below the root, and forwards of who drafts. Static.
      budget: >= 1, nodes that are judged, the root aside. Static.
    """

    width: int = struct.field(pytree_node=False, default=10)
    levels: int = struct.field(pytree_node=False, default=6)
    budget: int = struct.field(pytree_node=False, default=59)

    @property
    def num_ids(self) -> int:
        """Different tokens that can be drafted."""
        raise NotImplementedError

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        if not 1 <= self.width <= self.num_ids:
            raise ValueError(
                f"width={self.width} must be in [1, {self.num_ids}], the tokens it can draft"
            )
        most = self.width + (self.levels - 1) * self.width**2
        if self.levels < 1 or not 1 <= self.budget <= most:
            raise ValueError(
                f"levels={self.levels} must be at least 1 and budget={self.budget} in [1, {most}], "
                "the nodes that are seen"
            )

    @property
    def is_chain(self) -> bool:
        return False

    @property
    def num_nodes(self) -> int:
        return self.budget + 1

    @property
    def depth(self) -> int:
        return self.levels


def gumbel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, *shape] standard Gumbel noise from a random stream [B, 2] uint32 per row."""
    one = lambda key: jax.random.gumbel(wrap(key), shape)  # noqa: E731
    return jax.vmap(one)(key)
