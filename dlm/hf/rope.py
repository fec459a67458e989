"""Rotary embeddings in config.json: two layouts, and the kinds of `dlm.rope`.

Files for transformers 4 have `rope_theta` and `rope_scaling` (whose kind is its `rope_type` or
`type`), those for transformers 5 have both in `rope_parameters`. Either is read; files with both
must say the same twice. The former is written, which either version reads.
"""

from __future__ import annotations

import math
from typing import Any

from dlm import rope
from dlm.config import ModelConfig
from dlm.hf import keys

ORIGINAL = "original_max_position_embeddings"
KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", ORIGINAL)

# Keys of each kind, besides those that all have.
KNOWN: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale")
    + ("mscale_all_dim", ORIGINAL, "finetuned"),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor", ORIGINAL),
}
COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_rope(
    raw: dict[str, Any],
    *,
    theta: float = 10_000.0,
    is_partial: bool = False,
    more: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What config.json says of rotary embeddings, as fields of `ModelConfig`.

    Args:
      raw: config.json, with the sizes of the model.
      theta: the base where none is given.
      is_partial: whether the published code can rotate a part of a head.
      more: further keys that may stand beside those of the kind, read by the caller.

    Raises:
      ValueError: it contradicts itself, or wants what is not implemented.
    """
    name, said = settings(raw)
    base = _one_value(raw, said, name, "rope_theta")
    base = theta if base is None else base
    share = _one_value(raw, said, name, "partial_rotary_factor")
    width = None
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    if share not in (None, 1):
        width = int(head_dim * share)
        if not is_partial:
            raise ValueError(f"partial_rotary_factor={share} is not supported; only 1 is")
        if width % 2 or not 2 <= width <= head_dim:
            raise ValueError(
                f"partial_rotary_factor={share} makes {width} of head_dim={head_dim} numbers "
                "rotate, which must be even, at least 2 and at most all"
            )
        width = None if width == head_dim else width
    if not base > 0:
        raise ValueError(f"rope_theta={base} must be positive")
    scaling = read_scaling(raw, name, said, more)
    if isinstance(scaling, rope.LongRope):
        half = (head_dim if width is None else width) // 2
        for key, factors in (("short_factor", scaling.short), ("long_factor", scaling.long)):
            if len(factors) != half:
                raise ValueError(
                    f"{name}: {key} has {len(factors)} numbers and must have {half}, half of those "
                    "of a head that rotate"
                )
    return {"rope_theta": base, "rotary_dim": width, "rope_scaling": scaling}


def settings(raw: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """`rope_scaling` or `rope_parameters`, whichever there is, and its name; empty: neither."""
    names = ("rope_scaling", "rope_parameters")
    found: dict[str, Any] = {name: raw[name] for name in names if raw.get(name)}
    for name, said in found.items():
        if not isinstance(said, dict):
            raise ValueError(f"{name}={said!r} must be an object")
    if len(found) == 2:
        both = [
            {key: value for key, value in said.items() if key not in ("type", "rope_theta")}
            | {"rope_type": said.get("rope_type", said.get("type", "default"))}
            for said in found.values()
        ]
        if both[0] != both[1]:
            raise ValueError(
                f"rope_scaling={found['rope_scaling']!r} and rope_parameters="
                f"{found['rope_parameters']!r} must say the same: leave one of them out"
            )
        return "rope_parameters", found["rope_scaling"] | found["rope_parameters"]
    return next(iter(found.items()), ("rope_scaling", {}))


def read_scaling(
    raw: dict[str, Any], name: str, said: dict[str, Any], more: tuple[str, ...] = ()
) -> rope.Scaling | None:
    """What one of them says of stretching; None: nothing is stretched."""
    kind = said.get("rope_type", said.get("type", "default"))
    if isinstance(kind, str) and said.get("type", kind) != kind:
        raise ValueError(f"{name}: type={said['type']!r} and rope_type={kind!r} must be the same")
    if not isinstance(kind, str) or kind not in KNOWN:
        raise ValueError(
            f"{name} of type {kind!r} is not supported; only {', '.join(map(repr, KNOWN))} are"
        )
    unknown = [key for key in said if key not in (*COMMON, *KNOWN[kind], *more)]
    if unknown:
        raise ValueError(
            f"{name} of type {kind!r} has {unknown[0]}={said[unknown[0]]!r}, which means nothing "
            f"there: it may have {', '.join((*KNOWN[kind], 'rope_theta'))}"
        )
    needed = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("low_freq_factor", "high_freq_factor", "factor"),
        "longrope": ("short_factor", "long_factor"),
    }.get(kind, ())
    if missing := [key for key in needed if said.get(key) is None]:
        raise ValueError(f"{name} must give {', '.join(missing)}")
    longest = keys.required(raw, "max_position_embeddings")
    # One beside them counts more than one among them, as in the published code.
    original = keys.whole(raw, ORIGINAL)
    original = keys.whole(said, ORIGINAL) if original is None else original
    original = longest if original is None else original
    if original < 1:
        raise ValueError(f"{ORIGINAL}={original} must be at least 1")
    factor = keys.number(said, "factor")
    if kind == "linear":
        return rope.Linear(factor=factor)
    if kind == "dynamic":
        return rope.Dynamic(factor=factor, original_max_seq_len=longest)
    if kind == "llama3":
        return rope.Llama3(
            factor=factor,
            low_freq_factor=keys.number(said, "low_freq_factor"),
            high_freq_factor=keys.number(said, "high_freq_factor"),
            original_max_seq_len=original,
        )
    attention = keys.number(said, "attention_factor")
    if kind in ("yarn", "longrope") and factor is None:
        factor = longest / original
    if kind == "yarn":
        keys.flag(said, "finetuned", False)  # whether the model learned with it: no matter here
        return rope.Yarn(
            factor=factor,
            original_max_seq_len=original,
            beta_fast=keys.number(said, "beta_fast") or 32,
            beta_slow=keys.number(said, "beta_slow") or 1,
            is_truncated=keys.flag(said, "truncate", True),
            attention=_yarn_attention(said, factor) if attention is None else attention,
        )
    if kind == "longrope":
        if attention is None:
            if original < 2:
                raise ValueError(f"{ORIGINAL}={original} must be at least 2 for type 'longrope'")
            grown = 1 + math.log(factor) / math.log(original) if factor > 1 else 1.0
            attention = math.sqrt(grown)
        return rope.LongRope(
            short=_factors(said, name, "short_factor"),
            long=_factors(said, name, "long_factor"),
            original_max_seq_len=original,
            attention=attention,
        )
    return None


def write_rope(cfg: ModelConfig) -> dict[str, Any]:
    """Keys of config.json that `read_rope` reads as what `cfg` says."""
    written: dict[str, Any] = {"rope_theta": cfg.rope_theta}
    if cfg.rotary_dim is not None:
        written["partial_rotary_factor"] = cfg.rotary_dim / cfg.head_dim
    scaling = cfg.rope_scaling
    if scaling is None:
        return written
    said: dict[str, Any] = {"rope_type": scaling.kind}
    if isinstance(scaling, (rope.Linear, rope.Dynamic, rope.Llama3, rope.Yarn)):
        said["factor"] = scaling.factor
    if isinstance(scaling, (rope.Llama3, rope.Yarn, rope.LongRope)):
        said[ORIGINAL] = scaling.original_max_seq_len
    if isinstance(scaling, (rope.Yarn, rope.LongRope)):
        said["attention_factor"] = scaling.attention
    if isinstance(scaling, rope.Llama3):
        said |= {"low_freq_factor": scaling.low_freq_factor}
        said |= {"high_freq_factor": scaling.high_freq_factor}
    if isinstance(scaling, rope.Yarn):
        said |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        said |= {} if scaling.is_truncated else {"truncate": False}
    if isinstance(scaling, rope.LongRope):
        said |= {"short_factor": list(scaling.short), "long_factor": list(scaling.long)}
    return written | {"rope_scaling": said}


def _one_value(raw: dict[str, Any], said: dict[str, Any], name: str, key: str) -> Any:
    """A number that may stand in either place; ValueError if two places say different things."""
    outside, inside = keys.number(raw, key), keys.number(said, key)
    if None not in (outside, inside) and outside != inside:
        raise ValueError(
            f"{key}={outside} and the {inside} of {name} must be the same: leave one of them out"
        )
    return outside if inside is None else inside


def _yarn_attention(said: dict[str, Any], factor: float) -> float:
    def grown(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    above, below = (keys.number(said, key) for key in ("mscale", "mscale_all_dim"))
    return grown(above) / grown(below) if above and below else grown(1.0)


def _factors(said: dict[str, Any], name: str, key: str) -> tuple[float, ...]:
    value = said[key]
    is_list = isinstance(value, list) and all(type(x) in (int, float) for x in value)
    if not is_list or not all(0 < x <= keys.LARGEST for x in value):
        raise ValueError(f"{name}: {key}={value!r:.60} must be a list of positive numbers")
    return tuple(float(x) for x in value)
