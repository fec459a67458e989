"""How long drafts are and should be: chains of one length, SpecDec++ by threshold, and an oracle.

    python -m scripts.draft_lengths --target=runs/python/target/model \\
        --draft=runs/python/draft/model --head=runs/python/stop/model --prompts=prompts.txt

The oracle knows in every round how many drafts the target will keep, and makes no more: it has the
rounds of the longest chain. Prints a table: steps of the draft model and drafts kept per round (k
drafts take k + 1 steps; SpecDec++ reads the last one beside the next root), forwards, and time over
that of plain decoding, where a step takes `--ratio` of a forward of the target.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from absl import app, flags

import dlm
from decode.complete import complete
from decode.core.results import Completion
from decode.speculative.drafters.draft_model import DraftModel
from decode.speculative.drafters.specdec_pp import SpecDecPP
from dlm.heads import specdec_pp

LENGTHS = (1, 2, 4, 8)
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
HEAD = f"{'drafts':24}{'steps':>8}{'kept':>8}{'forwards':>10}{'time':>8}"


def line(name: str, answers: Sequence[Completion], ratio: float, knows: bool = False) -> str:
    """A row of the table; `knows`: as if only drafts had been made that were kept."""
    counts = np.sum([np.asarray(x.acceptance_histogram) for x in answers], axis=0)
    rounds, kept = counts.sum(), (counts * np.arange(len(counts))).sum()
    steps = kept if knows else sum(x.draft_forwards for x in answers)
    plain = sum(len(x.canvas) for x in answers)
    time = (rounds + ratio * steps) / plain
    return f"{name:24}{steps / rounds:8.2f}{kept / rounds:8.2f}{rounds:10d}{time:8.2f}"


def table(given: flags.FlagValues) -> None:
    """Prints, line by line."""
    lm, draft = dlm.load(given.target), dlm.load(given.draft)
    dlm.check_same_tokens(draft, lm)
    own = specdec_pp.load(given.head, draft)[1]
    lines = [x for x in pathlib.Path(given.prompts).read_text(encoding="utf-8").splitlines() if x]
    asked = lines if lm.tokenizer else [[*map(int, x.split())] for x in lines]
    if not asked:
        raise ValueError(f"prompts={given.prompts} has no line with a prompt")
    print(HEAD)
    for num in LENGTHS:
        drafter = DraftModel(draft.params, draft.cfg, num_drafts=num)
        answers = complete(lm, asked, drafter=drafter, gen_len=given.gen_len)
        print(line(f"always {num}", answers, given.ratio))
    print(line("oracle", answers, given.ratio, knows=True))
    for h in THRESHOLDS:
        stops = SpecDecPP(draft.params, draft.cfg, own=own, num_drafts=LENGTHS[-1], threshold=h)
        answers = complete(lm, asked, drafter=stops, gen_len=given.gen_len)
        print(line(f"SpecDec++, {h:g}", answers, given.ratio))


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}")
    try:
        table(flags.FLAGS)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("target", None, "Folder of the target.", required=True)
    flags.DEFINE_string("draft", None, "Folder of the draft model.", required=True)
    flags.DEFINE_string("head", None, "Folder of the head.", required=True)
    flags.DEFINE_string("prompts", None, "A text file, a prompt per line.", required=True)
    flags.DEFINE_integer("gen_len", 128, "Most tokens per answer.", lower_bound=1)
    flags.DEFINE_float("ratio", 0.1, "Seconds of a step over the target's.", lower_bound=0)
    app.run(main)
