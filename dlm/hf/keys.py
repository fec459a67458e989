"""Single keys of config.json, checked; messages name key, value and what would be right.

A key that is absent has the value that the published code gives it, one that is null has none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from dlm.config import Experts, ModelConfig, shortest_pattern

LARGEST = 2**31 - 1  # integers beyond it are no sizes, and overflow floats


def whole(raw: dict[str, Any], key: str, absent: Any = None) -> Any:
    """An integer or None."""
    value = raw.get(key, absent)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{key}={value!r} must be an integer")
    if value is not None and abs(value) > LARGEST:
        raise ValueError(f"{key}={value!r:.60} must be at most {LARGEST}")
    return value


def number(raw: dict[str, Any], key: str, absent: Any = None) -> Any:
    """A number or None."""
    value = raw.get(key, absent)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"{key}={value!r} must be a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}={value!r} must be finite")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{key}={value!r:.60} must be at most {LARGEST}")
    return value


def positive(raw: dict[str, Any], key: str, absent: int) -> int:
    """An integer above 0; null counts as absent."""
    value = whole(raw, key, absent)
    value = absent if value is None else value
    if value < 1:
        raise ValueError(f"{key}={value} must be at least 1")
    return int(value)


def flag(raw: dict[str, Any], key: str, absent: bool) -> bool:
    """True or false; null is false."""
    value = raw.get(key, absent)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} must be true or false")
    return bool(value)


def only(raw: dict[str, Any], **usual: Any) -> None:
    """Refuses other values of keys that some files have and no code reads; null counts as none."""
    for key, value in usual.items():
        if raw.get(key) not in (None, value):
            raise ValueError(f"{key}={raw[key]!r:.60} is not supported; only {value!r} is")


def required(raw: dict[str, Any], key: str) -> int:
    """An integer that must be there."""
    value = whole(raw, key)
    if value is None:
        raise ValueError(f"{key} must be given")
    return int(value)


# Fields that errors name -> the keys which they are read from, beside `Format.fields`.
WORDS = {
    "attention": "attention_factor",
    "attention_cap": "attn_logit_softcapping",
    "logit_cap": "final_logit_softcapping",
    "local_rope_theta": "rope_local_base_freq",
    "more_eos_ids": "eos_token_id",
    "num_chosen": "num_experts_per_tok",
    "num_chosen_groups": "topk_group",
    "num_groups": "n_group",
    "original_max_seq_len": "original_max_position_embeddings",
}


def head_dim(
    width: str = "hidden_size", heads: str = "num_attention_heads"
) -> Callable[[dict[str, Any]], int]:
    """For `Format.absent`: of a family whose heads share the width where nothing says theirs."""

    def value(raw: dict[str, Any]) -> int:
        if raw[width] % max(1, raw[heads]):
            raise ValueError(
                f"{width}={raw[width]} must be a multiple of {heads}={raw[heads]}, as the width of "
                "a head is not given"
            )
        return int(raw[width] // max(1, raw[heads]))

    return value


def in_their_words(error: ValueError, keys: Mapping[str, str], given: Container[str]) -> str:
    """The message of an error about our fields, with the keys of a file that they were read from.

    Args:
      error: its message has "field=value".
      keys: our fields -> keys of the file.
      given: the keys that are in the file; of others it is said that nobody gave the value.
    """
    said = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, keys))})=([^\s,;:)\]]+)")

    def theirs(found: re.Match[str]) -> str:
        key = keys[found[1]]
        return f"{key}={found[2]}{'' if key in given else ' (by default)'}"

    return said.sub(theirs, str(error))


def kv_heads(absent: int) -> Callable[[dict[str, Any]], Any]:
    """For `Format.absent`: of a family whose code has so many where the key is absent.

    Where it is null there are as many as heads.
    """

    def value(raw: dict[str, Any]) -> Any:
        return raw["num_attention_heads"] if "num_key_value_heads" in raw else absent

    return value


def one_of(raw: dict[str, Any], names: Sequence[str], absent: Any = None) -> Any:
    """An integer that has several names, of which those that are given must agree."""
    found = {key: whole(raw, key) for key in names if raw.get(key) is not None}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{key}={value}" for key, value in found.items())
        raise ValueError(f"{said} must be the same: leave one of them out")
    return next(iter(found.values()), absent)


def per_layer(
    raw: dict[str, Any], key: str, layers: int, values: Sequence[Any]
) -> list[Any] | None:
    """A list with one of `values` per layer, or None."""
    found = raw.get(key)
    if found is None:
        return None
    is_list = isinstance(found, list) and len(found) == layers
    if not is_list or any(entry not in values for entry in found):
        raise ValueError(
            f"{key}={found!r} must be a list of {layers} entries, each "
            f"{' or '.join(map(repr, values))}"
        )
    return found


def pattern(
    layers: int,
    *,
    has_experts: Sequence[bool] | bool = False,
    is_sliding: Sequence[bool] | bool = False,
    has_rope: Sequence[bool] | bool = True,
) -> tuple[str, ...]:
    """`ModelConfig.pattern` of so many layers; a single value stands for all of them."""

    def words(values: Sequence[bool] | bool, yes: str, no: str) -> list[str]:
        each = [values] * layers if isinstance(values, bool) else values
        return [yes if value else no for value in each]

    axes = (
        words(has_experts, "experts", "dense"),
        words(is_sliding, "sliding", "global"),
        words(has_rope, "rotary", "none"),
    )
    return shortest_pattern([" ".join(kind) for kind in zip(*axes, strict=True)])


def experts_of(cfg: ModelConfig) -> Experts:
    """A model's experts; ValueError if it has none."""
    if cfg.experts is None:
        raise ValueError("experts=None must be given")
    return cfg.experts


TYPES = ("full_attention", "sliding_attention")


def sliding_layers(
    raw: dict[str, Any], layers: int, window: int | None, absent: Sequence[bool]
) -> tuple[int | None, list[bool]]:
    """The window and which layers are sliding, of `layer_types`, else as in `absent`.

    Without a sliding layer there is no window.
    """
    types = per_layer(raw, "layer_types", layers, TYPES)
    is_sliding = list(absent) if types is None else [kind == TYPES[1] for kind in types]
    if not any(is_sliding):
        return None, is_sliding
    if window is None or window < 1:
        raise ValueError(
            f"sliding_window={window!r} must be at least 1: layer_types has sliding ones"
        )
    return window, is_sliding


def layer_types(is_sliding: Sequence[bool]) -> list[str]:
    """As config.json lists them."""
    return [TYPES[sliding] for sliding in is_sliding]
