"""The families whose published checkpoints are read and written, one file each.

A model is written in the first format that can hold it.
"""

from dlm.hf.formats import (
    a2d,
    dream,
    fast_dllm_v2,
    llada,
    llama,
    qwen2,
    qwen3,
    sdar,
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
    )
}
