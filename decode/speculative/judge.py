"""The judging half of a round: what the target says of a tree of drafts.

Letters: B rows, W tree nodes, T window positions, D model width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from decode.core.results import TopTokens
from decode.core.sampling import draw
from decode.core.streams import Stream, fold_in
from decode.speculative.accept import Verdict
from decode.speculative.contracts import ExtraRows, Proposal
from decode.speculative.in_place import ask, join
from decode.speculative.method import SpeculativeMethod
from decode.speculative.state import SpeculativeState
from decode.speculative.tree import DraftTree
from dlm import vocab
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import Params
from dlm.window import Slots, Window
from kernels_pallas.unembed_stats import Noise, logits_stats
from kernels_pallas.window_attention import pack_mask

RULED_OUT = -1e9  # a logit, finite as it may be multiplied
# What `judge_tree` returns.
Judged = tuple[decoder.ForwardOutput, Verdict, jax.Array, TopTokens | None]


def existing(tree: DraftTree, depth: int, vocab_size: int) -> DraftTree:
    """The tree without nodes whose token the target does not have, and those below them."""
    is_known = (tree.tokens >= 0) & (tree.tokens < vocab_size)
    is_missing = ~(tree.is_valid & is_known)
    is_valid = ~(tree.ancestors(depth) & is_missing[:, None]).any(axis=2)
    return tree.replace(is_valid=is_valid, tokens=jnp.where(is_known, tree.tokens, 0))


def judge_tree(
    params: Params,
    cfg: ModelConfig,
    method: SpeculativeMethod,
    state: SpeculativeState,
    proposal: Proposal,
) -> Judged:
    """One forward over the tree, whose nodes see those above them, and extra rows.

    Returns:
      The forward, whose cache has the tree's keys and values behind its last token, the verdict on
      the tree, the log-probabilities of the arg-max [B, W] or of all tokens [B, W, V], and the
      most probable tokens after each node [B, W, k], as many as anybody wants to see.
    """
    start, tree = state.length - 1, proposal.tree
    W = tree.tokens.shape[1]
    above, extra = tree.ancestors(min(method.drafter.depth, W - 1)), proposal.extra
    if extra is not None:
        params = method.drafter.params_of_extra(params, W)
    if cfg.writes_in_place:
        assert cfg.mask_token_id is not None
        extra = join(ask(tree, above, cfg.mask_token_id), extra)
    output = decoder.forward(
        params,
        cfg,
        _window(tree, extra, above, start, method.drafter.is_chain),
        Slots.append(state.cache, start, ~state.has_stopped).replace(length=state.end),
        feature_layers=method.drafter.feature_layers,
    )
    return output, *read_tree(params, cfg, method, state, tree, output.hidden)


def read_tree(
    params: Params,
    cfg: ModelConfig,
    method: SpeculativeMethod,
    state: SpeculativeState,
    tree: DraftTree,
    hidden: jax.Array,
    allowed: jax.Array | None = None,
) -> tuple[Verdict, jax.Array, TopTokens | None]:
    """What a forward over a tree says: all but the forward of what `judge_tree` returns.

    Args:
      params, cfg, method, state: of the round.
      tree: what was judged.
      hidden: [B, T, D]. Final states of its nodes and of the rows behind them.
      allowed: [B, W, V] bool. Tokens that may stand behind each node, one at least; the others
        are left out before any filter, and what is drawn is drawn with the same random numbers.
        What is reported is of the model itself. None: all.
    """
    start, W = state.length - 1, tree.tokens.shape[1]
    own, banned = hidden[:, :W], None
    if cfg.writes_in_place:
        own, banned = hidden[:, W : 2 * W], jnp.array([cfg.mask_token_id])
    key = fold_in(fold_in(state.key, state.num_forwards), Stream.ACCEPT)
    by_node = jax.vmap(lambda position: fold_in(fold_in(state.key, position), Stream.TARGET), 1, 1)(
        start[:, None] + tree.depths
    )  # [B, W, 2]
    sampling, probs, top = method.sampling, None, None
    num_best, noise = max(method.top_logprobs, method.drafter.num_best), None
    if sampling.temperature is not None:
        noise = Noise(by_node, jnp.float32(sampling.temperature))
    if not method.needs_probs and allowed is None:
        stats = vocab.read(vocab.head(params), own, banned_ids=banned, noise=noise, k=num_best)
        chosen = stats.token if noise is None else stats.sample
        log_probs = stats.log_prob if noise is None else stats.sample_log_prob
        assert chosen is not None and log_probs is not None
        if stats.top_tokens is not None and stats.top_log_probs is not None:
            top = TopTokens(stats.top_tokens, stats.top_log_probs)
        return Verdict(tree=tree, chosen=chosen, probs=None, key=key), log_probs, top
    logits = vocab.logits(vocab.head(params), own, banned_ids=banned)
    log_probs = jax.nn.log_softmax(logits)
    if num_best:
        best, tokens = jax.lax.top_k(log_probs, num_best)
        top = TopTokens(tokens, best)
    if allowed is not None:
        logits = jnp.where(allowed, logits, RULED_OUT)
    if method.needs_probs:
        occurred = None
        if state.occurred is not None:  # what came before a node: the text, and the nodes above it
            above = tree.ancestors(min(method.drafter.depth, W - 1))
            of_tree = jax.nn.one_hot(tree.tokens, cfg.vocab_size, dtype=logits.dtype)
            occurred = state.occurred[:, None] | (above.astype(logits.dtype) @ of_tree > 0)
        probs = sampling.probs(logits, occurred)
    if noise is None:
        chosen = jnp.argmax(logits if probs is None else probs, axis=-1).astype(jnp.int32)
    elif sampling.has_filters:
        assert probs is not None
        chosen = jax.vmap(draw, 1, 1)(by_node, probs)
    else:  # as where nobody wants to see probabilities: drafters change no text
        flat = Noise(by_node.reshape(-1, 2), noise.temperature)
        sample = logits_stats(logits.reshape(-1, cfg.vocab_size), noise=flat).sample
        assert sample is not None
        chosen = sample.reshape(tree.tokens.shape)
    return Verdict(tree=tree, chosen=chosen, probs=probs, key=key), log_probs, top


def _window(
    tree: DraftTree, extra: ExtraRows | None, above: jax.Array, start: jax.Array, is_chain: bool
) -> Window:
    """The nodes of a tree, whose root is at position start [B], and rows that nobody else sees."""
    if extra is None:
        mask = None if is_chain else pack_mask(above)
        return Window(tree.tokens, start[:, None] + tree.depths, mask, is_causal=is_chain)
    (B, W), E = tree.tokens.shape, extra.tokens.shape[1]
    blind = jnp.pad(above, ((0, 0), (0, 0), (0, E)))
    offsets = jnp.concatenate([tree.depths, extra.offsets], axis=1)
    mix = None
    if extra.vectors is not None:
        behind = ((0, 0), (W, 0))
        mix = jnp.pad(jnp.ones((B, E)), behind), jnp.pad(extra.vectors, (*behind, (0, 0)))
    return Window(
        jnp.concatenate([tree.tokens, extra.tokens], axis=1),
        start[:, None] + offsets,
        pack_mask(jnp.concatenate([blind, extra.sees], axis=1)),
        mix=mix,
    )
