"""Files of prompts and answers: what is read and written, going on, refusals."""

import dataclasses
import functools
import json

import numpy as np
import pytest

import dlm
from decode import files
from decode.complete import as_finished, complete
from decode.files import answer_file
from decode.speculative.drafters.prompt_lookup import PromptLookup
from tests.lib.untrained import byte_lm

DECODE = functools.partial(as_finished, drafter=PromptLookup(num_drafts=3), batch_size=2)
PROMPTS = [[5, 6, 7, 5, 6], {"prompt": [8], "gen_len": 3}, {"prompt": [9, 5, 6, 7]}, [1], [2, 3]]


@pytest.fixture(scope="module")
def lm(toy_cfg, toy_params):
    return dlm.LanguageModel(toy_params, toy_cfg)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)) + "\n\n")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.exhaustive(every=4)
def test_an_interrupted_run_goes_on_to_the_same_answers(lm, prompts, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert answer_file(lm, prompts, whole, DECODE, gen_len=8) == 5
    found = read(whole)
    assert [line["index"] for line in found] == list(range(5))
    tokens = [p["prompt"] if isinstance(p, dict) else p for p in PROMPTS]
    answers = complete(lm, tokens, drafter=PromptLookup(num_drafts=3), gen_len=[8, 3, 8, 8, 8])
    for line, answer in zip(found, answers, strict=True):
        assert line["tokens"] == answer.tokens.tolist() and line["text"] is None
        assert line["num_forwards"] == answer.num_forwards
        assert line["finish_reason"] == answer.finish_reason

    def interrupted(*args, **options):
        for n, item in enumerate(DECODE(*args, **options)):
            if n == 2:
                raise KeyboardInterrupt
            yield item

    interrupted.__module__, interrupted.__name__ = "decode.complete", "as_finished"
    same = functools.partial(interrupted, **DECODE.keywords)
    with pytest.raises(KeyboardInterrupt):
        answer_file(lm, prompts, out, same, gen_len=8)
    assert len(read(out)) == 2
    with out.open("a") as file:
        file.write('{"index": 4, "te')  # cut short
    assert answer_file(lm, prompts, out, functools.partial(DECODE, batch_size=1), gen_len=8) == 3
    assert out.read_bytes() == whole.read_bytes()
    assert answer_file(lm, prompts, out, DECODE, gen_len=8) == 0


def test_answers_of_another_run_are_left_alone(lm, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    answer_file(lm, prompts, out, DECODE, gen_len=8)
    before = out.read_bytes()
    for change, message in (
        (dict(gen_len=9), "gen_len was 8 and is 9"),
        (dict(gen_len=8, seed=1), "seed was 0 and is 1"),
        (
            dict(gen_len=8, decode=functools.partial(DECODE, temperature=0.5)),
            "temperature was None",
        ),
    ):
        with pytest.raises(ValueError, match=f"answers of another run .{message}"):
            answer_file(lm, prompts, out, **{"decode": DECODE, **change})
    other = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, dtype="bfloat16"))
    with pytest.raises(ValueError, match="dtype was float32 and is bfloat16"):
        answer_file(other, prompts, out, DECODE, gen_len=8)
    prompts.write_text("[1]\n")
    with pytest.raises(ValueError, match="prompts was"):
        answer_file(lm, prompts, out, DECODE, gen_len=8)
    assert out.read_bytes() == before
    (tmp_path / "out.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match=r"out.jsonl is there without out.jsonl.settings.json"):
        answer_file(lm, prompts, out, DECODE, gen_len=8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not valid JSON"),
        ("[" * 100_000, "line 1: not valid JSON"),
        ('{"prompt": [1], "prompt": [2]}', "the key 'prompt' is there twice"),
        ("\n \n", "prompts.jsonl holds no records"),
        ("{}", "line 1 must have either a prompt or messages"),
        ('{"prompt": [1], "messages": []}', "line 1 must have either a prompt or messages"),
        ('{"prompt": [1], "max_tokens": 3}', "line 1 has 'max_tokens'; known are prompt"),
        ('{"prompt": [1.5]}', r"line 1: a prompt has 1.5 among its token ids"),
        ('{"prompt": [1], "gen_len": "3"}', "line 1: gen_len='3' must be a whole number"),
        ('{"messages": []}', "line 1: messages need a tokenizer, and the checkpoint has none"),
        ("[]", "prompt 0 is empty"),
        ('"text"', "line 1: prompts are strings but the checkpoint has no tokenizer"),
    ],
)
def test_lines_that_are_no_prompts_are_refused(lm, tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        answer_file(lm, path, tmp_path / "out.jsonl", DECODE, gen_len=4)


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("old")
    monkeypatch.setattr(type(file), "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        files.replace_file(file, "new")
    assert file.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (complete, "decode=<function complete .* must be as_finished of decode.generate or"),
        (functools.partial(as_finished, gen_len=3), "gen_len=3: leave it out, give it to answer_f"),
        (functools.partial(as_finished, seed=3), "seed=3: leave it out, give it to answer_file"),
        (functools.partial(as_finished, num_return=2), "num_return=2: .*answers do not hold it"),
        (functools.partial(as_finished, top_logprobs=2), "top_logprobs=2: .*do not hold it"),
    ],
)
def test_nothing_that_is_asked_for_is_ignored(lm, prompts, tmp_path, decode, message):
    with pytest.raises(ValueError, match=message):
        answer_file(lm, prompts, tmp_path / "out.jsonl", decode, gen_len=4)
    assert not (tmp_path / "out.jsonl").exists()


