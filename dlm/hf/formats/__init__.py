"""The families whose published checkpoints are read and written, one file each.

A model is written in the first format that can hold it, unless it came from another.
"""

from dlm.hf.formats import (
    a2d,
    dream,
    fast_dllm_v2,
    gemma2,
    gemma3_text,
    gpt2,
    granite,
    llada,
    llada2_moe,
    llada_moe,
    llama,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    sdar,
    sdar_moe,
    seed_oss,
    smollm3,
    stable_diffcoder,
)

FORMATS = {  # by architecture, which tells apart what shares a `model_type`
    form.architecture: form
    for form in (
        llada.FORMAT,
        dream.FORMAT,
        llama.FORMAT,
        qwen2.FORMAT,
        qwen3.FORMAT,
        sdar.FORMAT,
        fast_dllm_v2.FORMAT,
        stable_diffcoder.FORMAT,
        *a2d.FORMATS,
        llada_moe.FORMAT,
        llada2_moe.FORMAT,
        sdar_moe.FORMAT,
        qwen3_moe.FORMAT,
        mistral.FORMAT,
        ministral3.FORMAT,
        mixtral.FORMAT,
        olmoe.FORMAT,
        gemma2.FORMAT,
        gemma3_text.FORMAT,
        phi3.FORMAT,
        smollm3.FORMAT,
        gpt2.FORMAT,
        olmo2.FORMAT,
        granite.FORMAT,
        qwen2_moe.FORMAT,
        seed_oss.FORMAT,
    )
}
