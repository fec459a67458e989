"""How much is accepted of drafts that are drawn: chains and trees, by the rules that judge them.

    python -m scripts.drawn_drafts --target=runs/python/target/model \\
        --draft=runs/python/draft/model --prompts=prompts.txt --temperature=1

A chain of `--depth` drafts, and trees of twice as many nodes that are as deep, drawn without
replacement (recursive speculative decoding, arXiv:2402.14160): of two children of the root with a
chain below each (RSD-C), and of the two best beams per level (RSD-S). All texts follow the target's
law; rules (`decode/speculative/accept.py`) differ in how much they accept. Prints nodes, tokens per
forward of the target, with 95 % intervals over texts (bootstrap), and forwards of the draft model.
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags
from tqdm import tqdm

import dlm
from decode.evaluation.tables import markdown
from scripts.drawn_drafts.measure import RULES, measure, ways
from train.host import set_up_command


def main(argv: list[str]) -> None:
    set_up_command(argv)
    given, lines = flags.FLAGS, []
    try:
        lm, draft = dlm.load(given.target), dlm.load(given.draft)
        dlm.check_same_tokens(draft, lm)
        texts = pathlib.Path(given.prompts).read_text(encoding="utf-8").splitlines()
        texts = [text for text in texts if text]
        if not texts:
            raise ValueError(f"prompts={given.prompts} has no line with a prompt")
        asked = texts if lm.tokenizer else [[*map(int, text.split())] for text in texts]
        for name, rule, drafter in tqdm([*ways(draft, given.depth)], unit="way"):
            found = measure(
                lm, drafter, RULES[rule], asked, temperature=given.temperature,
                gen_len=given.gen_len, num_return=given.num_return,
            )  # fmt: skip
            lines.append({"drafts": name, "judged": rule} | found)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("\n" + markdown(lines))


if __name__ == "__main__":
    flags.DEFINE_string("target", None, "Folder of the target.", required=True)
    flags.DEFINE_string("draft", None, "Folder of the draft model.", required=True)
    flags.DEFINE_string("prompts", None, "A text file, a prompt per line.", required=True)
    flags.DEFINE_float("temperature", 1.0, "Of the texts.", lower_bound=0.01)
    flags.DEFINE_integer("depth", 4, "Drafts one behind the other.", lower_bound=2)
    flags.DEFINE_integer("gen_len", 128, "Most tokens per text.", lower_bound=1)
    flags.DEFINE_integer("num_return", 4, "Texts per prompt.", lower_bound=1)
    app.run(main)
