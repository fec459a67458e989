"""Texts of an exact length: what a search gains by foreseeing how long a text will get.

    python -m scripts.length_search --checkpoint=runs/translation/model \\
        --head=runs/translation/length/model --prompts=runs/translation/own/valid.jsonl

Conditional beam search (arXiv:2311.08817) looks for the most probable text of so many tokens,
end-of-text included: once it only knows which lengths are still possible, as beam search whose
texts end there alone, and once it asks a head of `dlm.heads.length` how probable the length still
is. `configs/length_head.py` says how a head is trained, and where such prompts come from. Prints
mean log-probabilities of what is found, and how often those with the head are higher or lower.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from absl import app, flags

import dlm
from decode.complete import complete
from decode.core.requests import Prompt
from decode.evaluation.statistics import bootstrap
from decode.evaluation.tables import markdown
from decode.search.loop import SearchMethod
from decode.search.strategies.conditional_beam import ConditionalBeam, Length
from dlm.heads import length
from dlm.lm import LanguageModel
from dlm.params import Params
from dlm.tasks.jsonl import read_records
from train.host import set_up_command


def row(lm: LanguageModel, own: Params, asked: list[Prompt], n: int, beams: int) -> dict[str, str]:
    """Of the table: texts of n tokens."""
    found = []
    for head in (None, own):
        strategy = ConditionalBeam(Length(least=n, most=n, own=head), num_beams=beams)
        answers = complete(lm, asked, method=SearchMethod(strategy), gen_len=n, progress=True)
        found.append(np.array([answer.score for answer in answers], float))
    without, with_head = found
    gain = with_head - without
    low, high = bootstrap(gain)
    return {
        "length": str(n), "beams": str(beams), "prompts": str(len(asked)),
        "log p": f"{without.mean():.2f}", "with the head": f"{with_head.mean():.2f}",
        "gain": f"{gain.mean():.2f} ({low:.2f} to {high:.2f})",
        "higher": f"{(gain > 1e-3).mean():.0%}", "lower": f"{(gain < -1e-3).mean():.0%}",
    }  # fmt: skip


def main(argv: list[str]) -> None:
    set_up_command(argv)
    given = flags.FLAGS
    try:
        lm = dlm.load(given.checkpoint)
        own = length.load(given.head, lm)[1]
        prompts = [json.dumps(record.get("prompt")) for _, record in read_records(given.prompts)]
        asked = [json.loads(x) for x in dict.fromkeys(prompts)][: given.num_prompts]
        table = [row(lm, own, asked, int(n), given.num_beams) for n in given.lengths]
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(markdown(table))


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "For dlm.load.", required=True)
    flags.DEFINE_string("head", None, "Folder of the head.", required=True)
    flags.DEFINE_string("prompts", None, "JSON lines.", required=True)
    flags.DEFINE_list("lengths", ["6", "10", "16", "24"], "Tokens of texts.")
    flags.DEFINE_integer("num_beams", 5, "Of each search.", lower_bound=1)
    flags.DEFINE_integer("num_prompts", 200, "The first so many.", lower_bound=1)
    app.run(main)
