"""What architectures of GGUF files stand for: formats, names of tensors, and what only they say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dlm.config import shortest_pattern
from dlm.hf import keys
from dlm.hf.format import Format, Stored
from dlm.hf.formats import (
    dream,
    gemma2,
    gemma3_text,
    gpt2,
    llada,
    llama,
    mixtral,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)

NAMES = {
    "embed": "token_embd.weight",
    "positions": "position_embd.weight",
    "layers/attention_norm": "blk.{}.attn_norm.weight",
    "layers/attention_norm_bias": "blk.{}.attn_norm.bias",
    "layers/attention_out_norm": "blk.{}.post_attention_norm.weight",
    "layers/attention/q": "blk.{}.attn_q.weight",
    "layers/attention/k": "blk.{}.attn_k.weight",
    "layers/attention/v": "blk.{}.attn_v.weight",
    "layers/attention/q_bias": "blk.{}.attn_q.bias",
    "layers/attention/k_bias": "blk.{}.attn_k.bias",
    "layers/attention/v_bias": "blk.{}.attn_v.bias",
    "layers/attention/q_norm": "blk.{}.attn_q_norm.weight",
    "layers/attention/k_norm": "blk.{}.attn_k_norm.weight",
    "layers/attention/o": "blk.{}.attn_output.weight",
    "layers/attention/o_bias": "blk.{}.attn_output.bias",
    "layers/mlp_norm": "blk.{}.ffn_norm.weight",
    "layers/mlp_norm_bias": "blk.{}.ffn_norm.bias",
    "layers/mlp_out_norm": "blk.{}.post_ffw_norm.weight",
    "layers/mlp/gate": "blk.{}.ffn_gate.weight",
    "layers/mlp/up": "blk.{}.ffn_up.weight",
    "layers/mlp/down": "blk.{}.ffn_down.weight",
    "layers/mlp/gate_bias": "blk.{}.ffn_gate.bias",
    "layers/mlp/up_bias": "blk.{}.ffn_up.bias",
    "layers/mlp/down_bias": "blk.{}.ffn_down.bias",
    "final_norm": "output_norm.weight",
    "final_norm_bias": "output_norm.bias",
    "unembed": "output.weight",
}

# Where one tensor holds several of ours.
_JOINED = {
    **dict.fromkeys((f"layers/attention/{x}" for x in "qkv"), "blk.{}.attn_qkv.weight"),
    **dict.fromkeys((f"layers/attention/{x}_bias" for x in "qkv"), "blk.{}.attn_qkv.bias"),
    **dict.fromkeys(("layers/mlp/gate", "layers/mlp/up"), "blk.{}.ffn_up.weight"),
}

_INTO_D = ("attention/o", "mlp/down")  # matrices whose outputs are as wide as the model

# Experts lie in one tensor per layer.
EXPERTS = {
    "layers/moe/router": Stored("blk.{}.ffn_gate_inp.weight", "e d -> ed"),
    "layers/moe/gate": Stored("blk.{}.ffn_gate_exps.weight", "e g d -> edg"),
    "layers/moe/up": Stored("blk.{}.ffn_up_exps.weight", "e g d -> edg"),
    "layers/moe/down": Stored("blk.{}.ffn_down_exps.weight", "e d g -> egd"),
}


_WINDOW = "attention.sliding_window"


def take(given: dict[str, Any], name: str, key: str, kind: type, absent: Any = None) -> Any:
    """A number, taken out of what is given behind the architecture's name."""
    value = given.pop(key, absent)
    if value is None:
        raise ValueError(f"{name}.{key} must be given")
    if not isinstance(value, int if kind is int else (int, float)) or isinstance(value, bool):
        raise ValueError(f"{name}.{key}={value!r} must be one {kind.__name__}")
    if kind is int:
        return value
    # float32 in the file: the shortest decimal number that is the same there, 1e-5 for example.
    number = float(str(np.float32(value)))
    if not math.isfinite(number):
        raise ValueError(f"{name}.{key}={value!r} must be finite")
    return number


