"""Stable-DiffCoder: Llama made into a block-diffusion model, under Llama's `model_type`."""

from __future__ import annotations

import dataclasses

from dlm.hf.formats import llama

FORMAT = dataclasses.replace(
    llama.FORMAT,
    architecture="StableDiffcoderForCausalLM",
    implied={**llama.FORMAT.implied, "shifted_logits": False, "block_len": 4},
    default_ids={"mask_token_id": 5},  # the published sampler's; config.json does not name it
    has_mask=True,
)
