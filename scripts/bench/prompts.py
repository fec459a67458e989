"""Prompts that others measure on, from a folder of question*.jsonl: Spec-Bench's, Vicuna's.

A line has `category` and `turns`; the first turn of each is asked.
"""

from __future__ import annotations

import collections
import json
import pathlib

import numpy as np

import dlm
from decode.core.requests import encode

# Spec-Bench counts these, which come from MT-bench, as one of its six categories.
MT_BENCH = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)


def read_questions(folder: str | pathlib.Path) -> dict[str, list[str]]:
    """First turns by category, in the order of the files.

    Raises:
      ValueError: there are no questions, or a line has no turn.
    """
    files = sorted(pathlib.Path(folder).glob("question*.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n")]
    questions = [json.loads(line) for line in lines if line.strip()]
    if not questions:
        raise ValueError(f"{folder} has no question*.jsonl with questions in it")
    is_spec_bench = not {"summarization", "rag"}.isdisjoint(q["category"] for q in questions)
    found: dict[str, list[str]] = collections.defaultdict(list)
    for question in questions:
        if not question["turns"]:
            raise ValueError(f"{folder}: question {question.get('question_id')} has no turns")
        category = question["category"]
        merged = is_spec_bench and category in MT_BENCH
        found["multi-turn" if merged else category].append(question["turns"][0])
    return dict(found)


def sample_prompts(
    lm: dlm.LanguageModel, questions: dict[str, list[str]], num: int
) -> dict[str, list[list[int]]]:
    """Token ids of so many prompts per category, always the same ones; as chats if it is a chat
    model.

    Raises:
      ValueError: the checkpoint has no tokenizer.
    """
    if lm.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer: prompts are text")
    prompts = {}
    for category, texts in questions.items():
        order = np.random.default_rng(0).permutation(len(texts))[:num]
        prompts[category] = [_encode(lm, texts[i]) for i in sorted(order)]
    return prompts


def _encode(lm: dlm.LanguageModel, text: str) -> list[int]:
    assert lm.tokenizer is not None
    if lm.tokenizer.chat_template is not None:
        text = lm.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return encode(lm, text)
