"""Gemma 3, text only: Gemma 2 with norms of queries and keys, without caps.

Every sixth layer is global, with rotary frequencies of its own; those of the others have a smaller
base and are never stretched.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm.config import ModelConfig
from dlm.hf import keys
from dlm.hf.formats import gemma2, qwen3
from dlm.hf.rope import read_rope, write_rope

GLOBAL, LOCAL = "full_attention", "sliding_attention"
BASE = "rope_local_base_freq"
EVERY = ("sliding_window_pattern", "_sliding_window_pattern")


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    layers = raw["num_hidden_layers"]
    given = {keys.positive(raw, key, 6) for key in EVERY if raw.get(key) is not None} or {6}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(EVERY)} must be the same, not {sorted(given)}")
    (every,) = given
    absent = [(i + 1) % every > 0 for i in range(layers)]
    window = keys.whole(raw, "sliding_window", 4096)
    window, is_sliding = keys.sliding_layers(raw, layers, window, absent)
    return {
        **_read_tables(raw),
        **gemma2.read_scales(raw),
        "sliding_window": window,
        "pattern": keys.pattern(layers, is_sliding=is_sliding),
        "logit_cap": keys.number(raw, "final_logit_softcapping"),
    }


def _read_tables(raw: dict[str, Any]) -> dict[str, Any]:
    """Both rotary tables; newer files give an object for either kind of layer."""
    nested = raw.get("rope_parameters") or {}
    if not isinstance(nested, dict):
        raise ValueError(f"rope_parameters={nested!r} must be an object")
    if set(nested) & {GLOBAL, LOCAL}:
        if set(nested) - {GLOBAL, LOCAL} or not all(isinstance(x, dict) for x in nested.values()):
            raise ValueError(
                f"rope_parameters={nested!r} must have an object for {GLOBAL} and {LOCAL} each"
            )
        flat = {key: value for key, value in raw.items() if key != "rope_parameters"}
        sizes = {key: raw[key] for key in ("max_position_embeddings", "head_dim")}
        local = read_rope({**sizes, "rope_parameters": nested.get(LOCAL)}, theta=10_000.0)
        if local["rope_scaling"] is not None:
            raise ValueError(
                f"rope_parameters: {LOCAL}={nested[LOCAL]!r} must be of type 'default'"
            )
        said = keys.number(raw, BASE)
        if said not in (None, local["rope_theta"]):
            raise ValueError(f"{BASE}={said} and rope_parameters={nested!r} must say the same")
        base = local["rope_theta"]
        raw = flat | {"rope_parameters": nested.get(GLOBAL)}
    else:
        base = keys.number(raw, BASE, 10_000.0)
        if base is None:
            raise ValueError(f"{BASE}=None must be a number, or absent for 10000.0")
    return {**read_rope(raw, theta=1_000_000.0), "local_rope_theta": base}


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_rope(cfg),
        **gemma2.write_scales(cfg),
        BASE: cfg.local_rope_theta,
        "sliding_window": cfg.sliding_window,
        "layer_types": keys.layer_types([kind == "sliding" for kind in cfg.kinds("attention")]),
        "final_logit_softcapping": cfg.logit_cap,
    }


FORMAT = dataclasses.replace(
    gemma2.FORMAT,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    # The published code has the key and does not read it.
    fixed={**gemma2.FORMAT.fixed, "attn_logit_softcapping": ((None,), None)},
    implied={**gemma2.FORMAT.implied, "qk_norm": True},
    tensors={**qwen3.FORMAT.tensors, **gemma2.NORMS},
    read=_read,
    write=_write,
    keys=(*gemma2.READ, BASE, *EVERY),
)
