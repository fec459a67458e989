"""What a decoding component sees in one round, and what each kind of component must do.

A decoding method is a point in a product of small choices. Each choice is a frozen
`flax.struct.dataclass`: numbers (thresholds, temperatures) are leaves and are traced, so changing
them compiles nothing; sizes and options are static fields. Inherit from the class of the axis here
and implement its one or two methods.

Letters: B rows, W window positions judged per round, V vocabulary, G completion positions.

Confidences live on a log scale, in (-inf, 0]: the log of a number in (0, 1]. Probabilities of
trained models crowd so close to 1 that float32 cannot tell them apart, while their logarithms keep
full resolution, and decoding depends on their order. `log_confidence` turns a threshold in [0, 1]
into that scale.
"""

from __future__ import annotations

import enum
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.component import Part
from dlm.config import ModelConfig
from kernels_pallas.unembed_stats import VocabStats, threefry2x32


class Round(struct.PyTreeNode):
    """One round as components see it: W positions of each row, judged by one forward.

    The window starts at the row's open block, or at its first completion position if a component
    asked to see the whole canvas (`Component.width`).

    Attributes:
      tokens: [B, W] int32. What stands there now (MASK where undecided).
      proposal: [B, W] int32. What the model proposes: its arg-max, or a sample.
      log_prob: [B, W] float32. Log-probability of the proposal, without temperature.
      confidence: [B, W] float32 on the log scale; set by the confidence component (before it
        ran: `log_prob`).
      eligible: [B, W] bool. Undecided positions that may be committed now.
      undecided: [B, W] bool. Positions that hold no token yet; also those beyond the block.
      in_block: [B, W] bool. Positions of the open block, decided or not.
      stats: the model's statistics, each [B, W, ...]. Positions that hold a token have them too.
      shadow_log_prob: [B, W] float32, or None unless a component has `needs_shadow`.
        Log-probability of the token that stands at a position as MASK would predict it there, from
        everything else.
      expected: [B, W, D] float32, or None unless a component has `needs_expected`. The embedding of
        the token to come, averaged over the model's probabilities.
      logits: [B, W, V] float32, or None unless a component has `needs_logits`.
      noise_key: [B, W, 2] uint32. A random stream per row, step and position.
      temperature: scalar float32, or None if proposals are arg-maxes.
      index: [B, W] int32. Completion position, from 0; at or past the row's end: not there.
      block_start: [B] int32. First completion position of the open block.
      block_end: [B] int32. Past its last.
      block_step: [B] int32. Rounds since the row's block was opened, from 0.
      row_step: [B] int32. The row's rounds so far, from 0.
      num_open: [B] int32. Undecided positions of the block when it was opened.
      gen_len: [B] int32. Completion positions of the row.
    """

    tokens: jax.Array
    proposal: jax.Array
    log_prob: jax.Array
    confidence: jax.Array
    eligible: jax.Array
    undecided: jax.Array
    in_block: jax.Array
    stats: VocabStats
    shadow_log_prob: jax.Array | None
    expected: jax.Array | None
    logits: jax.Array | None
    noise_key: jax.Array
    temperature: jax.Array | None
    index: jax.Array
    block_start: jax.Array
    block_end: jax.Array
    block_step: jax.Array
    row_step: jax.Array
    num_open: jax.Array
    gen_len: jax.Array


class Progress(struct.PyTreeNode):
    """How far rows are, after a round. Positions are completion positions, from 0.

    Attributes:
      completion: [B, G] int32. What stands there.
      decided: [B, G] bool.
      block_start: [B] int32. First position of the open block.
      block_end: [B] int32. Past its last.
      end: [B] int32. Past the row's last.
      is_full: [B] bool. The open block is done: nothing in it is undecided, a forward has seen it,
        and no reviser holds it.
      prompt_len: [B] int32. Tokens of the prompt.
    """

    completion: jax.Array
    decided: jax.Array
    block_start: jax.Array
    block_end: jax.Array
    end: jax.Array
    is_full: jax.Array
    prompt_len: jax.Array


