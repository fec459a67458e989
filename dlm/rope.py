"""How rotary frequencies are stretched for texts longer than those a model was first trained on.

Frequency i of a rotary width R and a base b is f_i = b^(-2i / R). Every kind makes others of them;
some also multiply cosine and sine by an attention factor.

Letters: B rows, R rotary width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """What all kinds share.

    Attributes:
      kind: its name in published files, which tells kinds apart where they are written down.
    """

    kind: str = ""

    # Whether frequencies depend on how long a text is: the most positions that it will have.
    needs_length: ClassVar[bool] = False

    @property
    def attention_factor(self) -> float:
        """Cosine and sine are multiplied by it."""
        return 1.0

    def stretch(self, frequency: jax.Array, theta: float, length: jax.Array | None) -> jax.Array:
        """The stretched frequencies.

        Args:
          frequency: [R / 2] float32. f_i.
          theta: their base.
          length: [B] int32. Positions of each row's text; None unless `needs_length`.

        Returns:
          [R / 2], or [B, R / 2] if they depend on the length.
        """
        raise NotImplementedError

    def is_same(self, length: jax.Array, other: jax.Array) -> jax.Array:
        """[B] bool: whether texts of so many positions, both [B] int32, have the same keys."""
        return jnp.full_like(length, True, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Scaling):
    """All frequencies divided by `factor` > 0: positions lie closer together.

    Reference: Chen et al., "Extending Context Window of Large Language Models via Positional
    Interpolation", arXiv:2306.15595.
    """

    kind: str = "linear"
    factor: float

    def __post_init__(self) -> None:
        _check_positive(self.kind, factor=self.factor)

    def stretch(self, frequency: jax.Array, theta: float, length: jax.Array | None) -> jax.Array:
        return frequency / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic(Scaling):
    """A base that grows with the text, once that is longer than the model was trained for (NTK).

    With n positions of a text and m = `original_max_seq_len`, the base is multiplied by
    (factor max(n, m) / m - (factor - 1))^(R / (R - 2)). The published code takes the longest
    position of the forward at hand for n, whereby rows depend on each other and cached keys on
    when they were made; here n is what the row's whole text may reach.

    Attributes:
      factor: >= 1.
      original_max_seq_len: m.
    """

    kind: str = "dynamic"
    factor: float
    original_max_seq_len: int

    needs_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive(
            self.kind, factor=self.factor, original_max_seq_len=self.original_max_seq_len
        )

    def stretch(self, frequency: jax.Array, theta: float, length: jax.Array | None) -> jax.Array:
        assert length is not None
        width, trained = 2 * len(frequency), self.original_max_seq_len
        longest = jnp.maximum(length, trained).astype(jnp.float32)
        growth = self.factor * longest / trained - (self.factor - 1)
        base = theta * growth ** (width / (width - 2))
        exponent = jnp.arange(0, width, 2, dtype=jnp.float32) / width
        return 1.0 / base[:, None] ** exponent[None]

    def is_same(self, length: jax.Array, other: jax.Array) -> jax.Array:
        return (length == other) | (jnp.maximum(length, other) <= self.original_max_seq_len)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3(Scaling):
    """Long wavelengths stretched, short ones kept, as Llama 3.1 does.

    Reference: Grattafiori et al., "The Llama 3 Herd of Models", arXiv:2407.21783, and the public
    code. Wavelengths up to original / high_freq_factor stay, those from original / low_freq_factor
    are stretched by `factor`, those in between by a share of it.

    Attributes:
      factor: > 0.
      low_freq_factor: > 0.
      high_freq_factor: > low_freq_factor.
      original_max_seq_len: positions of the model before it was stretched.
    """

    kind: str = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        if not (self.factor > 0 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(
                f"rotary scaling of type {self.kind!r}: factor={self.factor} must be positive, "
                f"and low_freq_factor={self.low_freq_factor} positive and below "
                f"high_freq_factor={self.high_freq_factor}"
            )

    def stretch(self, frequency: jax.Array, theta: float, length: jax.Array | None) -> jax.Array:
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = self.original_max_seq_len * frequency / (2 * math.pi)
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn(Scaling):
    """Frequencies that turn rarely are stretched, those that turn often kept.

    Reference: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models",
    arXiv:2309.00071. Which index turns `beta` times within the original length is worked out; f_i
    is kept below that of `beta_fast`, divided by `factor` above that of `beta_slow`, and in between
    by a share of it.

    Attributes:
      factor: > 0.
      original_max_seq_len: positions of the model before it was stretched.
      beta_fast: > `beta_slow`.
      beta_slow: > 0.
      is_truncated: whether the two indices are rounded outwards.
      attention: the attention factor.
    """

    kind: str = "yarn"
    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_truncated: bool = True
    attention: float

    def __post_init__(self) -> None:
        _check_positive(
            self.kind,
            factor=self.factor,
            original_max_seq_len=self.original_max_seq_len,
            beta_slow=self.beta_slow,
            attention=self.attention,
        )
        if not self.beta_fast > self.beta_slow:
            raise ValueError(
                f"rotary scaling of type {self.kind!r}: beta_fast={self.beta_fast} must be above "
                f"beta_slow={self.beta_slow}"
            )

    @property
    def attention_factor(self) -> float:
        return self.attention

    def stretch(self, frequency: jax.Array, theta: float, length: jax.Array | None) -> jax.Array:
        width = 2 * len(frequency)

        def index(turns: float) -> float:
            """Of the frequency that turns so often within the original length."""
            return (
                width
                * math.log(self.original_max_seq_len / (turns * 2 * math.pi))
                / (2 * math.log(theta))
            )

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.is_truncated:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 * (low == high)
        share = jnp.clip((jnp.arange(width // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)
        return frequency / self.factor * share + frequency * (1 - share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope(Scaling):
    """Every frequency divided by a number of its own, others for long texts than for short ones.

    Reference: Ding et al., "LongRoPE", arXiv:2402.13753. The published code calls a text long by
    the longest position of the forward at hand; here by what the row's whole text may reach.

    Attributes:
      short: R / 2 divisors for texts of up to `original_max_seq_len` positions.
      long: R / 2 divisors for longer ones.
      original_max_seq_len: positions of the model before it was stretched.
      attention: the attention factor.
    """

    kind: str = "longrope"
    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_seq_len: int
    attention: float

    needs_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "short", tuple(self.short))
        object.__setattr__(self, "long", tuple(self.long))
        _check_positive(
            self.kind, original_max_seq_len=self.original_max_seq_len, attention=self.attention
        )
        for name in ("short", "long"):
            if not all(number > 0 for number in getattr(self, name)):
                raise ValueError(f"rope_scaling: {name}={getattr(self, name)} must be positive")

    @property
    def attention_factor(self) -> float:
        return self.attention

    def stretch(self, frequency: jax.Array, theta: float, length: jax.Array | None) -> jax.Array:
        assert length is not None
        is_long = (length > self.original_max_seq_len)[:, None]
        short, long = (jnp.asarray(x, jnp.float32)[None] for x in (self.short, self.long))
        return frequency[None] / jnp.where(is_long, long, short)

    def is_same(self, length: jax.Array, other: jax.Array) -> jax.Array:
        trained = self.original_max_seq_len
        return (length == other) | ((length > trained) == (other > trained))


KINDS: dict[str, type[Scaling]] = {
    kind.kind: kind for kind in (Linear, Dynamic, Llama3, Yarn, LongRope)
}


def from_fields(fields: Mapping[str, Any]) -> Scaling:
    """The scaling whose fields `dataclasses.asdict` gave."""
    return KINDS[fields["kind"]](**fields)


def _check_positive(kind: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"rotary scaling of type {kind!r}: {name}={value} must be positive")