def test_functions_are_said_by_name():
    assert files.describe({"f": test_functions_are_said_by_name}) == (
        "{'f': <function test_functions_are_said_by_name>}"
    )
    assert " at 0x" not in files.describe({"f": len, "g": max, "x": np.ones(2), "h": lambda: 0})


def test_options_differ_where_one_entry_of_an_array_does():
    mask = np.zeros(5000, bool)
    said = files.describe({"ban_mask": mask})
    assert said == files.describe({"ban_mask": mask.copy()})
    mask[2500] = True
    assert said != files.describe({"ban_mask": mask})
    assert files.describe(PromptLookup(num_drafts=3)) == repr(PromptLookup(num_drafts=3))


@pytest.mark.parametrize(
    "line", [b"garbage", b"", b"\0" * 9, b"\xff", b"[]", b'{"text": 1}', b'{"index": 5}',
             b'{"index": "1"}', b'{"index": -1}', b"[" * 100_000],
)  # fmt: skip
def test_damaged_answers_are_named(tmp_path, line):
    out = tmp_path / "out.jsonl"
    out.write_bytes(b'{"index": 4}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"out.jsonl, line 2 is no answer to a prompt from 0 to 4"):
        files._read_answers(out, 5)
    out.write_bytes(b'{"index": 4}\n' + line)  # an interruption cut it short
    assert list(files._read_answers(out, 5)) == [4] and out.read_bytes() == b'{"index": 4}\n'


def test_damaged_settings_are_named(tmp_path):
    out, settings = tmp_path / "out.jsonl", tmp_path / "out.jsonl.settings.json"
    out.write_text("{}\n")
    for content in ("", "[]", "{"):
        settings.write_text(content)
        with pytest.raises(ValueError, match=r"settings.json .*: choose another file than"):
            files._claim(out, {})


def test_one_process_at_a_time(lm, prompts, tmp_path):
    out = tmp_path / "new folder" / "out.jsonl"
    with (
        files.open_to_add(out),
        pytest.raises(ValueError, match="is being written by another process"),
    ):
        answer_file(lm, prompts, out, DECODE, gen_len=8)
    with files.open_to_add(out):
        pass


def test_only_a_newline_ends_a_line(tmp_path):
    """What other tools call line breaks may stand in texts, unescaped."""
    prompts, out, odd = tmp_path / "in.jsonl", tmp_path / "out.jsonl", "x\u2028y\x85z"
    dump = lambda value: json.dumps(value, ensure_ascii=False) + "\n"
    prompts.write_text(dump(odd) + dump("d"), encoding="utf-8")
    lm = byte_lm()
    assert answer_file(lm, prompts, out, DECODE, gen_len=3) == 2
    first = json.loads(out.read_text(encoding="utf-8").split("\n")[0])
    out.write_text(dump(first | {"text": odd}), encoding="utf-8")
    assert answer_file(lm, prompts, out, DECODE, gen_len=3) == 1
    assert json.loads(out.read_text(encoding="utf-8").split("\n")[0])["text"] == odd
