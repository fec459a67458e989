"""Dream: Qwen2 with bidirectional attention."""

from __future__ import annotations

from dlm.hf.format import Format
from dlm.hf.formats import qwen2

FORMAT = Format(
    model_type="Dream",
    architecture="DreamModel",
    fields={**qwen2.FORMAT.fields, "rope_theta": "rope_theta"},
    absent=qwen2.FORMAT.absent,
    fixed={
        **qwen2.FORMAT.fixed,
        "rope_scaling": ((None,), None),
        "use_mrope": ((False,), False),
        "use_sliding_window": ((False,), False),
    },
    implied=qwen2.FORMAT.implied,
    extra={**qwen2.FORMAT.extra, "sliding_window": None},
    tensors=qwen2.FORMAT.tensors,
    has_mask=True,
)
