"""`scripts.draft_lengths` has the rounds of each length, and an oracle that wastes no draft."""

import jax
import pytest

import dlm
from dlm.heads.specdec_pp import StopHead
from tests.lib.mains import run_main
from tests.lib.paths import GOLDEN


@pytest.mark.exhaustive
def test_the_table(tmp_path):
    draft, head = dlm.load(GOLDEN / "llama_draft"), StopHead(num_blocks=0)
    head.export(tmp_path, draft, head.fresh(jax.random.key(0), draft.cfg, draft.params))
    (tmp_path / "prompts.txt").write_text("3 5 8\n4 1\n")
    said = run_main(
        "scripts.draft_lengths", f"--target={GOLDEN / 'llama_target'}", "--gen_len=12",
        f"--draft={GOLDEN / 'llama_draft'}", f"--head={tmp_path / 'model'}",
        f"--prompts={tmp_path / 'prompts.txt'}", "--ratio=0.5",
    )  # fmt: skip
    rows = {x[:24].strip(): [float(y) for y in x[24:].split()] for x in said.splitlines()[1:]}
    longest, oracle = rows["always 8"], rows["oracle"]
    assert oracle[0] == oracle[1] == longest[1] and oracle[2] == longest[2]
    assert longest[0] == 9 and rows["always 1"][0] == 2
    assert oracle[3] < longest[3]
    assert len(rows) == 10 and all(row[2] >= oracle[2] for row in rows.values())


@pytest.mark.exhaustive(every=4)
def test_what_cannot_be_decoded_is_an_error_of_one_sentence(tmp_path):
    draft, head = dlm.load(GOLDEN / "llama_draft"), StopHead(num_blocks=0)
    head.export(tmp_path, draft, head.fresh(jax.random.key(0), draft.cfg, draft.params))
    flags = [f"--{x}={GOLDEN / f'llama_{x}'}" for x in ("target", "draft")]
    flags += [f"--head={tmp_path / 'model'}", f"--prompts={tmp_path / 'prompts.txt'}"]
    for prompt, message in (("3 x", "invalid literal"), ("3 999999", "999999")):
        (tmp_path / "prompts.txt").write_text(prompt)
        said = run_main("scripts.draft_lengths", *flags, code=1)
        assert said.startswith("error: ") or "\nerror: " in said
        assert message in said and "Traceback" not in said
