"""Phi-3 and Phi-4: Llama with fused matrices; a part of the heads may be rotated."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm.config import ModelConfig
from dlm.hf import keys
from dlm.hf.format import Stored
from dlm.hf.formats import mistral, qwen2
from dlm.hf.rope import KEYS, ORIGINAL, read_rope, settings, write_rope

LAYER = "model.layers.{}."
QKV, GATE_UP = ("nh", "kh", "kh"), ("f", "f")


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    raw = {**raw, ORIGINAL: keys.whole(raw, ORIGINAL, 4096)}
    name, said = settings(raw)
    kind = said.get("rope_type", said.get("type", "default"))
    if kind in ("su", "yarn"):  # what first uploads call it
        raw = {**raw, name: {**said, "rope_type": "longrope", "type": "longrope"}}
    elif kind not in ("default", "longrope"):
        raise ValueError(f"{name} of type {kind!r} is not supported; only 'longrope' is")
    return {**read_rope(raw, is_partial=True), **mistral.read_window(raw)}


def _write(cfg: ModelConfig) -> dict[str, Any]:
    written = {**write_rope(cfg), **mistral.write_window(cfg)}
    original = written.get("rope_scaling", {}).get(ORIGINAL, cfg.max_seq_len)
    return {**written, ORIGINAL: original}


FORMAT = dataclasses.replace(
    qwen2.FORMAT,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    absent={**qwen2.FORMAT.absent, "rms_norm_eps": lambda raw: 1e-5},
    implied={"shifted_logits": True},
    extra={**qwen2.FORMAT.extra, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    tensors={
        **qwen2.FORMAT.tensors,
        **{
            f"layers/attention/{name}": Stored(
                LAYER + "self_attn.qkv_proj.weight", layout, QKV, "qkv".index(name)
            )
            for name, layout in (("q", "nh d -> nhd"), ("k", "kh d -> khd"), ("v", "kh d -> khd"))
        },
        **{
            f"layers/mlp/{name}": Stored(
                LAYER + "mlp.gate_up_proj.weight", "f d -> df", GATE_UP, part
            )
            for part, name in enumerate(("gate", "up"))
        },
    },
    has_mask=None,
    read=_read,
    write=_write,
    keys=(*KEYS, "sliding_window", "layer_types"),
)