def _nothing(name: str, given: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _read_gemma(name: str, given: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Windows, scales and caps; what files do not say is as in the models that were published."""
    is_third = name == "gemma3"
    every = take(given, name, f"{_WINDOW}_pattern", int, 6 if is_third else 2)
    if every != (6 if is_third else 2):
        raise ValueError(f"{name}.{_WINDOW}_pattern={every} must be {6 if is_third else 2}")
    window = take(given, name, _WINDOW, int, 0 if is_third else 4096)
    if not 0 <= window <= keys.LARGEST:
        raise ValueError(f"{name}.{_WINDOW}={window} must be at least 0 and a length")
    # Of the largest model of either, scores are scaled by another width than that of a head.
    is_largest = values["n_layers"] == (62 if is_third else 46)
    width = values["d_model"] / values["n_heads"] if is_largest else values["head_dim"]
    sliding = ["dense sliding rotary"] * (every - 1) if window else []
    found: dict[str, Any] = {
        "embed_scale": values["d_model"] ** 0.5,
        "attention_scale": width**-0.5,
        "sliding_window": window or None,
        "pattern": shortest_pattern(
            ([*sliding, "dense global rotary"] * values["n_layers"])[: values["n_layers"]]
        ),
    }
    cap = take(given, name, "final_logit_softcapping", float, 0.0 if is_third else 30.0)
    found["logit_cap"] = cap or None
    if is_third:
        found["local_rope_theta"] = take(given, name, "rope.freq_base_swa", float, 10_000.0)
    else:
        found["attention_cap"] = take(given, name, "attn_logit_softcapping", float, 50.0) or None
    return found


def _read_phi3(name: str, given: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The window of all layers, 0 if there is none, and how much of a head rotates."""
    window = take(given, name, _WINDOW, int)
    if not 0 <= window <= keys.LARGEST:
        raise ValueError(f"{name}.{_WINDOW}={window} must be at least 0 and a length")
    rotated = take(given, name, "rope.dimension_count", int, values["head_dim"])
    return {
        "sliding_window": window or None,
        "pattern": (f"dense {'sliding' if window else 'global'} rotary",),
        "rotary_dim": None if rotated == values["head_dim"] else rotated,
        "qkv_bias": False,
    }


def _read_implied(name: str, given: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same in all models."""
    return dict(ARCHITECTURES[name].format.implied)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a `general.architecture` stands for.

    Attributes:
      format: the published format whose network it is.
      rotates_neighbours: whether rows of queries and keys are stored for such rotations.
      experts: the format if there are experts, all in every layer, whose chosen ones' weights are
        divided by their sum; None: there are none.
      positions: what layers do with positions, over and over, see `dlm.config.LAYER_WORDS`.
      norm_eps: the key of the epsilon inside norms.
      norm_shift: what is added to the weights of norms that are stored.
      read: further fields of ModelConfig, taken from what the file gives behind the name, of the
        name, what it gives and the fields that are known.
    """

    format: Format
    rotates_neighbours: bool = False
    experts: Format | None = None
    positions: tuple[str, ...] = ("rotary",)
    norm_eps: str = "attention.layer_norm_rms_epsilon"
    norm_shift: float = 0.0
    read: Callable[[str, dict[str, Any], Mapping[str, Any]], dict[str, Any]] = _nothing


ARCHITECTURES = {
    "llama": Architecture(llama.FORMAT, rotates_neighbours=True, experts=mixtral.FORMAT),
    "qwen2": Architecture(qwen2.FORMAT),
    "qwen3": Architecture(qwen3.FORMAT),
    "qwen3moe": Architecture(qwen3_moe.FORMAT, experts=qwen3_moe.FORMAT),
    "smollm3": Architecture(
        smollm3.FORMAT, rotates_neighbours=True, positions=("rotary", "rotary", "rotary", "none")
    ),
    "dream": Architecture(dream.FORMAT),
    "llada": Architecture(llada.FORMAT, rotates_neighbours=True),
    "gemma2": Architecture(gemma2.FORMAT, norm_shift=-1.0, read=_read_gemma),
    "gemma3": Architecture(gemma3_text.FORMAT, norm_shift=-1.0, read=_read_gemma),
    "phi3": Architecture(phi3.FORMAT, read=_read_phi3),
    "gpt2": Architecture(gpt2.FORMAT, norm_eps="attention.layer_norm_epsilon", read=_read_implied),
}


def stored_in_gguf(leaf: str, stored: Stored) -> Stored:
    """How a file holds one of our leaves, of how a published directory does: rows are outputs."""
    name = (_JOINED if stored.joined else NAMES)[leaf]
    rows, *columns = stored.stored
    is_input_first = columns and (rows == "d") != leaf.endswith(_INTO_D)
    layout = f"{columns[0]} {rows} -> {stored.ours}" if is_input_first else stored.layout
    return dataclasses.replace(stored, name=name, layout=layout)
