"""Dream: Qwen2 with bidirectional attention."""

from __future__ import annotations

import dataclasses

from dlm.hf.formats import qwen2

FORMAT = dataclasses.replace(
    qwen2.FORMAT,
    model_type="Dream",
    architecture="DreamModel",
    absent={key: of for key, of in qwen2.FORMAT.absent.items() if key != "rope_theta"},
    fixed={
        **qwen2.FORMAT.fixed,
        "rope_scaling": ((None,), None),
        "use_mrope": ((False,), False),
    },
    is_causal=False,
    has_mask=True,
)
