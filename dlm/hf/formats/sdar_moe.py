"""SDAR with experts: Qwen3-MoE as a block-diffusion model."""

from __future__ import annotations

import dataclasses

from dlm.hf.formats import qwen3_moe, sdar

FORMAT = dataclasses.replace(
    qwen3_moe.FORMAT,
    model_type="sdar_moe",
    architecture="SDARMoeForCausalLM",
    fields={**qwen3_moe.FORMAT.fields, "block_len": "block_size"},
    absent={**qwen3_moe.FORMAT.absent, "block_size": sdar.FORMAT.absent["block_size"]},
    implied={**qwen3_moe.FORMAT.implied, "shifted_logits": False},
    default_ids=sdar.FORMAT.default_ids,
    has_mask=True,
)