class Revision(struct.PyTreeNode):
    """What a reviser makes of a round.

    Attributes:
      commit: [B, W] bool. Positions that get their proposal, also where a token stands.
      take_back: [B, W] bool. Positions that become undecided again; None: none.
      hold: [B] bool. Rows whose block stays open though it is full; None: none.
      proposal: [B, W] int32. What committed positions get; None: the round's proposals.
    """

    commit: jax.Array
    take_back: jax.Array | None = None
    hold: jax.Array | None = None
    proposal: jax.Array | None = None


WIDTHS = ("block", "suffix", "canvas")  # what a window may show, each more than the one before


@struct.dataclass
class Component(Part):
    """What all components of masked diffusion share.

    Attributes:
      needs_logits: whether `Round.logits` must be there. The loop materialises [B, W, V] logits
        only if some component asks for them.
      needs_shadow: whether `Round.shadow_log_prob` must be there: it makes the forward longer by W.
      needs_expected: whether `Round.expected` must be there; goes with `needs_logits`.
      width: what the window must show: the open "block", also the "suffix" after it, or the whole
        "canvas".
    """

    needs_logits: ClassVar[bool] = False
    needs_shadow: ClassVar[bool] = False
    needs_expected: ClassVar[bool] = False
    width: ClassVar[str] = "block"

    def refuse(self, method: Any) -> str | None:
        """Why this component makes no sense beside the others of a `DiffusionMethod`, or None."""
        return None

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> Any:
        """State carried by the loop: a pytree with a leading batch axis. Default: none."""
        return ()


class Scheduler(Component):
    """Which positions are eligible now? By default one block after the other."""

    def window_len(self, gen_len: int) -> int:
        """W: the most positions a block may have. Static."""
        raise NotImplementedError

    def open_block(self, start: jax.Array, end: jax.Array, prompt_len: jax.Array) -> jax.Array:
        """Where the block that starts at completion position `start` [B] stops, [B].

        `end` [B] ends the row, `prompt_len` [B] tokens stand before it.
        """
        raise NotImplementedError

    def focus(self, view: Round, state: Any) -> tuple[jax.Array, jax.Array, Any]:
        """With the proposals known: eligible [B, W], block_end [B], and the next state."""
        return view.eligible, view.block_end, state

    def advance(self, progress: Progress) -> tuple[jax.Array, jax.Array]:
        """After a round: where the open block starts and stops now, [B] each."""
        start = jnp.where(progress.is_full, progress.block_end, progress.block_start)
        stop = self.open_block(start, progress.end, progress.prompt_len)
        return start, jnp.where(progress.is_full, stop, progress.block_end)


class Inputs(Component):
    """What does the model see where nothing is decided?"""

    def see(
        self, cfg: ModelConfig, tokens: jax.Array, undecided: jax.Array, noise_key: jax.Array
    ) -> jax.Array:
        """Completion tokens [B, G] as the model sees them; MASK, or padding, where `undecided`.

        noise_key [B, G, 2] uint32 is the round's random stream per position.
        """
        return tokens

    def mix(self, view: Round, state: Any) -> tuple[jax.Array, jax.Array] | None:
        """Weight [B, W] and vectors [B, W, D]: x becomes (1 - w) x + w v. None: nothing.

        Of `view`, only what is known without a forward is there.
        """
        return None

    def remember(self, view: Round, state: Any) -> Any:
        """The next state, once the round is judged."""
        return state


class Confidence(Component):
    """How sure is each proposal?"""

    def given_ids(self, state: Any) -> jax.Array | None:
        """[B, W, n] int32 ids whose log-probabilities `stats` must have; default: none."""
        return None

    def measure(self, view: Round, state: Any) -> tuple[Round, Any]:
        """Returns the round with `confidence` set, and the next state.

        Larger is surer, on the log scale. A measure that prefers other tokens sets `proposal` and
        `log_prob` as well.
        """
        raise NotImplementedError


class CommitRule(Component):
    """Which proposals stay?

    Attributes:
      may_idle: whether a round may commit nothing. Otherwise the loop adds the surest eligible
        position to a round that would.
    """

    may_idle: bool = False

    def commit(self, view: Round, state: Any) -> tuple[jax.Array, Any]:
        """Returns [B, W] bool, positions whose proposal is committed, and the next state."""
        raise NotImplementedError


