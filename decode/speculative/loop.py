"""The draft-and-verify loop: propose a tree, judge it with one forward, keep a path of it.

A method is a pytree of choices, whose structure picks the program and whose leaves are data:

    drafter      who proposes what may come next?    decode/drafters/
    acceptance   which of it is kept?                decode/speculative/accept.py
    sampling     what distribution is the text drawn from?    decode/core/sampling.py
    controller   how many drafts are worth judging?           decode/speculative/controller.py

Without a drafter (`NoDraft`) this is plain autoregressive decoding, one token per forward.

Rows are independent: each has its own length, its own accepted path, its own end. What the target
draws at a position follows from the row's key and the position alone, so with `Match` a text
depends neither on the drafter nor on how many drafts are judged, whether it is greedy or drawn.
Between rounds the cache covers all tokens of a row but its last one, the root, which is judged
together with the drafts under it. A token lies in the cache slot of its position.

Letters: B rows, S cache slots, G completion positions, W tree nodes, J largest depth, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core import loop
from decode.core.component import check_numbers
from decode.core.requests import PREFILL, lay_out, read_requests
from decode.core.results import TopTokens, check_top_logprobs
from decode.core.sampling import Sampling, draw
from decode.core.streams import Stream, fold_in
from decode.speculative.accept import AcceptanceRule, Match, Verdict, Walk
from decode.speculative.contracts import Context, Drafter, ExtraRows, Proposal, Seen, no_proposal
from decode.speculative.controller import Controller, ControllerState
from decode.speculative.drafters.no_draft import NoDraft
from decode.speculative.in_place import ask, join
from decode.speculative.tree import DraftTree
from dlm import vocab
from dlm.cache import KVCache, compact, init_cache
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import Params
from dlm.window import Slots, Window
from kernels_pallas.unembed_stats import Noise, logits_stats
from kernels_pallas.window_attention import pack_mask

GREEDY = Sampling(temperature=None)
RULED_OUT = -1e9  # a logit, finite as it may be multiplied
# What `judge_tree` returns.
Judged = tuple[decoder.ForwardOutput, Verdict, jax.Array, TopTokens | None]


class SpeculativeMethod(struct.PyTreeNode):
    """How an autoregressive text is made.

    Attributes:
      drafter: who proposes.
      acceptance: which drafts are kept.
      sampling: the distribution of the text.
      stop_ids: [n] int32. Tokens that end a text, besides the model's end-of-text.
      top_logprobs: >= 0, how many of the most probable tokens are reported per position. Static.
      controller: how many drafts are judged in a round; None: always all. Rows of a batch share
        this choice, so with drawn drafts and `SpeculativeSampling` or `BlockVerification` a text
        follows the same law in any company, but is not the same text.
    """

    drafter: Drafter = NoDraft()
    acceptance: AcceptanceRule = Match()
    sampling: Sampling = GREEDY
    stop_ids: jax.Array | tuple[int, ...] = ()
    top_logprobs: int = struct.field(pytree_node=False, default=0)
    controller: Controller | None = None

    def validate(self, cfg: ModelConfig) -> None:
        """Raises ValueError, in one sentence, unless the choices make sense for the model."""
        self.check_kinds()
        for part in (self.drafter, self.acceptance, self.sampling, self.controller):
            if part is not None:
                part.validate(cfg)
        check_top_logprobs(self.top_logprobs, cfg.vocab_size)
        if cfg.writes_in_place and cfg.mask_token_id is None:
            raise ValueError(
                f"mask_token_id=None must be a token id: with block_len={cfg.block_len} and "
                "shifted_logits=False the model writes where MASK stands"
            )
        for choice in (self.drafter, self.acceptance, self.controller):
            if choice is not None and (reason := choice.refuse(self)):
                raise ValueError(reason)
        for token in np.asarray(self.stop_ids, np.int64):
            if not 0 <= token < cfg.vocab_size:
                raise ValueError(f"stop_ids has {token}, not in [0, vocab_size={cfg.vocab_size})")

    def check_kinds(self) -> None:
        """Raises ValueError unless every choice is of its class, and numbers are numbers."""
        kinds = {"drafter": Drafter, "acceptance": AcceptanceRule, "sampling": Sampling}
        if self.controller is not None:
            kinds["controller"] = Controller
        check_numbers(self)
        for name, kind in kinds.items():
            if not isinstance(part := getattr(self, name), kind):
                raise ValueError(f"{name}={part!r} must be of class {kind.__name__}")
            check_numbers(part)

    @property
    def needs_probs(self) -> bool:
        """Whether [B, W, V] probabilities are made."""
        wanted = self.acceptance.needs_probs or self.drafter.needs_probs
        return wanted or self.sampling.has_filters


class SpeculativeState(struct.PyTreeNode):
    """Everything the loop carries, and everything that is reported afterwards.

    Attributes:
      tokens: [B, S] int32. Prompts and completions from slot 0; behind them there is padding.
      length: [B] int32. Tokens of a row so far.
      prompt_len: [B] int32.
      end: [B] int32. `prompt_len` plus the most tokens to write.
      step_map: [B, G] int32. The row's 0-based round that wrote a token; -1: none did.
      log_prob: [B, G] float32. Of the token, by the target itself: no filter, no temperature.
      num_forwards: [B] int32. Forwards of the target made for the row, those of its prompt aside.
      draft_forwards: [B] int32. Forwards of the draft model.
      acceptance_histogram: [B, J + 1] int32. Rounds by how many drafts they accepted.
      has_stopped: [B] bool.
      occurred: [B, V] bool; None without a repetition penalty. Tokens that came up.
      key: [B, 2] uint32. One random stream per row.
      cache: of the target.
      drafter: the drafter's state.
      top: the n most probable tokens per position written; None: they are not kept.
      control: what the controller has seen and chosen; None without one.
      num_steps: scalar int32. Rounds of the loop, for the whole batch.
      num_read: [B] int32. Tokens of the prompt that the cache holds.
      chunk: prompt tokens read per forward. Static.
    """

    tokens: jax.Array
    length: jax.Array
    prompt_len: jax.Array
    end: jax.Array
    step_map: jax.Array
    log_prob: jax.Array
    num_forwards: jax.Array
    draft_forwards: jax.Array
    acceptance_histogram: jax.Array
    has_stopped: jax.Array
    occurred: jax.Array | None
    key: jax.Array
    cache: KVCache
    drafter: Any
    top: TopTokens | None
    control: ControllerState | None
    num_steps: jax.Array
    num_read: jax.Array
    chunk: int = struct.field(pytree_node=False)


def init_state(
    cfg: ModelConfig,
    method: SpeculativeMethod,
    prompts: Sequence[Sequence[int]],
    *,
    gen_len: int | Sequence[int],
    seeds: int | Sequence[int] = 0,
    prompt_len: int | None = None,
    canvas_len: int | None = None,
    batch_size: int | None = None,
    chunk: int = PREFILL,
) -> SpeculativeState:
    """The state before anything was read.

    Args:
      cfg: the target.
      method: how to decode; checked here.
      prompts: token ids per row, at least one each.
      gen_len: most tokens to write, end-of-text included; one for all rows or one per row.
      seeds: random seed, one for all rows (row i then uses seed + i) or one per row.
      prompt_len: at least the longest prompt; default: just that. Buckets of it save compilations.
      canvas_len: G >= the longest `gen_len`; default: just that.
      batch_size: B >= the number of prompts; the rows added are done from the start.
      chunk: prompt tokens read per forward.

    Raises:
      ValueError: on an empty list or prompt, ids the model does not have, lengths the model does
        not allow, or a method that makes no sense.
    """
    method.validate(cfg)
    asked = read_requests(
        cfg, prompts, gen_len, seeds, prompt_len, canvas_len, batch_size, may_be_empty=False
    )
    P, G, B = asked.P, asked.G, asked.B
    chunk = min(P, chunk)
    W = num_rows(cfg, method)
    # A tree may be judged at the last position, and prompts are read in whole chunks.
    S = max(P + G + W, -(-P // chunk) * chunk)

    rows = lay_out(cfg, prompts, asked.gen_lens, B, S)
    return first_state(cfg, method, *rows, asked.key, G, chunk)


def num_rows(cfg: ModelConfig, method: SpeculativeMethod) -> int:
    """The most positions that a round judges at once: what a cache must have room for."""
    nodes = method.drafter.num_nodes
    return nodes + method.drafter.num_extra + (nodes if cfg.writes_in_place else 0)


@functools.partial(jax.jit, static_argnames=("cfg", "G", "chunk"))
def first_state(
    cfg: ModelConfig, method: SpeculativeMethod, tokens: jax.Array, length: jax.Array,
    end: jax.Array, key: jax.Array, G: int, chunk: int,
) -> SpeculativeState:  # fmt: skip
    """The state of rows of which nothing was read; see `SpeculativeState`.

    One program, as rows that are replaced while others go on wait for it.
    """
    (B, S), drafter = tokens.shape, method.drafter
    zeros = functools.partial(jnp.zeros, B, jnp.int32)
    occurred = None
    if method.sampling.repetition_penalty is not None:
        in_prompt = jnp.where(jnp.arange(S)[None] < length[:, None], tokens, cfg.vocab_size)
        occurred = jnp.zeros((B, cfg.vocab_size), bool)
        occurred = occurred.at[jnp.arange(B)[:, None], in_prompt].set(True, mode="drop")
    return SpeculativeState(
        tokens=jnp.copy(tokens),  # the state is given away, what the host holds is not
        length=jnp.copy(length),
        prompt_len=jnp.copy(length),
        num_read=zeros(),
        end=jnp.copy(end),
        step_map=jnp.full((B, G), -1, jnp.int32),
        log_prob=jnp.zeros((B, G)),
        num_forwards=zeros(),
        draft_forwards=zeros(),
        acceptance_histogram=jnp.zeros((B, drafter.depth + 1), jnp.int32),
        has_stopped=end == length,
        occurred=occurred,
        key=jnp.copy(key),
        cache=init_cache(cfg, B, S),
        drafter=drafter.init(cfg, B, S),
        top=TopTokens.empty((B, G, method.top_logprobs)) if method.top_logprobs else None,
        control=None if method.controller is None else method.controller.init(drafter, B),
        num_steps=jnp.zeros((), jnp.int32),
        chunk=chunk,
    )


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
def prefill(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> SpeculativeState:
    """Reads all prompts but their last tokens, `chunk` positions per forward.

    What every row has read already is not read again, up to a last window that is whole.
    """
    (B, S), chunk = state.tokens.shape, state.chunk
    context = _context(params, method, state)
    first = state.num_read.min()

    def read(i: jax.Array, carry: tuple[KVCache, Any]) -> tuple[KVCache, Any]:
        cache, drafter = carry
        start = jnp.broadcast_to(jnp.minimum(first + i * chunk, S - chunk), B)
        tokens = jax.lax.dynamic_slice_in_dim(state.tokens, start[0], chunk, axis=1)
        count = jnp.clip(state.prompt_len - 1 - start, 0, chunk)
        output = decoder.forward(
            params,
            cfg,
            Window.at(tokens, start, is_causal=True),
            Slots.append(cache, start).replace(length=state.end),
            feature_layers=method.drafter.feature_layers,
        )
        seen = Seen(tokens, output.hidden, start, count, output.features)
        assert output.cache is not None
        return output.cache, method.drafter.prefill(cfg, context, seen, drafter)

    num_chunks = (state.prompt_len.max() - 1 - first + chunk - 1) // chunk
    cache, drafter = jax.lax.fori_loop(0, num_chunks, read, (state.cache, state.drafter))
    return state.replace(cache=cache, drafter=drafter, num_read=state.prompt_len - 1)


def step(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> SpeculativeState:
    """One round. Pure; rows that are done stay as they are."""
    if method.controller is not None:
        return _controlled(params, cfg, method, state)
    return end_round(params, cfg, method, *begin_round(params, cfg, method, state))


def begin_round(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> tuple[SpeculativeState, Proposal, Judged]:
    """The first half of a round: a tree is drafted and judged; nothing is written."""
    with jax.named_scope("draft"):
        proposal = _propose(cfg, method, state, _context(params, method, state))
    state, proposal = _take_cache(state, proposal)
    with jax.named_scope("judge"):
        judged = judge_tree(params, cfg, method, state, proposal)
    return state, proposal, judged


def end_round(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState,
    proposal: Proposal, judged: Judged,
) -> SpeculativeState:  # fmt: skip
    """The second half: of what was judged a path is kept."""
    context = _context(params, method, state)
    return _keep_path(cfg, method, state, context, proposal, judged)


def _controlled(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> SpeculativeState:
    """One round, in which as many drafts are judged as the controller says: one program per width.

    The root alone is one branch, whether somebody drafted or not, unless the drafter has rows of
    its own, which only rounds with drafts read.
    """
    drafter, controller, control = method.drafter, method.controller, state.control
    assert controller is not None and control is not None
    context = _context(params, method, state)
    whole = jnp.arange(drafter.num_nodes, dtype=jnp.int32)[None]
    whole = jnp.broadcast_to(whole, (len(state.length), drafter.num_nodes))
    draft = functools.partial(_propose, cfg, method, state, context)

    def ask(
        carry: tuple[Proposal, jax.Array, jax.Array],
    ) -> tuple[Proposal, jax.Array, jax.Array]:
        before, _ = _take_cache(state.replace(drafter=carry[0].state), carry[0])
        with jax.named_scope("draft"):
            proposal = _propose(cfg, method, before, context.replace(cache=before.cache))
        with jax.named_scope("choose"):
            choice, nodes = controller.choose(drafter, control, proposal, context.active)
        return proposal, choice, nodes

    is_asked = controller.asks(drafter, control, context.active)
    nothing = no_proposal(draft, context, state.drafter), jnp.zeros((), jnp.int32), whole
    proposal, choice, nodes = loop.in_place(is_asked, ask, nothing)
    state, proposal = _take_cache(state, proposal)

    def judge(width: int, has_extra: bool, state: SpeculativeState) -> SpeculativeState:
        kept = jnp.sort(nodes[:, :width], axis=1)
        tree, extra = proposal.tree, proposal.extra if has_extra else None
        if width < drafter.num_nodes:
            tree = tree.take(kept)
            extra = extra and extra.take(kept, drafter.num_extra_beside(width))
        chosen = proposal.replace(tree=tree, extra=extra, state=state.drafter)
        context = _context(params, method, state)
        learn = functools.partial(controller.learn, drafter, control, choice, proposal, kept)
        is_paused = None if has_extra or width > 1 else ~is_asked
        return _settle(cfg, method, state, context, chosen, learn, is_paused)

    has_extra, widths = drafter.num_extra > 0, controller.widths_of(drafter)
    shapes = [(1, False), *((width, has_extra) for width in widths if has_extra or width > 1)]
    at = [0, *(shapes.index((w, has_extra)) for w in widths)]
    chosen = jnp.array(at)[choice]
    state = state.replace(drafter=proposal.state)
    for i, shape in enumerate(shapes):
        state = loop.in_place(chosen == i, functools.partial(judge, *shape), state)
    return state


def _propose(
    cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState, context: Context
) -> Proposal:
    """What the drafter proposes, of tokens that the target has."""
    proposal = method.drafter.propose(cfg, context, state.drafter)
    tree = existing(proposal.tree, method.drafter.depth, cfg.vocab_size)
    return proposal.replace(tree=tree)


def _take_cache(state: SpeculativeState, proposal: Proposal) -> tuple[SpeculativeState, Proposal]:
    """The cache that a drafter has written to is the state's: there is never a second one."""
    if proposal.cache is None:
        return state, proposal
    return state.replace(cache=proposal.cache), proposal.replace(cache=None)


