"""What each component of masked diffusion must do.

A decoding method is a point in a product of small choices, one per axis (`decode.diffusion.state`).
Each choice is a frozen `flax.struct.dataclass`: numbers (thresholds, temperatures) are leaves and
are traced, so changing them compiles nothing; sizes and options are static fields. Inherit from the
class of the axis here and implement its one or two methods.

Components know each other by what they do, never by name: what one may ask of another is a
property of the class of its axis here (`Scheduler.fixed_len`, `Inputs.shows_mask`, ...), and what
it wants of the loop it says in `needs`.

Letters: B rows, W window positions judged per round, V vocabulary, G completion positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.component import Part
from decode.core.requests import real_number
from decode.diffusion.round import Frame, Progress, Revision, Round
from dlm.config import ModelConfig

if TYPE_CHECKING:
    from decode.diffusion.method import DiffusionMethod

# What a component may need, and what that costs. "suffix" and "canvas" say what windows show.
NEEDS: dict[str, str] = {
    "suffix": "windows reach from the open block to the end of the row",
    "canvas": "windows show the whole completion",
    "values": "confidences that can be compared with a number, not only with each other",
    "occurred": "`Frame.occurred`: [B, V] bool, made anew in every round",
    "logits": "`Round.logits`: [B, W, V] float32 live in memory",
    "expected": "`Round.expected`, from the logits",
    "standing": "`Round.standing_log_prob`",
    "shadow": "`Round.shadow_log_prob`: the forward is longer by W",
    "given": "`Round.stats.given_log_probs` of `Confidence.given_ids`",
    "idle": "a round that commits nothing is left so, instead of committing the surest position",
    "second look": "a block stays open for at least two rounds",
}
IMPLIED: dict[str, frozenset[str]] = {"expected": frozenset({"logits"})}
Points = Mapping[str, Mapping[str, "Component"]]  # name -> axis -> component
WIDTHS = ("block", "suffix", "canvas")  # what a window may show, each more than the one before


@struct.dataclass
class Component(Part):
    """What all components of masked diffusion share.

    Attributes:
      needs: keys of `NEEDS`. What depends on options is a property.
      short_name: by which users may ask for it at its defaults; "": by none.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    short_name: ClassVar[str] = ""

    @classmethod
    def points(cls, block_len: int) -> Points:
        """Published settings, by the name under which users ask for them.

        What is left out is as `decode.diffusion.points.complete` says; the shortest name is that of
        the family.
        """
        return {}

    @classmethod
    def example(cls, cfg: ModelConfig) -> Self:
        """One that makes sense for a model: what tests of all components run, and pages show."""
        return cls()

    @property
    def name(self) -> str:
        """Of the class."""
        return type(self).__name__

    def refuse(self, method: DiffusionMethod) -> str | None:
        """Why this component makes no sense beside the others of a method, or None."""
        return None

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> Any:
        """State carried by the loop: a pytree with a leading batch axis. Default: none."""
        return ()


class Scheduler(Component):
    """Which positions are eligible now? By default one block after the other.

    Attributes:
      opens_early: whether a block may open before the one in front of it is done, so that what
        works on one block until it is done makes no sense.
    """

    opens_early: ClassVar[bool] = False

    @property
    def fixed_len(self) -> int | None:
        """Positions of every block, if they all have as many (those at an end may have fewer)."""
        return None

    @property
    def is_aligned(self) -> bool:
        """Whether blocks are counted from the start of the prompt, as block-diffusion models do."""
        return False

    @property
    def part_len(self) -> int | None:
        """Positions of the parts of a block that are decided one after the other; None: the block.

        Parts are counted from where the block begins, be it inside the prompt.
        """
        return None

    def window_len(self, gen_len: int) -> int:
        """W: the most positions a block may have. Static."""
        raise NotImplementedError

    def open_block(self, start: jax.Array, end: jax.Array, prompt_len: jax.Array) -> jax.Array:
        """Where the block that starts at completion position `start` [B] stops, [B].

        `end` [B] ends the row, `prompt_len` [B] tokens stand before it.
        """
        raise NotImplementedError

    def focus(self, round: Round, state: Any) -> tuple[jax.Array, jax.Array, Any]:
        """With the proposals known: eligible [B, W], block_end [B], and the next state."""
        return round.eligible, round.block_end, state

    def advance(self, progress: Progress) -> tuple[jax.Array, jax.Array]:
        """After a round: where the open block starts and stops now, [B] each."""
        start = jnp.where(progress.is_full, progress.block_end, progress.block_start)
        stop = self.open_block(start, progress.end, progress.prompt_len)
        return start, jnp.where(progress.is_full, stop, progress.block_end)


class Inputs(Component):
    """What does the model see where nothing is decided?

    Attributes:
      shows_mask: whether tokens there are MASK.
      remembers: whether what is seen depends on earlier rounds.
    """

    shows_mask: ClassVar[bool] = True
    remembers: ClassVar[bool] = False

    def validate(self, cfg: ModelConfig) -> None:
        if self.shows_mask and cfg.mask_token_id is None:
            raise ValueError(
                "mask_token_id=None: masked diffusion needs a model with a MASK token; "
                "autoregressive models write with decode.complete, and those trained on noise take "
                "inputs that show noise"
            )

    def see(
        self, cfg: ModelConfig, tokens: jax.Array, undecided: jax.Array, noise_key: jax.Array
    ) -> jax.Array:
        """Completion tokens [B, G] as the model sees them; MASK, or padding, where `undecided`.

        noise_key [B, G, 2] uint32 is the round's random stream per position.
        """
        return tokens

    def mix(self, frame: Frame, state: Any) -> tuple[jax.Array, jax.Array] | None:
        """Weight [B, W] and vectors [B, W, D]: x becomes (1 - w) x + w v. None: nothing."""
        return None

    def remember(self, round: Round, state: Any) -> Any:
        """The next state, once the round is judged."""
        return state


