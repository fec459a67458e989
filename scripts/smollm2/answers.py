"""What SmolLM2 says, for drafters to learn: prompts, its own answers, and records to train on.

A third of the prompts it makes up itself: given a chat that ends where the user's words begin, it
writes a user's turn (Xu et al., "Magpie: Alignment Data Synthesis from Scratch by Prompting Aligned
LLMs with Nothing", arXiv:2406.08464). The others are questions of GSM8K and MBPP, of their training
parts. Answers are greedy, as those that drafters are measured on.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterable

import numpy as np

from decode import complete
from decode.complete import as_finished
from decode.files import answer_file
from dlm.lm import LanguageModel
from dlm.tasks.jsonl import read_records

PROMPT_LEN, GEN_LEN = 192, 192  # tokens, of a chat up to its answer, and of the answer
USER_LEN = 96  # tokens of a user's turn that is made up
NUM_VALID = 96  # records that are held out
MOST_TRIES = 10  # batches of prompts that are made up
HERE = "[here]"
BEFORE_TEST = " Your code should pass this test:\n"


def make_answers(
    lm: LanguageModel, data: str, folder: pathlib.Path, num: int, batch_size: int
) -> None:
    """Writes prompts.jsonl, answers.jsonl, train.jsonl and valid.jsonl, as far as they are missing.

    Args:
      lm: a chat model.
      data: folder of `gsm8k/train.jsonl` and `mbpp/train.jsonl`.
      folder: where the files go.
      num: of prompts, at least.
      batch_size: rows decoded at once.

    Raises:
      FileNotFoundError: there are no such data.
      ValueError: files are of another run, see `decode.files.answer_file`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts, answers = folder / "prompts.jsonl", folder / "answers.jsonl"
    if not prompts.exists():
        questions = read_questions(data, num - num // 3)
        print(f"{len(questions)} questions; {num // 3} more are made up", flush=True)
        invented = invent(lm, num - len(questions), batch_size)
        _write(prompts, ({"prompt": text} for text in _shuffled(lm, [*questions, *invented])))
    decode = functools.partial(as_finished, batch_size=batch_size)
    answer_file(lm, prompts, answers, decode, gen_len=GEN_LEN, progress=True)
    asked = [record["prompt"] for _, record in read_records(prompts)]
    given = [record["text"] for _, record in read_records(answers)]
    records = [{"prompt": p, "completion": a} for p, a in zip(asked, given, strict=True) if a]
    _write(folder / "valid.jsonl", records[:NUM_VALID])
    _write(folder / "train.jsonl", records[NUM_VALID:])


def read_questions(data: str, num: int) -> list[str]:
    """All training questions of MBPP, each with a test, and as many of GSM8K as are missing."""
    mbpp = [
        f"{r['text']}{BEFORE_TEST}{r['test_list'][0]}"
        for _, r in read_records(pathlib.Path(data) / "mbpp" / "train.jsonl")
    ]
    gsm8k = [r["question"] for _, r in read_records(pathlib.Path(data) / "gsm8k" / "train.jsonl")]
    return [*mbpp, *gsm8k][:num]


def invent(lm: LanguageModel, num: int, batch_size: int) -> list[str]:
    """Different user turns that a chat model writes and ends by itself, at temperature 0.8."""
    assert lm.tokenizer is not None
    chat = lm.tokenizer.apply_chat_template([{"role": "user", "content": HERE}])
    before = chat[: chat.index(HERE)]
    found: dict[str, None] = {}
    seed = 0
    for _ in range(MOST_TRIES):
        if len(found) >= num:
            break
        more = (num - len(found)) * 5 // 4 + 1
        turns = complete.as_finished(
            lm, [before] * more,
            gen_len=USER_LEN, temperature=0.8, seed=seed, batch_size=batch_size,
            progress=True,
        )  # fmt: skip
        for _, turn in turns:
            text = (turn.text or "").strip()
            if turn.finish_reason == "eos" and len(text.split()) > 3:
                found.setdefault(text)
        seed += more
    else:
        raise ValueError(f"the model has made up {len(found)} of {num} prompts, and goes on not to")
    return [*found][:num]


def _shuffled(lm: LanguageModel, turns: list[str]) -> Iterable[str]:
    """Chats with one turn each, without those that are too long."""
    assert lm.tokenizer is not None
    for i in np.random.default_rng(0).permutation(len(turns)):
        chat = lm.tokenizer.apply_chat_template([{"role": "user", "content": turns[i]}])
        if len(lm.tokenizer.encode(chat, whole=True)) <= PROMPT_LEN:
            yield chat


def _write(file: pathlib.Path, records: Iterable[dict[str, str]]) -> None:
    partial = file.with_name(f"{file.name}.partial")
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(file)
