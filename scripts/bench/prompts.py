"""Prompts that others measure on, from a folder of question*.jsonl: Spec-Bench's, Vicuna's.

A line has `category` and `turns`; the first turn of each is asked.
"""

from __future__ import annotations

import collections
import pathlib

import numpy as np

import dlm
from decode.core.requests import encode
from dlm.tasks.jsonl import read_records

# Spec-Bench counts these, which come from MT-bench, as one of its six categories.
MT_BENCH = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)


def read_questions(folder: str | pathlib.Path) -> dict[str, list[str]]:
    """First turns by category, in the order of the files.

    Raises:
      ValueError: there are no questions, or a line has no category or no turn.
    """
    files = sorted(pathlib.Path(folder).glob("question*.jsonl"))
    questions = []
    for file in files:
        for number, question in read_records(file):
            category, turns = question.get("category"), question.get("turns")
            if not isinstance(category, str):
                raise ValueError(f"{file}, line {number}: category={category!r} must be a name")
            if not (isinstance(turns, list) and turns and isinstance(turns[0], str)):
                raise ValueError(f"{file}, line {number}: turns={turns!r} must be a list of texts")
            questions.append((category, turns[0]))
    if not questions:
        raise ValueError(f"folder {str(folder)!r} has no question*.jsonl")
    is_spec_bench = not {"summarization", "rag"}.isdisjoint(name for name, _ in questions)
    found: dict[str, list[str]] = collections.defaultdict(list)
    for category, turn in questions:
        merged = is_spec_bench and category in MT_BENCH
        found["multi-turn" if merged else category].append(turn)
    return dict(found)


def sample_prompts(
    lm: dlm.LanguageModel, questions: dict[str, list[str]], num: int, gen_len: int
) -> dict[str, list[list[int]]]:
    """Token ids of so many prompts per category, always the same ones; as chats if it is a chat
    model.

    Those to which the model could not answer with `gen_len` tokens are passed over, which is said.

    Raises:
      ValueError: the checkpoint has no tokenizer, or all prompts are too long.
    """
    if lm.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer: prompts are text")
    prompts = {}
    for category, texts in questions.items():
        chosen: dict[int, list[int]] = {}
        num_long = 0
        for i in np.random.default_rng(0).permutation(len(texts)).tolist():
            if len(chosen) == num:
                break
            tokens = _encode(lm, texts[i])
            if len(tokens) + gen_len <= lm.cfg.max_seq_len:
                chosen[i] = tokens
            else:
                num_long += 1
        if num_long:
            print(
                f"{category}: {num_long} prompts are passed over, which with gen_len={gen_len} are "
                f"longer than max_seq_len={lm.cfg.max_seq_len}"
            )
        if chosen:
            prompts[category] = [chosen[i] for i in sorted(chosen)]
    if not prompts:
        raise ValueError(
            f"max_seq_len={lm.cfg.max_seq_len} of the model is less than any prompt and "
            f"gen_len={gen_len} take"
        )
    return prompts


def _encode(lm: dlm.LanguageModel, text: str) -> list[int]:
    assert lm.tokenizer is not None
    if lm.tokenizer.chat_template is not None:
        text = lm.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return encode(lm, text)
