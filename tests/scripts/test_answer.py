"""A file of prompts, answered by a command."""

import json

import dlm
from dlm.tasks.waiting_line import WaitingLine
from tests.lib.mains import run_main
from tests.lib.untrained import untrained


def test_a_file_is_answered_once(tmp_path):
    task, model, out = WaitingLine(num_shots=0), tmp_path / "model", tmp_path / "answers.jsonl"
    dlm.save(model, untrained(task))
    asked = tmp_path / "prompts.jsonl"
    asked.write_text("".join(json.dumps({"prompt": task[i].prompt}) + "\n" for i in range(5)))
    flags = [f"--checkpoint={model}", f"--prompts={asked}", f"--out={out}", "--gen_len=8",
             "--block_len=4", "--batch_size=2"]  # fmt: skip
    said = run_main("scripts.answer", *flags, "--method=threshold")
    assert f"{out} is complete: 5 answers are new." in said
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(5))
    assert all(line["num_forwards"] > 0 and isinstance(line["text"], str) for line in lines)
    assert "0 answers are new" in run_main("scripts.answer", *flags, "--method=threshold")
    said = run_main("scripts.answer", *flags, "--method=klass", code=1)
    assert "error: " in said and "answers of another run (method was 'threshold'" in said
    said = run_main(
        "scripts.answer", "--checkpoint=tests/golden/llama_target", f"--prompts={asked}",
        f"--out={out}", "--block_len=4", code=1,
    )  # fmt: skip
    assert "error: --block_len=4 is for diffusion" in said
