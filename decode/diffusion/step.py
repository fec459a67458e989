"""One round of masked-diffusion decoding: what the model says, and what the method makes of it.

`judge` runs the model and says what it thinks of each row's window; `apply` lets the method's
components decide and writes down what they decided.

Letters: B rows, P padded prompt length, G completion positions, S = P + G, W window positions, D
model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from decode.core.streams import wrap
from decode.diffusion.caches.canvas import Canvas
from decode.diffusion.method import DiffusionMethod
from decode.diffusion.round import Frame, Progress, Revision, Round, surest
from decode.diffusion.state import ComponentStates, DiffusionState
from dlm import vocab
from dlm.config import ModelConfig
from dlm.params import Params
from dlm.sharding import constrain
from kernels_pallas.unembed_stats import Noise, VocabStats, logits_stats

Tree = TypeVar("Tree")


def judge(
    params: Params, cfg: ModelConfig, method: DiffusionMethod, state: DiffusionState
) -> tuple[Round, Any, jax.Array]:
    """One forward: the round for the components to see, the cache, and the rows [B] served."""
    frame = make_frame(cfg, method, state)
    hidden, cache, served = _forward(params, cfg, method, state, frame)
    return _read_round(params, cfg, method, state, frame, hidden), cache, served


def apply(
    cfg: ModelConfig,
    method: DiffusionMethod,
    state: DiffusionState,
    round: Round,
    served: jax.Array,
) -> DiffusionState:
    """Lets the components decide on a round, and writes down what they decide."""
    P, G = state.prompt_len, state.step_map.shape[1]
    round, revision, ends, components = _choose(method, round, state)
    window = _Window(round.index[:, 0], round.index.shape[1], G)
    commit = revision.commit & served[:, None]
    proposal = round.proposal if revision.proposal is None else revision.proposal
    tokens = window.put(state.tokens[:, P:], commit, proposal)
    step_map = window.put(state.step_map, commit, state.row_step[:, None])
    log_prob = window.put(state.log_prob, commit, round.log_prob)
    confidence = window.put(state.confidence, commit, jnp.exp(round.confidence))
    top = state.top
    if top is not None:
        assert round.stats.top_tokens is not None and round.stats.top_log_probs is not None
        where = window.places(commit)
        top = top.put(*where, round.stats.top_tokens, round.stats.top_log_probs)
    if revision.take_back is not None:
        take_back = revision.take_back & served[:, None] & (commit | ~round.undecided)
        tokens = window.put(tokens, take_back, mask_id(cfg))
        step_map = window.put(step_map, take_back, -1)

    took_part = served.astype(jnp.int32)
    new = state.replace(
        tokens=jax.lax.dynamic_update_slice(state.tokens, tokens, (0, P)),
        step_map=step_map,
        log_prob=log_prob,
        confidence=confidence,
        end=jnp.where(served, P + ends, state.end),
        block_end=jnp.where(served, P + jnp.minimum(round.block_end, ends), state.block_end),
        num_open=jnp.where(served, round.num_open, state.num_open),
        row_step=state.row_step + took_part,
        block_step=state.block_step + took_part,
        num_forwards=state.num_forwards + took_part * (1 if method.guidance is None else 2),
        components=select_rows(served, components, state.components),
        num_steps=state.num_steps + 1,
        top=top,
    )
    held = None if revision.hold is None else revision.hold | ~served  # who waits holds, too
    return _advance(cfg, method, new, held)


def _forward(
    params: Params,
    cfg: ModelConfig,
    method: DiffusionMethod,
    state: DiffusionState,
    frame: Frame,
) -> tuple[jax.Array, Any, jax.Array]:
    """Hidden states that predict the W positions of `frame`, the cache, and the rows served.

    [B, W, D], or [B, 2 W, D] with a shadow: the same positions again, as MASK sees them.

    Guidance doubles the rows: the second half sees MASK in place of its prompt. Logits are linear
    in hidden states, so the two are mixed here, in float32, and nothing else knows of it.
    """
    P, G, W = state.prompt_len, state.step_map.shape[1], frame.index.shape[1]
    start = P + frame.index[:, 0]
    every = jnp.broadcast_to(jnp.arange(G)[None], state.step_map.shape)
    noise_key = _noise_key(state.key, state.row_step, every)
    shown = method.inputs.see(cfg, state.tokens[:, P:], state.step_map < 0, noise_key)
    tokens = jax.lax.dynamic_update_slice(state.tokens, shown, (0, P))
    canvas = Canvas(
        tokens=constrain(tokens, "batch", None),
        start=state.start,
        end=state.end,
        block_start=state.block_start,
        block_end=state.block_end,
        is_active=~state.has_stopped,
        block_is_new=state.block_step == 0,
        undecided=jnp.pad(state.step_map < 0, ((0, 0), (P, 0))),
        mix=_spread_mix(method, state, frame),
        window_start=start,
        prompt_len=state.prompt_len,
        has_shadow="shadow" in method.needs,
    )
    if method.guidance is None:
        return method.cache.judge(params, cfg, canvas, W, state.cache)
    B = state.tokens.shape[0]
    in_prompt = (jnp.arange(state.tokens.shape[1]) < state.prompt_len)[None]
    if state.given is not None:
        in_prompt |= jnp.pad(state.given, ((0, 0), (P, 0)))
    blind = canvas.replace(tokens=jnp.where(in_prompt, mask_id(cfg), tokens))
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), canvas, blind)
    hidden, cache, served = method.cache.judge(params, cfg, both, W, state.cache)
    sighted, blinded = hidden[:B].astype(jnp.float32), hidden[B:].astype(jnp.float32)
    return blinded + (method.guidance + 1) * (sighted - blinded), cache, served[:B]


def _spread_mix(
    method: DiffusionMethod, state: DiffusionState, frame: Frame
) -> tuple[jax.Array, jax.Array] | None:
    """What embeddings of the window are mixed with, laid out over the canvas [B, S]."""
    mix = method.inputs.mix(frame, state.components.inputs)
    if mix is None:
        return None
    B, S = state.tokens.shape
    place = jnp.where(frame.index < frame.gen_len[:, None], state.prompt_len + frame.index, S)
    rows = jnp.arange(B)[:, None]
    weight, vectors = mix
    return (
        jnp.zeros((B, S), jnp.float32).at[rows, place].set(weight, mode="drop"),
        jnp.zeros((B, S, vectors.shape[-1]), jnp.float32).at[rows, place].set(vectors, mode="drop"),
    )


def make_frame(cfg: ModelConfig, method: DiffusionMethod, state: DiffusionState) -> Frame:
    """The round as far as it is known without a forward."""
    P, G = state.prompt_len, state.step_map.shape[1]
    block_start, block_end = state.block_start - P, state.block_end - P
    offset = jnp.zeros_like(block_start) if method.width == "canvas" else block_start
    window = _Window(offset, method.window_len(G), G)
    is_there = window.index < (state.end - P)[:, None]
    undecided = (window.get(state.step_map) < 0) & is_there
    in_block = (window.index >= block_start[:, None]) & (window.index < block_end[:, None])
    if state.given is not None:
        in_block &= ~window.get(state.given)
    temperature = method.temperature
    return Frame(
        tokens=window.get(state.tokens[:, P:]),
        eligible=undecided & in_block,
        undecided=undecided,
        in_block=in_block,
        noise_key=_noise_key(state.key, state.row_step, window.index),
        temperature=None if temperature is None else jnp.asarray(temperature, jnp.float32),
        index=window.index,
        block_start=block_start,
        block_end=block_end,
        block_step=state.block_step,
        row_step=state.row_step,
        num_open=state.num_open,
        gen_len=state.end - P,
        prompt_len=P - state.start,
        occurred=_occurred(cfg, state) if "occurred" in method.needs else None,
    )


def _occurred(cfg: ModelConfig, state: DiffusionState) -> jax.Array:
    """[B, V] bool: tokens that stand in the prompt or at a decided position."""
    B, S = state.tokens.shape
    decided = jnp.pad(
        state.step_map >= 0, ((0, 0), (state.prompt_len, 0)), constant_values=True
    ) & (jnp.arange(S)[None] >= state.start[:, None])
    place = jnp.where(decided, state.tokens, cfg.vocab_size)  # out of bounds: dropped
    none = jnp.zeros((B, cfg.vocab_size), bool)
    return none.at[jnp.arange(B)[:, None], place].set(True, mode="drop")


def reframe(round: Round, frame: Frame) -> Round:
    """What was judged, of a later frame of the same canvas."""
    return round.replace(**vars(frame), confidence=round.log_prob)


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What can be read off a forward.

    Attributes:
      frame: the round before the forward.
      hidden: [B, W, D].
      shadow: [B, W, D] of the shadow; [B, 0, D] if there is none.
      logits: [B, W, V] float32; None unless somebody needs them.
    """

    params: Params
    cfg: ModelConfig
    method: DiffusionMethod
    components: ComponentStates
    frame: Frame
    hidden: jax.Array
    shadow: jax.Array
    logits: jax.Array | None