class Reviser(Component):
    """May something be taken back, or overwritten?

    A reviser that takes tokens back must bound how often it does, or the loop would not end.
    """

    def revise(self, view: Round, commit: jax.Array, state: Any) -> tuple[Revision, Any]:
        """Returns what becomes of the round that would commit `commit` [B, W], and the next state.

        Only positions of the open block may be named.
        """
        raise NotImplementedError


class Stopper(Component):
    """When is a row done, before all its positions are decided?"""

    def fill(self, view: Round, state: Any) -> tuple[jax.Array | None, Any]:
        """Rows [B] bool that end with this round, all they lack filled with its proposals.

        Instead of the round's commits; None: none. Also returns the next state.
        """
        return None, state

    def cut(self, view: Round, commit: jax.Array, state: Any) -> jax.Array | None:
        """Where rows end from now on, [B] completion positions; None: where they did.

        `state` is what `fill` returned. A row's end never moves back up.
        """
        return None

    def should_stop(self, progress: Progress, eos_id: int) -> jax.Array:
        """Rows [B] bool that are done."""
        return jnp.zeros(progress.end.shape[0], bool)


class Constraint(Component):
    """What is allowed at all?"""

    def banned_ids(self, cfg: ModelConfig) -> jax.Array | None:
        """[n] int32 ids that are never proposed and have no probability; None: all are allowed."""
        raise NotImplementedError

    def mask_logits(self, view: Round, logits: jax.Array) -> jax.Array:
        """Changes [B, W, V] logits before anything is proposed. Called if `needs_logits`."""
        return logits


def log_confidence(threshold: jax.Array | float) -> jax.Array:
    """log(threshold), computed as confidences are, so that equal values compare equal."""
    threshold = jnp.asarray(threshold, jnp.float32)
    return -jnp.log1p((1 - threshold) / threshold)


class Stream(enum.IntEnum):
    """Counters under which components draw from a position's `noise_key`.

    Proposals use vocabulary ids as counters, so these come down from 2^32 - 1.
    """

    RANDOM = 0xFFFFFFFF
    DREAM_QUOTA = 0xFFFFFFFE
    ORIGIN = 0xFFFFFFFD
    REMDM = 0xFFFFFFFC
    NOISE = 0xFFFFFFFB


def draw_bits(noise_key: jax.Array, stream: Stream) -> jax.Array:
    """Random words [...] uint32 of keys [..., 2] uint32."""
    key, counter = noise_key, jnp.uint32(stream)
    return threefry2x32(key[..., 0], key[..., 1], counter, jnp.uint32(0))[0]


def draw_uniform(noise_key: jax.Array, stream: Stream) -> jax.Array:
    """Uniform numbers [...] float32 in (0, 1) of keys [..., 2] uint32."""
    return ((draw_bits(noise_key, stream) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


def rank(confidence: jax.Array, eligible: jax.Array) -> jax.Array:
    """[B, W] int32: 0 for a row's surest eligible position, then 1, ...; ties go to the left.

    Positions that are not eligible come last.
    """
    order = jnp.argsort(_sortable(confidence, eligible), axis=-1, stable=True)
    return jnp.argsort(order, axis=-1)


def sort_confidence(confidence: jax.Array, eligible: jax.Array) -> jax.Array:
    """[B, W] float32: eligible confidences from surest down, then -inf."""
    return -jnp.sort(_sortable(confidence, eligible), axis=-1)


def surest(confidence: jax.Array, eligible: jax.Array) -> jax.Array:
    """[B, W] bool: each row's surest eligible position (the leftmost on ties), if it has one."""
    best = jnp.argmin(_sortable(confidence, eligible), axis=-1)
    return (jnp.arange(confidence.shape[-1])[None] == best[:, None]) & eligible


def _sortable(confidence: jax.Array, eligible: jax.Array) -> jax.Array:
    """Smallest first; an eligible position with confidence -inf still precedes the others."""
    floor = jnp.finfo(jnp.float32).min
    return jnp.where(eligible, -jnp.maximum(confidence, floor), jnp.inf)


def check_range(name: str, value: Any, low: float, high: float, note: str = "") -> None:
    """Raises ValueError unless low <= value <= high, for a component's `validate`."""
    if not low <= float(value) <= high:
        bounds = f"in [{low:g}, {high:g}]" if high < float("inf") else f"at least {low:g}"
        raise ValueError(f"{name}={float(value):g} must be {bounds}{note}")
