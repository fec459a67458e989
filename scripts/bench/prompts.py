"""What is asked: tasks of this project, questions that others measure on, or passages.

Questions are in a folder of question*.jsonl, such as Spec-Bench's or Vicuna's. A line has
`category` and `turns`; the first turn of each is asked. Passages are of Python's standard library,
of 40 to 900 characters: what they do is asked, or how they go on if the checkpoint has no chat
template.
"""

from __future__ import annotations

import collections
import pathlib

import numpy as np

import dlm
from decode.core.requests import encode
from decode.evaluation.job import make_job
from dlm.tasks.jsonl import read_records
from dlm.tasks.presets import TASKS
from dlm.tasks.python_source import PythonSource

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


def some_prompts(
    lm: dlm.LanguageModel, task: str, folder: str, num: int, gen_len: int, block_len: int = 1
) -> tuple[list[list[int]], int]:
    """Token ids of so many prompts, and the most tokens of an answer.

    Args:
      lm: the model.
      task: of `dlm.tasks.presets`, whose held-out examples are asked; "": none.
      folder: of questions, of all categories in like parts, in no order; "": none. Without both,
        passages of very different lengths, in no order.
      num: prompts; fewer where there are no more.
      gen_len: most tokens of an answer; tasks have their own.
      block_len: positions per block, of which a task's answers are made.

    Raises:
      ValueError: both are given, there are no questions, or the checkpoint has no tokenizer.
    """
    if task and folder:
        raise ValueError(f"--task={task} and --prompts={folder} both say what is asked: give one")
    if task:
        job = make_job(lm, TASKS[task], num_examples=num, block_len=block_len)
        return list(job.prompts), job.gen_len
    if not folder:
        return _passages(lm, num), gen_len
    questions = read_questions(folder)
    found = sample_prompts(lm, questions, -(-num // len(questions)), gen_len)
    prompts = [prompt for some in found.values() for prompt in some]
    order = np.random.default_rng(0).permutation(len(prompts))[:num]
    return [prompts[i] for i in order], gen_len


def _passages(lm: dlm.LanguageModel, num: int) -> list[list[int]]:
    if lm.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer to read passages with")
    rng = np.random.default_rng(0)
    prompts: list[list[int]] = []
    for chars in np.geomspace(40, 900, num).astype(int)[rng.permutation(num)]:
        passages = PythonSource(prompt_chars=int(chars), split="test")
        text = passages[int(rng.integers(len(passages)))].prompt
        if lm.tokenizer.chat_template is not None:
            asked = f"What does this Python code do?\n\n{text}"
            text = lm.tokenizer.apply_chat_template([{"role": "user", "content": asked}])
        prompts.append(lm.tokenizer.encode(text, whole=True))
    return prompts


def _encode(lm: dlm.LanguageModel, text: str) -> list[int]:
    assert lm.tokenizer is not None
    if lm.tokenizer.chat_template is not None:
        text = lm.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return encode(lm, text)
