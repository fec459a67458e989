"""A model of blocks beside the one before: what the page says of both."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import dlm
from decode.causal_likelihood import causal_log_likelihood
from decode.complete import complete
from decode.evaluation.tables import read_markdown
from decode.generate import generate
from decode.speculative.drafters.self_speculation import SelfSpeculation
from scripts.block_model import measure
from tests.lib.mains import run_main
from tests.lib.models import spread
from tests.lib.untrained import char_lm
from tests.lib.weights import init_params

LENGTHS = ["--prompt_len=16", "--answer_len=16"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of both; records of which one is too long."""
    folder = tmp_path_factory.mktemp("models")
    before = char_lm()
    other = spread(init_params(jax.random.key(1), before.cfg))
    dlm.save(folder / "before", before)
    dlm.save(folder / "blocks", dataclasses.replace(before, params=other))
    texts = [("ask", "say it"), ("what", "a long answer of many words"), *[("a b", "c")] * 7]
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in texts]
    (folder / "records.jsonl").write_text("\n".join(lines))
    return folder


def test_the_page_is_of_both_models(models, tmp_path, monkeypatch):
    """Their layers lie apart, as real ones' do on CPUs."""
    monkeypatch.setattr(dlm.lm, "is_faster_apart", lambda cfg: True)
    said = run_main(
        "scripts.block_model", f"--checkpoint={models / 'blocks'}", f"--of={models / 'before'}",
        f"--records={models / 'records.jsonl'}", f"--out={tmp_path}", "--num_prompts=4",
        "--gen_len=8", "--batch_size=4", "--num_shown=1", *LENGTHS,
    )  # fmt: skip
    assert (tmp_path / "block_model.md").read_text().strip() in said
    rows = json.loads((tmp_path / "block_model.json").read_text())
    read, written = read_markdown(said)
    assert (read, written) == (rows["perplexities"], rows["texts"])

    before, blocks = dlm.load(models / "before"), dlm.load(models / "blocks")
    batches = measure.read(blocks, models / "records.jsonl", 16, 16)
    prompts, answers = measure.prompts_of(batches), measure.answers_of(batches)
    assert len(prompts) == 8 and len(answers[1]) == 16 and len(answers[0]) == 7  # with its end
    nats = [
        -sum(x.log_prob for x in causal_log_likelihood(lm, [*zip(prompts, answers, strict=True)]))
        for lm in (before, blocks)
    ]
    num = sum(map(len, answers))
    for row, value in zip(read, nats, strict=False):
        assert float(row["perplexity"].split()[0]) == pytest.approx(
            math.exp(value / num), abs=0.006
        )
    over = math.exp((nats[1] - nats[0]) / num)
    assert [row["over the model before"].split()[0] for row in read[:2]] == ["1.00", f"{over:.2f}"]
    assert float(read[2]["perplexity"].split()[0]) > 1

    asked = prompts[:4]
    plain = complete(blocks, asked, gen_len=8)
    several = generate(blocks, asked, method="causal_context", block_len=4, gen_len=8)
    by_name = {row["written"]: row for row in written}
    same = sum(np.array_equal(a.tokens, b.tokens) for a, b in zip(plain, several, strict=True))
    assert by_name["one by one"]["tokens per forward"].startswith("1.00")
    drafted = complete(blocks, asked, gen_len=8, drafter=SelfSpeculation(4))
    forwards = sum(one.num_forwards + one.draft_forwards for one in drafted)
    assert sum(one.draft_forwards for one in drafted) > 0
    rate = float(by_name["self-speculation"]["tokens per forward"].split()[0])
    assert rate == pytest.approx(sum(one.tokens.size for one in plain) / forwards, abs=0.006)
    assert by_name["self-speculation"]["as plain"] == "4/4"
    assert by_name["blocks, 0.9 sure"]["as plain"] == f"{same}/4"
    assert by_name["one by one"]["tokens"] == str(sum(one.tokens.size for one in plain))
    assert f"    {plain[0].text}" in said


def test_what_is_missing_is_said(models):
    flags = [f"--checkpoint={models / 'blocks'}", f"--of={models / 'before'}"]
    said = run_main("scripts.block_model", *flags, "--records=/nowhere.jsonl", code=1)
    assert "error: " in said and "/nowhere.jsonl" in said
