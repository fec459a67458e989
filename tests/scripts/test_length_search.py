"""Texts of an exact length, with a head and without: what the table says of them."""

import json

import numpy as np
import pytest

import dlm
from decode.complete import complete
from decode.evaluation.tables import read_markdown
from decode.search.components import ConditionalBeam
from decode.search.loop import SearchMethod
from decode.search.strategies.conditional_beam import Length
from dlm.heads import files
from dlm.heads.length import LengthHead
from dlm.tasks.countdown import Countdown
from dlm.tokenizer import word_tokenizer
from tests.lib.heads import init
from tests.lib.mains import run_main
from tests.lib.untrained import tiny

PROMPTS = [[3, 4, 5], [6, 7]]


def test_the_table_is_of_texts_of_that_length(tmp_path):
    dlm.save(tmp_path / "model", tiny(word_tokenizer(Countdown().pieces), 64))
    lm = dlm.load(tmp_path / "model")
    heads = LengthHead(d_hidden=8, num_buckets=5)
    own = {name: 3 * x for name, x in init(heads, lm.cfg).items()}
    files.save(tmp_path / "head", heads, lm, own)
    lines = [{"prompt": PROMPTS[i]} for i in (0, 0, 1)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = run_main(
        "scripts.length_search", f"--checkpoint={tmp_path / 'model'}", "--lengths=4,1",
        f"--head={tmp_path / 'head'}", f"--prompts={tmp_path / 'prompts.jsonl'}", "--num_beams=2",
    )  # fmt: skip
    row, short = read_markdown(said[said.index("| length") :])[0]
    scores = [
        [
            answer.score
            for answer in complete(
                lm, PROMPTS, gen_len=4,
                method=SearchMethod(ConditionalBeam(Length(least=4, most=4, own=head), 2)),
            )
        ]
        for head in (None, own)
    ]  # fmt: skip
    without, with_head = np.array(scores).mean(axis=1)
    assert float(short["gain"].split()[0]) == 0  # nothing but the end
    assert row["prompts"] == "2" and without != with_head
    assert float(row["log p"]) == pytest.approx(without, abs=0.006)
    assert float(row["with the head"]) == pytest.approx(with_head, abs=0.006)
    assert float(row["gain"].split()[0]) == pytest.approx(with_head - without, abs=0.006)