def _expected(reading: _Reading) -> jax.Array:
    assert reading.logits is not None
    B, W, V = reading.logits.shape
    probs = jax.nn.softmax(reading.logits).reshape(B * W, V)
    return jnp.dot(probs, reading.params["embed"].astype(probs.dtype)).reshape(B, W, -1)


def _shadow_log_prob(reading: _Reading) -> jax.Array:
    logits, given = _logits(reading, reading.shadow), reading.frame.tokens[..., None]
    stats = _stats(reading, reading.shadow, logits, None, given)
    assert stats.given_log_probs is not None
    return stats.given_log_probs[..., 0]


# By need: the field of `Round` that serves it, and how it is read.
_FIELDS: dict[str, tuple[str, Callable[[_Reading], jax.Array | None]]] = {
    "logits": ("logits", lambda reading: reading.logits),
    "expected": ("expected", _expected),
    "shadow": ("shadow_log_prob", _shadow_log_prob),
}


def _read_round(
    params: Params,
    cfg: ModelConfig,
    method: DiffusionMethod,
    state: DiffusionState,
    frame: Frame,
    hidden: jax.Array,
) -> Round:
    """What hidden states [B, W, D], or [B, 2 W, D] with a shadow, say of a frame."""
    B, W = frame.tokens.shape
    reading = _Reading(
        params, cfg, method, state.components, frame, hidden[:, :W], hidden[:, W:], None
    )
    reading = dataclasses.replace(reading, logits=_logits(reading, reading.hidden))
    noise, given = None, None
    if frame.temperature is not None:
        noise = Noise(key=frame.noise_key.reshape(B * W, 2), temperature=frame.temperature)
    if "given" in method.needs:
        given = method.confidence.given_ids(state.components.confidence)
    standing = None
    if "standing" in method.needs:
        tokens = frame.tokens[..., None]
        given = tokens if given is None else jnp.concatenate([given, tokens], axis=-1)
    stats = _stats(reading, reading.hidden, reading.logits, noise, given)
    if "standing" in method.needs:
        assert stats.given_log_probs is not None
        standing = stats.given_log_probs[..., -1]
        stats = stats.replace(given_log_probs=stats.given_log_probs[..., :-1])
    proposal = stats.token if stats.sample is None else stats.sample
    log_prob = stats.log_prob if stats.sample is None else stats.sample_log_prob
    assert log_prob is not None
    served = (read for need, read in _FIELDS.items() if need in method.needs)
    fields: dict[str, Any] = {field: read(reading) for field, read in served}
    return Round(
        **vars(frame),
        proposal=proposal,
        log_prob=log_prob,
        confidence=log_prob,
        stats=stats,
        standing_log_prob=standing,
        **fields,
    )


