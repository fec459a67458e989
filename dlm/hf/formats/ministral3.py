"""Ministral 3: Mistral whose queries grow with their position."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm import rope
from dlm.config import ModelConfig
from dlm.hf import keys
from dlm.hf.formats import mistral
from dlm.hf.rope import KEYS, ORIGINAL, read_rope, settings, write_rope

BETA = "llama_4_scaling_beta"
MORE = (BETA, "max_position_embeddings")  # the latter repeats what stands outside


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    name, said = settings(raw)
    if keys.number(said, BETA) is None:
        raise ValueError(f"{name} must give {BETA}")
    growth = (float(said[BETA]), keys.required(said, ORIGINAL))
    of_rope = read_rope(raw, more=MORE)
    return {**of_rope, "query_growth": growth, **mistral.read_window(raw)}


def _write(cfg: ModelConfig) -> dict[str, Any]:
    written = write_rope(cfg)
    if cfg.query_growth is None or not isinstance(cfg.rope_scaling, rope.Yarn):
        return written
    said = {**written["rope_scaling"], "rope_theta": cfg.rope_theta, BETA: cfg.query_growth[0]}
    return {"rope_parameters": said, **mistral.write_window(cfg)}


FORMAT = dataclasses.replace(
    mistral.FORMAT,
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    absent={
        **mistral.FORMAT.absent,
        "head_dim": lambda raw: 128,
        "rms_norm_eps": lambda raw: 1e-5,
    },
    read=_read,
    write=_write,
    keys=(*KEYS, "sliding_window", "layer_types"),
)
