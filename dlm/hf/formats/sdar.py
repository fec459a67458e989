"""SDAR and TraDo: Qwen3 as a block-diffusion model, every position predicts its own token."""

from __future__ import annotations

import dataclasses

from dlm.hf.formats import qwen3

FORMAT = dataclasses.replace(
    qwen3.FORMAT,
    model_type="sdar",
    architecture="SDARForCausalLM",
    fields={**qwen3.FORMAT.fields, "block_len": "block_size"},
    absent={**qwen3.FORMAT.absent, "block_size": lambda raw: 4},  # that of the older uploads
    implied={**qwen3.FORMAT.implied, "shifted_logits": False},
    default_ids={"mask_token_id": 151669},  # "<MASK>"; not in the config.json of older uploads
    extra={**qwen3.FORMAT.extra, "fuse_cross_entropy": False},
    has_mask=True,
)