def _settle(
    cfg: ModelConfig,
    method: SpeculativeMethod,
    state: SpeculativeState,
    context: Context,
    proposal: Proposal,
    learn: Callable[[Walk, jax.Array], ControllerState] | None = None,
    is_paused: jax.Array | None = None,
) -> SpeculativeState:
    """The second half of a round: judges n nodes, and keeps a path of them.

    Args:
      cfg, method, state, context: of the round.
      proposal: whose tree is judged.
      learn: what the controller has seen then, of a walk and active rows; None without one.
      is_paused: [] bool. Whether nobody drafted; None: somebody did.
    """
    with jax.named_scope("judge"):
        judged = judge_tree(context.params, cfg, method, state, proposal)
    return _keep_path(cfg, method, state, context, proposal, judged, learn, is_paused)


def _keep_path(
    cfg: ModelConfig,
    method: SpeculativeMethod,
    state: SpeculativeState,
    context: Context,
    proposal: Proposal,
    judged: Judged,
    learn: Callable[[Walk, jax.Array], ControllerState] | None = None,
    is_paused: jax.Array | None = None,
) -> SpeculativeState:
    """Keeps a path of n nodes that were `judged`; the other arguments are those of `_settle`."""
    drafter, tree, extra = method.drafter, proposal.tree, proposal.extra
    output, verdict, log_probs, top = judged
    n = tree.tokens.shape[1]
    depth = min(drafter.depth, n - 1)
    with jax.named_scope("accept"):
        walk = method.acceptance.walk(verdict, depth)
        rest = ((0, 0), (0, drafter.depth - depth))
        walk = walk.replace(path=jnp.pad(walk.path, rest, mode="edge"))
    with jax.named_scope("commit"):
        start, cache = state.length - 1, output.cache
        assert cache is not None
        if not drafter.is_chain and n > 1:
            cache = compact(cache, start, walk.path)
        of_path = lambda x: jnp.take_along_axis(x, walk.path[..., None], axis=1)  # noqa: E731
        seen = Seen(
            tokens=jnp.take_along_axis(tree.tokens, walk.path, axis=1),
            hidden=of_path(output.hidden),
            start=start,
            count=walk.num_accepted + 1,
            features=None if output.features is None else of_path(output.features),
            tree_hidden=output.hidden[:, :n],
            tree=tree,
            chosen=verdict.chosen,
            extra_hidden=None if extra is None else output.hidden[:, -extra.tokens.shape[1] :],
            best=None if top is None else top.tokens[..., : drafter.num_best],
            last=walk.path[:, -1],
            probs=verdict.probs if drafter.needs_probs else None,
        )
        control = state.control if learn is None else learn(walk, context.active)
        if top is not None:
            top = jax.tree.map(lambda x: x[..., : method.top_logprobs], top)
        state = commit(cfg, method, state, proposal, walk, log_probs, top)
        remembers = _observe(cfg, drafter, context, seen, proposal.state, is_paused)
    return state.replace(cache=cache, drafter=remembers, control=control)


