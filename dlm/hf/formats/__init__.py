"""The families whose published checkpoints are read and written, one file each.

A model is written in the first format that can hold it.
"""

from dlm.hf.formats import dream, llada, llama, qwen2, qwen3

FORMATS = {
    form.model_type: form
    for form in (
        llada.FORMAT,
        dream.FORMAT,
        llama.FORMAT,
        qwen2.FORMAT,
        qwen3.FORMAT,
    )
}