def _logits(reading: _Reading, hidden: jax.Array) -> jax.Array | None:
    """[B, W, V] float32 of hidden states [B, W, D], as constraints leave them, if needed."""
    if "logits" not in reading.method.needs:
        return None
    constraint = reading.method.constraint
    banned = constraint.banned_ids(reading.cfg)
    logits = vocab.logits(vocab.head(reading.params), hidden, banned_ids=banned)
    if "logits" in constraint.needs:
        state = reading.components.constraint
        logits = constraint.mask_logits(reading.frame, logits, state)
    return logits


def _stats(
    reading: _Reading,
    hidden: jax.Array,
    logits: jax.Array | None,
    noise: Noise | None,
    given_ids: jax.Array | None,
) -> VocabStats:
    """What hidden states [B, W, D], or their logits, say about the vocabulary, each [B, W, ...]."""
    B, W, D = hidden.shape
    given_ids = None if given_ids is None else given_ids.reshape(B * W, -1)
    if logits is not None:
        stats = logits_stats(
            logits.reshape(B * W, -1), noise=noise, k=reading.method.top_logprobs,
            given_ids=given_ids,
        )  # fmt: skip
    else:
        stats = vocab.read(
            vocab.head(reading.params),
            hidden.reshape(B * W, D),
            banned_ids=reading.method.constraint.banned_ids(reading.cfg),
            noise=noise,
            k=reading.method.top_logprobs,
            given_ids=given_ids,
        )
    return jax.tree.map(lambda x: x.reshape(B, W, *x.shape[1:]), stats)