class Confidence(Component):
    """How sure is each proposal?

    Attributes:
      only_orders: whether values only say what comes before what, so that nobody can be served
        who needs "values".
    """

    only_orders: ClassVar[bool] = False

    def given_ids(self, state: Any) -> jax.Array:
        """[B, W, n] int32 ids whose log-probabilities `stats` has, for who needs "given"."""
        raise NotImplementedError

    def measure(self, round: Round, state: Any) -> tuple[Round, Any]:
        """Returns the round with `confidence` set, and the next state.

        Larger is surer, on the log scale. A measure that prefers other tokens sets `proposal` and
        `log_prob` as well.
        """
        raise NotImplementedError


class CommitRule(Component):
    """Which proposals stay?

    Attributes:
      counts_rounds: whether it spreads a block over its rounds, whatever the confidences are.
    """

    counts_rounds: ClassVar[bool] = False

    def commit(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        """Returns [B, W] bool, positions whose proposal is committed, and the next state."""
        raise NotImplementedError


class Reviser(Component):
    """May something be taken back, or overwritten?

    A reviser that takes tokens back must bound how often it does, or the loop would not end.

    Attributes:
      changes: whether it ever changes what is decided.
      decides: whether it decides by itself, whatever the rule says.
    """

    changes: ClassVar[bool] = True
    decides: ClassVar[bool] = False

    def revise(self, round: Round, commit: jax.Array, state: Any) -> tuple[Revision, Any]:
        """Returns what becomes of the round that would commit `commit` [B, W], and the next state.

        Only positions of the open block may be named.
        """
        raise NotImplementedError


class Stopper(Component):
    """When is a row done, before all its positions are decided?"""

    def fill(self, round: Round, state: Any) -> tuple[jax.Array | None, Any]:
        """Rows [B] bool that end with this round, all they lack filled with its proposals.

        Instead of the round's commits; None: none. Also returns the next state.
        """
        return None, state

    def cut(self, round: Round, commit: jax.Array, state: Any) -> jax.Array | None:
        """Where rows end from now on, [B] completion positions; None: where they did.

        `state` is what `fill` returned. A row's end never moves back up.
        """
        return None

    def should_stop(self, progress: Progress, end_ids: jax.Array) -> jax.Array:
        """Rows [B] bool that are done; `end_ids` [n] int32 are the tokens that end a text."""
        return jnp.zeros(progress.end.shape[0], bool)


@struct.dataclass
class Constraint(Component):
    """What is allowed at all?

    Attributes:
      ids: [n] int32 or a sequence of ints. Tokens that are banned: they are never proposed, and
        probabilities are renormalised without them.
      ban_mask: whether the model's MASK token is banned too. Nothing in training stops a model from
        predicting MASK, so this is on by default; the published samplers leave it off, and then
        a committed MASK counts as decided. Static.
    """

    ids: jax.Array | tuple[int, ...] = struct.field(default=(), kw_only=True)
    ban_mask: bool = struct.field(pytree_node=False, default=True, kw_only=True)

    def validate(self, cfg: ModelConfig) -> None:
        for i in np.asarray(self.ids, np.int64):
            if not 0 <= i < cfg.vocab_size:
                raise ValueError(f"banned id {i} must be in [0, vocab_size={cfg.vocab_size})")

    def banned_ids(self, cfg: ModelConfig) -> jax.Array | None:
        """[n] int32 ids that are never proposed and have no probability; None: all are allowed."""
        ids = jnp.asarray(self.ids, jnp.int32).reshape(-1)
        if self.ban_mask and cfg.mask_token_id is not None:
            ids = jnp.append(ids, cfg.mask_token_id)
        return ids if ids.shape[0] else None

    def mask_logits(self, frame: Frame, logits: jax.Array, state: Any) -> jax.Array:
        """Changes [B, W, V] logits before anything is proposed. Called if it needs "logits"."""
        return logits

    def propose(self, round: Round, state: Any) -> Round:
        """May change proposals and their log-probabilities, before confidences are measured."""
        return round

    def accept(self, round: Round, commit: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Returns the commits [B, W] that stay, and the next state. The last word of a round.

        Where it refuses all commits of a row, something must change before the next round.
        """
        return commit, state


def check_range(
    name: str, value: Any, low: float, high: float, note: str = "", *, ends: str = "[]"
) -> None:
    """Raises ValueError unless low <= value <= high, for a component's `validate`.

    `ends` has "(" in place of "[", and ")" in place of "]", for an end that is itself ruled out.
    """
    number, left, right = real_number(name, value), *ends
    is_above = number > low if left == "(" else number >= low
    is_below = number < high if right == ")" else number <= high
    if not (is_above and is_below):
        lowest = f"{'above' if left == '(' else 'at least'} {low:g}"
        bounds = f"in {left}{low:g}, {high:g}{right}" if high < float("inf") else lowest
        raise ValueError(f"{name}={number:g} must be {bounds}{note}")
