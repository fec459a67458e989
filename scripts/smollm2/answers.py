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
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from decode import complete
from decode.complete import as_finished
from decode.files import answer_file
from dlm import chat
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
      num: of prompts.
      batch_size: rows decoded at once.

    Raises:
      FileNotFoundError: there are no such data.
      ValueError: files are of another run, see `decode.files.answer_file`, or have another number
        of prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts, answers = folder / "prompts.jsonl", folder / "answers.jsonl"
    if not prompts.exists():
        questions = [chat for turn in read_questions(data) if (chat := _chat(lm, turn))]
        questions = questions[: num - num // 3]
        print(f"{len(questions)} questions; {num - len(questions)} more are made up", flush=True)
        chats = [*questions, *invent(lm, num - len(questions), batch_size)]
        order = np.random.default_rng(0).permutation(len(chats))
        _write(prompts, ({"prompt": chats[i]} for i in order))
    elif (found := len(read_records(prompts))) != num:
        raise ValueError(
            f"{prompts} has {found} prompts, not --num_answers={num}: choose another folder, or "
            "delete it with its answers"
        )
    decode = functools.partial(as_finished, batch_size=batch_size)
    answer_file(lm, prompts, answers, decode, gen_len=GEN_LEN, progress=True)
    asked = [record["prompt"] for _, record in read_records(prompts)]
    given = [record for _, record in read_records(answers)]
    records = [
        {"prompt": prompt, "completion": answer["text"]}
        for prompt, answer in zip(asked, given, strict=True)
        if _is_whole(lm, answer)
    ]
    _write(folder / "valid.jsonl", records[:NUM_VALID])
    _write(folder / "train.jsonl", records[NUM_VALID:])


def _is_whole(lm: LanguageModel, answer: Mapping[str, Any]) -> bool:
    """Whether what is learned is what was said: something, and no end where it was cut off.

    A text that was cut off may have fewer tokens when it is read again, and would end there.
    """
    assert lm.tokenizer is not None
    text: str = answer["text"]
    if answer["finish_reason"] != "length":
        return bool(text)
    return len(lm.tokenizer.encode(text)) >= GEN_LEN


def read_questions(data: str) -> list[str]:
    """Training questions of MBPP, each with a test, and then those of GSM8K."""
    mbpp = [
        f"{r['text']}{BEFORE_TEST}{r['test_list'][0]}"
        for _, r in read_records(pathlib.Path(data) / "mbpp" / "train.jsonl")
    ]
    gsm8k = [r["question"] for _, r in read_records(pathlib.Path(data) / "gsm8k" / "train.jsonl")]
    return [*mbpp, *gsm8k]


def invent(lm: LanguageModel, num: int, batch_size: int) -> list[str]:
    """Different chats whose user turn a model writes and ends by itself, at temperature 0.8.

    Raises:
      ValueError: it does not write enough of them.
    """
    assert lm.tokenizer is not None
    whole = lm.tokenizer.apply_chat_template([{"role": "user", "content": HERE}])
    before = chat.Rendered(whole[: whole.index(HERE)])
    found: dict[str, None] = {}
    seed = tries = 0
    while len(found) < num and tries < MOST_TRIES:
        more = (num - len(found)) * 5 // 4 + 1
        turns = complete.as_finished(
            lm, [before] * more,
            gen_len=USER_LEN, temperature=0.8, seed=seed, batch_size=batch_size,
            progress=True,
        )  # fmt: skip
        for _, turn in turns:
            text = (turn.text or "").strip()
            ends = turn.finish_reason == "eos" and len(text.split()) > 3
            if ends and (made := _chat(lm, text)):
                found.setdefault(made)
        seed, tries = seed + more, tries + 1
    if len(found) < num:
        raise ValueError(f"the model has made up {len(found)} of {num} prompts, and goes on not to")
    return [*found][:num]


def _chat(lm: LanguageModel, turn: str) -> str | None:
    """A chat with one turn; None if it is too long."""
    assert lm.tokenizer is not None
    text = lm.tokenizer.apply_chat_template([{"role": "user", "content": turn}])
    return text if len(lm.tokenizer.encode(text, whole=True)) <= PROMPT_LEN else None


def _write(file: pathlib.Path, records: Iterable[dict[str, str]]) -> None:
    partial = file.with_name(f"{file.name}.partial")
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(file)
