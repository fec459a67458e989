"""Tiny-A2D: Qwen3, Qwen2 and Llama without the causal mask, every position predicts its own token.

The same weights may have been trained with full attention or with blocks that are counted from the
end of the prompt (`BlockCausal(aligned=False)`); the files do not say. MASK was added to the
tokenizer, which alone names it.
"""

from __future__ import annotations

import dataclasses

from dlm.hf.format import Format
from dlm.hf.formats import llama, qwen2, qwen3


def _of(form: Format, name: str, architecture: str) -> Format:
    return dataclasses.replace(
        form,
        model_type=f"a2d-{name}",
        architecture=f"A2D{architecture}LMHeadModel",
        implied={**form.implied, "shifted_logits": False},
        has_mask=True,
    )


FORMATS = (
    _of(qwen3.FORMAT, "qwen3", "Qwen3"),
    _of(qwen2.FORMAT, "qwen2", "Qwen2"),
    _of(llama.FORMAT, "llama", "Llama"),
)
