"""DFlash: a small diffusion model drafts a whole block in one forward.

Reference: Chen et al., arXiv:2602.06036; see `dlm.heads.dflash`. The network's cache holds a
context row for every position before the root, made of what the target saw there; its block begins
at the root, and nothing of the block is kept. The drafts, a chain, are drawn independently of each
other given the context; those of a published DFlash 2 one after the other, each among the best
tokens of its slot.

Letters: B rows, b block length, V vocabulary, J drafts, K candidates per draft, D width of the
target.
"""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.sampling import draw
from decode.core.streams import wrap
from decode.speculative.contracts import Context, Drafter, Marginals, Proposal, Seen, spent
from decode.speculative.drafters.heads import check_fit, place_cache
from decode.speculative.tree import TreeShape, chain
from dlm import vocab
from dlm.cache import KVCache, write
from dlm.config import ModelConfig
from dlm.heads.dflash import DFlashHeads, DFlashNetwork
from dlm.params import Params


@struct.dataclass
class DFlash(Drafter):
    """A block of a trained diffusion model, from one forward, as a chain; most probable or drawn.

    Attributes:
      network: of `dlm.heads.dflash.load`.
      num_drafts: >= 0, how many of its b - 1 tokens are judged; 0: all. Static.
      is_sampled: whether they are drawn from the network's distributions, for
        `SpeculativeSampling` and `BlockVerification`; else they are its most probable tokens (as
        published). Static.
    """

    network: DFlashNetwork
    num_drafts: int = struct.field(pytree_node=False, default=0)
    is_sampled: bool = struct.field(pytree_node=False, default=False, kw_only=True)

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        heads = DFlashHeads(n_layers=1, block_len=4, mask_id=cfg.pad_token_id)
        own = heads.fresh(jax.random.key(0), cfg, params)
        return cls(heads.network(cfg, own))

    def validate(self, cfg: ModelConfig) -> None:
        layers = self.network.cfg
        check_fit(layers.vocab_size, layers.d_model, self.feature_layers, cfg)
        most = self.network.block_len - 1
        if not 0 <= self.num_drafts <= most:
            raise ValueError(
                f"num_drafts={self.num_drafts} must be in [0, {most}]: the network's block has "
                f"{most + 1} positions with the root"
            )

    @property
    def shape(self) -> TreeShape:
        return chain(self.num_drafts or self.network.block_len - 1)

    @property
    def num_marginals(self) -> int:
        """None if drafts are drawn. Of a DFlash 2: those that its candidates are chosen by."""
        return 0 if self.is_sampled else self.depth

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.network.feature_layers

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> KVCache:
        """The context's keys and values, a slot per position."""
        return place_cache(self.network.cfg, batch_size, num_slots)

    def prefill(self, cfg: ModelConfig, context: Context, seen: Seen, state: KVCache) -> KVCache:
        return self.observe(cfg, context, seen, state)

    def observe(self, cfg: ModelConfig, context: Context, seen: Seen, state: KVCache) -> KVCache:
        """Context rows of all positions seen; what is behind `seen.count` is overwritten later."""
        assert seen.features is not None
        place = seen.start[:, None] + jnp.arange(seen.features.shape[1])[None]
        new = self.network.keys_values(self.network.context(seen.features), place)
        return write(state, new, seen.start)

    def propose(self, cfg: ModelConfig, context: Context, state: KVCache) -> Proposal:
        root, hidden, drawn_from = context.root, self._read(context, state), None
        sampling = context.sampling
        is_drawn = self.is_sampled and sampling.temperature is not None
        if self.network.num_candidates:
            drafts, drawn_from = self._walk(context, hidden, is_drawn)
        elif is_drawn:
            logits = self.network.logits(context.params, hidden)
            drawn_from = sampling.replace(repetition_penalty=None).probs(logits)
            drafts = draw(context.key, drawn_from)
        else:
            drafts = vocab.read(vocab.head(context.params), hidden).token
        probs = None
        if drawn_from is not None:
            probs = jnp.pad(drawn_from, ((0, 0), (0, 1), (0, 0)))  # the last node has no child
        tokens = jnp.concatenate([root[:, None], drafts], axis=1)
        return Proposal(self.shape.tree(tokens, probs=probs), spent(context, 1), state)

    def marginals(self, cfg: ModelConfig, context: Context, state: KVCache, k: int) -> Marginals:
        k = min(k, self.network.cfg.vocab_size)
        tokens, log_probs = self.network.best(context.params, self._read(context, state), k)
        return Marginals(tokens, log_probs, spent(context, 1), state)

    def _read(self, context: Context, state: KVCache) -> jax.Array:
        """Final states [B, J, D] of the slots that are drafted."""
        hidden = self.network.read(context.params, context.root, context.length - 1, state)
        return hidden[:, 1 : self.depth + 1]

    def _walk(
        self, context: Context, hidden: jax.Array, is_drawn: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Drafts [B, J], each given the one before, and their laws [B, J, V] if they are drawn.

        The laws know temperature only, as published: no top-k and no top-p.
        """
        network, params = self.network, context.params
        logits, ids = network.candidates(params, hidden)  # [B, J, K]
        noise = jnp.zeros_like(logits)
        if is_drawn:
            shape = logits.shape[1:]
            noise = jax.vmap(lambda key: jax.random.gumbel(wrap(key), shape))(context.key)

        def step(previous: jax.Array, slot: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
            hidden, logits, ids, noise = slot
            scores = logits + network.edges(hidden, ids, previous)
            if is_drawn:
                assert context.sampling.temperature is not None
                scores = scores / context.sampling.temperature
            best = jnp.argmax(scores + noise, axis=-1)[:, None]
            token = jnp.take_along_axis(ids, best, axis=1)[:, 0]
            return token, (token, jax.nn.softmax(scores))

        slots = tuple(x.swapaxes(0, 1) for x in (hidden, logits, ids, noise))
        drafts, law = jax.tree.map(
            lambda x: x.swapaxes(0, 1), jax.lax.scan(step, context.root, slots)[1]
        )
        if not is_drawn:
            return drafts, None
        rows, places = (jnp.arange(n) for n in drafts.shape)
        probs = jnp.zeros((*drafts.shape, network.cfg.vocab_size), jnp.float32)
        return drafts, probs.at[rows[:, None, None], places[None, :, None], ids].set(law)
