"""Learns the entropy from which on AdaDec pauses, for one model, from right answers.

    python -m scripts.adadec_threshold --checkpoint=smollm2 --texts=mbpp/train.jsonl \\
        --prompt="{text}\\n" --answer="{code}"

Texts are JSON lines, of whose fields `--prompt` and `--answer` are made. Prints theta, for

    complete(lm, prompts, method=SearchMethod(AdaDec(theta=...)))

with how often it tells right guesses from wrong ones among texts that it was not learned from, and
at how many tokens it would pause.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import app, flags

import dlm
from dlm.tasks.jsonl import read_records, render
from scripts.adadec_threshold.learn import learn, observe
from train.host import set_up_command


def main(argv: Sequence[str]) -> None:
    set_up_command(list(argv))
    said = flags.FLAGS
    try:
        lm = dlm.load(said.checkpoint, dtype=said.dtype or None)
        prompt, answer = (x.replace("\\n", "\n") for x in (said.prompt, said.answer))
        pairs = [
            (render(prompt, record, where), render(answer, record, where))
            for number, record in read_records(said.texts)[: said.num_texts]
            for where in [f"{said.texts}, line {number}"]
        ]
        entropy, is_right = observe(lm, pairs, said.batch_size)
        found = learn(entropy, is_right)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"theta {found.theta:.3f} nats, of {len(entropy)} tokens in {len(pairs)} texts")
    print(f"P(right) = sigmoid({found.slope:.3f} H + {found.offset:.3f}), cut at {found.cut:.2f}")
    print(f"tells {found.accuracy:.1%} apart; {is_right.mean():.1%} of the best guesses are right")
    print(f"pauses at {(entropy >= found.theta).mean():.1%} of tokens")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "For dlm.load; or smollm2.", required=True)
    flags.DEFINE_string("texts", None, "JSON lines.", required=True)
    flags.DEFINE_string("prompt", "{prompt}", "Made of a line's fields; \\n: a new line.")
    flags.DEFINE_string("answer", "{answer}", "Likewise, what is right.")
    flags.DEFINE_integer("num_texts", 1000, "The first so many.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 8, "Texts at once.", lower_bound=1)
    flags.DEFINE_string("dtype", "", "Of the parameters; default: the checkpoint's.")
    app.run(main)