def _choose(
    method: DiffusionMethod, round: Round, state: DiffusionState
) -> tuple[Round, Revision, jax.Array, ComponentStates]:
    """Runs the components: the round judged, what to commit, where rows end [B], their states."""
    states = state.components
    inputs = method.inputs.remember(round, states.inputs)
    round = method.constraint.propose(round, states.constraint)
    round, confidence = method.confidence.measure(round, states.confidence)
    eligible, block_end, scheduler = method.scheduler.focus(round, states.scheduler)
    in_block = round.in_block & (round.index < block_end[:, None])
    opened = (round.undecided & in_block).sum(axis=-1)
    round = round.replace(
        eligible=eligible & round.eligible,
        in_block=in_block,
        block_end=block_end,
        num_open=jnp.where(round.block_step == 0, opened, round.num_open),
    )
    commit, rule = method.rule.commit(round, states.rule)
    commit &= round.eligible
    if "idle" not in method.needs:
        idle = ~commit.any(axis=-1, keepdims=True)
        commit |= idle & surest(round.confidence, round.eligible)
    revision, reviser = method.reviser.revise(round, commit, states.reviser)
    done, stopper = method.stopper.fill(round, states.stopper)
    if done is not None:
        revision = _fill(round, revision, done)
    commit, constraint = method.constraint.accept(round, revision.commit, states.constraint)
    revision = revision.replace(commit=commit)
    ends = method.stopper.cut(round, revision.commit, stopper)
    ends = round.gen_len if ends is None else jnp.minimum(ends, round.gen_len)
    if state.given is not None:
        ends = jnp.maximum(ends, _behind(state.given))
    return (
        round,
        revision,
        ends,
        ComponentStates(
            scheduler=scheduler,
            confidence=confidence,
            rule=rule,
            reviser=reviser,
            stopper=stopper,
            constraint=constraint,
            inputs=inputs,
        ),
    )


def _fill(round: Round, revision: Revision, done: jax.Array) -> Revision:
    """Commits everything that is undecided in rows that are `done` [B], and nothing else there."""
    take_back, hold, proposal = revision.take_back, revision.hold, revision.proposal
    return Revision(
        commit=jnp.where(done[:, None], round.undecided, revision.commit),
        take_back=None if take_back is None else take_back & ~done[:, None],
        hold=None if hold is None else hold & ~done,
        proposal=None if proposal is None else jnp.where(done[:, None], round.proposal, proposal),
    )


