"""Decodes your own line of people with the quickstart's model.

    python -m scripts.ask --operation=reverse --people="Alice Young, Oscar Rivera, Zoe Parker"
    python -m scripts.ask --operation=insert_index --people="Alice Young, Zoe Parker, Liam Davis" \
        --person="Nora Evans" --index=1 --cache=dual

Prints the answer, and the tokens in the order in which the model committed them.
"""

from __future__ import annotations

import pathlib

from absl import app, flags

import dlm
from decode.core.results import Completion
from decode.diffusion.components import Threshold, short_names
from decode.generate import generate
from dlm.tasks.waiting_line import OPERATIONS, WaitingLine
from dlm.tokenizer import Tokenizer
from train.host import set_up_command

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "runs/quickstart/train/model", "A model trained by scripts.quickstart."
)
_OPERATION = flags.DEFINE_enum("operation", "reverse", OPERATIONS, "What to do with the line.")
_PEOPLE = flags.DEFINE_string("people", None, "Full names, separated by commas.", required=True)
_PERSON = flags.DEFINE_string("person", None, "The new person, for insert and replace.")
_INDEX = flags.DEFINE_integer("index", None, "The position, from 0, for operations at a position.")
_THRESHOLD = flags.DEFINE_float("threshold", 0.9, "Commits what the model is at least so sure of.")
_CACHE = flags.DEFINE_enum(
    "cache", "none", sorted(short_names("cache")), "Which positions are recomputed."
)


def commit_order(completion: Completion, tokenizer: Tokenizer) -> str:
    """One line per step: the tokens it committed, dots for what was still open."""
    lines = []
    for step in range(int(completion.step_map.max()) + 1):
        at_step = completion.step_map[: len(completion.tokens)] == step
        parts = [
            tokenizer.decode([int(token)]) if now else "·"
            for token, now in zip(completion.tokens, at_step, strict=True)
        ]
        if at_step.any():
            lines.append(f"  step {step:2}  {''.join(parts)}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    set_up_command(argv)
    if not pathlib.Path(_CHECKPOINT.value).is_dir():
        raise app.UsageError(f"--checkpoint={_CHECKPOINT.value} is no folder: run make quickstart")
    people = [name.strip() for name in _PEOPLE.value.split(",")]
    try:
        example = WaitingLine(num_shots=0).ask(
            _OPERATION.value, people, index=_INDEX.value, person=_PERSON.value
        )
        lm = dlm.load(_CHECKPOINT.value)
        rule = Threshold(_THRESHOLD.value)
        completion = generate(
            lm, example.prompt, rule=rule, cache=_CACHE.value, gen_len=24, block_len=8
        )
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    assert lm.tokenizer is not None
    print(completion.text)
    print(
        f"{len(completion.tokens)} tokens in {completion.num_forwards} forwards; "
        f"surest first:\n{commit_order(completion, lm.tokenizer)}"
    )


if __name__ == "__main__":
    app.run(main)
