"""Which tokens a task's completions are made of."""

from __future__ import annotations

import collections

from tqdm import tqdm

from dlm.lm import LanguageModel
from dlm.tasks import Encoded, Task


def choose_tokens(
    lm: LanguageModel, task: Task, size: int, num_examples: int
) -> tuple[list[int], str]:
    """The most frequent tokens of a task's first completions, and a sentence about them.

    Args:
      lm: whose tokens; it has a tokenizer, unless the task has token ids.
      task: what is counted.
      size: how many tokens; end-of-text, which ends each completion, is always among them.
      num_examples: at most so many are read.

    Returns:
      Token ids, ascending.
    """
    counts: collections.Counter[int] = collections.Counter()
    num = min(len(task), num_examples)
    for i in tqdm(range(num), unit="example"):
        example = task[i]
        if isinstance(example, Encoded):
            counts.update(int(t) for t in example.completion)
        else:
            assert lm.tokenizer is not None
            counts.update([*lm.tokenizer.encode(example.completion), lm.cfg.eos_token_id])
    ranked = [token for token, _ in counts.most_common() if token != lm.cfg.eos_token_id]
    chosen = sorted([lm.cfg.eos_token_id, *ranked[: size - 1]])
    share = sum(counts[token] for token in chosen) / counts.total()
    about = f"{len(chosen)} of {len(counts)} different tokens in {num} examples"
    return chosen, f"{about}, {100 * share:.2f} % of the text"
