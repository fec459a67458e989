"""What public decoders draw proposals from, and of which distribution their confidences are."""

from __future__ import annotations

from typing import Any

from decode.constraints.filters import Filters
from decode.core.sampling import Sampling
from decode.diffusion.confidences.probability import Probability
from decode.diffusion.confidences.tempered import Tempered


def filtered(temperature: float, top_k: int | None, top_p: float | None) -> dict[str, Any]:
    """Fields of `DiffusionMethod`: proposals, and their probabilities, of the filtered law.

    Args:
      temperature: > 0; 0 is the arg-max, with its probability without temperature.
      top_k: at least 1; 0 or None: off.
      top_p: below 1; 1 or None: off.
    """
    fields: dict[str, Any] = {"temperature": temperature or None, "confidence": Probability()}
    if temperature not in (0, 1):
        fields["confidence"] = Tempered(Probability())
    if not temperature or not (top_k or (top_p or 1) < 1):
        return fields
    filters = Sampling(None, top_k or None, top_p if (top_p or 1) < 1 else None)
    return fields | {"constraint": Filters(filters)}


def steps_per_block(steps: int, gen_length: int, block_length: int) -> int:
    """Of `steps` in all.

    Raises:
      ValueError: they do not divide evenly.
    """
    blocks = -(-gen_length // block_length)
    if steps < blocks or steps % blocks:
        raise ValueError(
            f"steps={steps} must be a multiple of the {blocks} blocks that gen_length={gen_length} "
            f"has with block_length={block_length}"
        )
    return steps // blocks


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """ValueError unless `value` is among `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")