def _observe(
    cfg: ModelConfig,
    drafter: Drafter,
    context: Context,
    seen: Seen,
    state: Any,
    is_paused: jax.Array | None,
) -> Any:
    """What the drafter remembers."""
    observe, pause = (
        functools.partial(see, cfg, context, seen) for see in (drafter.observe, drafter.pause)
    )
    if is_paused is None or not drafter.notices_pauses:
        return observe(state)
    if drafter.num_extra:  # its rows were not read
        return pause(state)
    return loop.in_place(~is_paused, observe, loop.in_place(is_paused, pause, state))


@functools.partial(jax.jit, static_argnames=("cfg",))
def drafted(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> DraftTree:
    """What the next round will judge, if no controller chooses among it; the state stays."""
    return _propose(cfg, method, state, _context(params, method, state)).tree


decode = loop.compile_decode(step)  # its arguments are said there
_step_jitted = loop.compile_step(step)


def stream(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> Iterator[SpeculativeState]:
    """Yields the state after every round: the same rounds as `decode`, at Python's pace.

    A yielded state must be read before the next one is asked for: its buffers are donated.
    """
    return loop.stream(_step_jitted, params, cfg, method, state)


def _context(params: Params, method: SpeculativeMethod, state: SpeculativeState) -> Context:
    return Context(
        params=params,
        tokens=state.tokens,
        length=state.length,
        key=fold_in(fold_in(state.key, state.num_forwards), Stream.DRAFT),
        sampling=method.sampling,
        active=~state.has_stopped,
        cache=state.cache,
        end=state.end,
        prompt_len=state.prompt_len,
        may_pause=method.controller is not None,
    )


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
    elif probs is not None:
        chosen = jax.vmap(draw, 1, 1)(by_node, probs)
    else:
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


def commit(
    cfg: ModelConfig,
    method: SpeculativeMethod,
    state: SpeculativeState,
    proposal: Proposal,
    walk: Walk,
    log_probs: jax.Array,
    top: TopTokens | None,
) -> SpeculativeState:
    """Writes what was accepted and the token behind it, up to an end."""
    tree = proposal.tree
    B, G = state.step_map.shape
    J = walk.path.shape[1] - 1
    index = jnp.arange(J + 1)[None]
    drafts = jnp.take_along_axis(tree.tokens, jnp.roll(walk.path, -1, axis=1), axis=1)
    written = jnp.where(index < walk.num_accepted[:, None], drafts, walk.bonus[:, None])
    ids = jnp.asarray(method.stop_ids, jnp.int32).reshape(-1)
    ids = jnp.append(ids, jnp.asarray(cfg.eos_ids, jnp.int32))
    is_end = (written[..., None] == ids[None, None]).any(axis=-1)
    count = jnp.minimum(walk.num_accepted + 1, state.end - state.length)
    has_end = (is_end & (index < count[:, None])).any(axis=1)
    count = jnp.where(has_end, jnp.argmax(is_end, axis=1) + 1, count)
    active = ~state.has_stopped
    count = jnp.where(active, count, 0)

    rows = jnp.arange(B)[:, None]
    is_new = index < count[:, None]
    slot = jnp.where(is_new, state.length[:, None] + index, state.tokens.shape[1])
    place = jnp.where(is_new, state.length[:, None] - state.prompt_len[:, None] + index, G)
    of_path = log_probs[rows, walk.path]  # [B, J + 1] or [B, J + 1, V]
    if of_path.ndim == 3:
        of_path = jnp.take_along_axis(of_path, written[..., None], axis=2)[..., 0]
    reported = state.top
    if reported is not None and top is not None:
        best = jax.tree.map(lambda x: x[rows, walk.path], top)
        reported = reported.put(rows, place, best.tokens, best.log_probs)
    length = state.length + count
    accepted = jax.nn.one_hot(walk.num_accepted, J + 1, dtype=jnp.int32)
    occurred = state.occurred
    if occurred is not None:
        occurred = occurred.at[rows, jnp.where(is_new, written, cfg.vocab_size)].set(
            True, mode="drop"
        )
    return state.replace(
        tokens=state.tokens.at[rows, slot].set(written, mode="drop"),
        length=length,
        step_map=state.step_map.at[rows, place].set(state.num_forwards[:, None], mode="drop"),
        log_prob=state.log_prob.at[rows, place].set(of_path, mode="drop"),
        num_forwards=state.num_forwards + active,
        draft_forwards=state.draft_forwards + proposal.cost * active,
        acceptance_histogram=state.acceptance_histogram + accepted * active[:, None],
        has_stopped=state.has_stopped | has_end | (length >= state.end),
        occurred=occurred,
        top=reported,
        num_steps=state.num_steps + 1,
    )
