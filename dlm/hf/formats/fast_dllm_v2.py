"""Fast-dLLM v2: Qwen2.5 made into a block-diffusion model that kept its shifted logits."""

from __future__ import annotations

import dataclasses

from dlm.hf.formats import qwen2

FORMAT = dataclasses.replace(
    qwen2.FORMAT,
    model_type="Fast_dLLM_Qwen",
    architecture="Fast_dLLM_QwenForCausalLM",
    fields={**qwen2.FORMAT.fields, "block_len": "bd_size"},
    absent={**qwen2.FORMAT.absent, "bd_size": lambda raw: 32},
    default_ids={"mask_token_id": 151665},  # "|<MASK>|"; only the tokenizer names it
    has_mask=True,
)
