"""Searches of transformers, in a process of any interpreter that has it: `scripts.bench.search`.

Imports nothing of this project, whose requirements that interpreter need not have.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time


def serve() -> None:
    """Decodes prompts of standard input, a JSON object per line, until nobody asks.

    The first line that is written says which version it is, and what it can do: names of the
    functions of its `GenerationMixin`, where newer versions lack some. The argument is the folder
    of a checkpoint.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer

    def say(answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    mixin = transformers.GenerationMixin
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
    calls = [0]
    model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    has = [name for name in dir(mixin) if name.endswith("_search")]
    say({"version": transformers.__version__, "torch": torch.__version__, "has": has})
    for line in sys.stdin:
        asked = json.loads(line)
        model = model.to(getattr(torch, asked["dtype"])).eval()
        tokens, calls[0] = torch.tensor([asked["prompt"]]), 0
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, use_cache=True,
                **asked["options"],
            )  # fmt: skip
        seconds = time.perf_counter() - began
        written = out[0, len(asked["prompt"]) :].tolist()
        say({"tokens": written, "forwards": calls[0], "seconds": seconds})