def _advance(
    cfg: ModelConfig, method: DiffusionMethod, state: DiffusionState, held: jax.Array | None
) -> DiffusionState:
    """Opens the next block of rows whose block is full, and ends rows that are done."""
    P, G = state.prompt_len, state.step_map.shape[1]
    position = P + jnp.arange(G)[None]
    decided = state.step_map >= 0
    open_now = (position >= state.block_start[:, None]) & (position < state.block_end[:, None])
    is_full = ~(open_now & ~decided).any(axis=-1) & (state.block_step > 0)
    if "second look" in method.needs:
        is_full &= state.block_step > 1
    if held is not None:
        is_full &= ~held
    completion = state.tokens[:, P:]
    if state.given is not None:  # no text ends in front of what must follow
        completion = jnp.where(position < P + _behind(state.given)[:, None], -1, completion)
    progress = Progress(
        completion=completion,
        decided=decided,
        block_start=state.block_start - P,
        block_end=state.block_end - P,
        end=state.end - P,
        is_full=is_full,
        prompt_len=P - state.start,
    )
    start, end = method.scheduler.advance(progress)
    if state.given is not None:
        start, end = _pass_full(method, progress, start, end)
    filled = (start >= progress.end) | (is_full & _is_complete(progress))
    early = method.stopper.should_stop(progress, method.end_ids(cfg))
    early &= ~filled & ~state.has_stopped
    return state.replace(
        block_start=P + start,
        block_end=P + end,
        block_step=jnp.where(start == progress.block_start, state.block_step, 0),
        has_stopped=state.has_stopped | filled | early,
        stopped_early=state.stopped_early | early,
    )


def _behind(given: jax.Array) -> jax.Array:
    """[B]: past the last completion position that was given; 0: none was."""
    return (given * (1 + jnp.arange(given.shape[1]))[None]).max(axis=-1)


def _pass_full(
    method: DiffusionMethod, progress: Progress, start: jax.Array, end: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Where the open block starts and stops, past new ones of which nothing is undecided."""
    place = jnp.arange(progress.decided.shape[1])[None]

    def is_full(start: jax.Array, end: jax.Array) -> jax.Array:
        here = (place >= start[:, None]) & (place < end[:, None])
        is_new = (start != progress.block_start) & (end < progress.end)
        return is_new & ~(here & ~progress.decided).any(axis=-1)

    def pass_on(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        full = is_full(*block)
        stop = method.scheduler.open_block(block[1], progress.end, progress.prompt_len)
        return jnp.where(full, block[1], block[0]), jnp.where(full, stop, block[1])

    return jax.lax.while_loop(lambda block: is_full(*block).any(), pass_on, (start, end))


def _is_complete(progress: Progress) -> jax.Array:
    """[B] bool: rows that lack nothing, also beyond the open block."""
    missing = ~progress.decided & (
        jnp.arange(progress.decided.shape[1])[None] < progress.end[:, None]
    )
    return ~missing.any(axis=-1)


class _Window:
    """Reads and writes W consecutive completion positions per row of [B, G] arrays.

    Positions past the end (of the last, shorter block) read the last entry and write nothing.
    """

    def __init__(self, start: jax.Array, length: int, total: int):
        self.index = start[:, None] + jnp.arange(length)[None]  # [B, W]
        self.inside = self.index < total
        self.total = total

    def get(self, x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, jnp.minimum(self.index, self.total - 1), axis=1)

    def put(self, x: jax.Array, where: jax.Array, value: jax.Array | int) -> jax.Array:
        rows, index = self.places(where)
        value = jnp.broadcast_to(jnp.asarray(value, x.dtype), index.shape)
        return x.at[rows, index].set(value, mode="drop")

    def places(self, where: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rows [B, 1] and positions [B, W] in which to write; out of bounds: dropped."""
        index = jnp.where(where & self.inside, self.index, self.total)
        return jnp.arange(len(index))[:, None], index


def _noise_key(key: jax.Array, row_step: jax.Array, index: jax.Array) -> jax.Array:
    """[B, W, 2] uint32: a stream per row's key, round and completion position."""

    def fold(key: jax.Array, row_step: jax.Array, index: jax.Array) -> jax.Array:
        row = jax.random.fold_in(wrap(key), row_step)
        return jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(row, i)))(index)

    return jax.vmap(fold)(key, row_step, index)


def select_rows(rows: jax.Array, new: Tree, old: Tree) -> Tree:
    """Per-row selection over a pytree of arrays with a leading batch axis."""
    chosen: Tree = jax.tree.map(
        lambda n, o: jnp.where(rows.reshape(-1, *(1,) * (n.ndim - 1)), n, o), new, old
    )
    return chosen


def mask_id(cfg: ModelConfig) -> int:
    """What undecided positions hold: MASK, or padding in models that have none."""
    return cfg.pad_token_id if cfg.mask_token_id is None else cfg.mask_token_id
