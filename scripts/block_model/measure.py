"""Perplexities, tokens per forward and texts of a model of blocks, beside the one before.

Perplexities are exp of nats per token over all tokens of the answers, ends included. "bound" of
blocks is the mean over masked copies of `train.objectives.block_diffusion`, every token masked in
one copy of each pair, behind a text that is read from left to right. Intervals are of 95 %, answers
drawn with replacement (bootstrap).

Of texts: "tokens per forward" counts every forward of the model, drafting ones included; "judged"
is the perplexity that the model before gives the text, so plain decoding of it is the least there
is to hope for, and "as plain" how many texts are, token for token, what the same weights write one
by one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from tqdm import tqdm

from decode.causal_likelihood import causal_log_likelihood
from decode.complete import complete
from decode.core.results import Completion
from decode.diffusion.components import Threshold
from decode.evaluation.statistics import bootstrap_ratio
from decode.generate import generate
from decode.speculative.contracts import Drafter
from decode.speculative.drafters.self_speculation import SelfSpeculation
from dlm.config import ModelConfig
from dlm.lm import LanguageModel
from dlm.params import Params
from dlm.tasks.jsonl import JsonlTask
from dlm.trainable import Learned
from train.config import DataConfig
from train.data import Batch, valid_batches
from train.objectives import Context
from train.objectives.block_diffusion import BlockDiffusion

THRESHOLDS = (0.95, 0.9, 0.8, 0.6)
BEFORE, PLAIN = "the model before", "one by one"
ROWS = 8  # answers judged at once

Tokens = list[int]
Texts = Mapping[str, list[Completion]]  # by who wrote them


def read(lm: LanguageModel, path: str, prompt_len: int, answer_len: int) -> list[Batch]:
    """Records with prompts and completions, as many as are whole batches.

    Raises:
      ConfigError: there are fewer than a batch.
      OSError, ValueError: the file cannot be read, or the model has no tokenizer.
    """
    if lm.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer, so it cannot read records")
    task = JsonlTask(path, prompt="{prompt}", completion="{completion}")
    data = DataConfig(
        task={}, prompt_len=prompt_len, completion_len=answer_len, batch_size=ROWS, too_long="cut"
    )
    return valid_batches(task, lm.tokenizer, data, max(1, len(task) // ROWS))


def prompts_of(batches: Sequence[Batch]) -> list[Tokens]:
    """Their tokens."""
    return [
        row[start:].tolist()
        for batch in batches
        for row, start in zip(batch["prompt"], batch["prompt_start"], strict=True)
    ]


def answers_of(batches: Sequence[Batch]) -> list[Tokens]:
    """Their tokens, ends included."""
    return [
        row[:length].tolist()
        for batch in batches
        for row, length in zip(batch["completion"], batch["completion_len"], strict=True)
    ]


def perplexities(
    lm: LanguageModel, before: LanguageModel, batches: Sequence[Batch], block_len: int, copies: int
) -> list[dict[str, str]]:
    """A line for the model before, for blocks of one, and for blocks.

    Args:
      lm: the model of blocks.
      before: what it was made from.
      batches: of `read`.
      block_len: positions per block.
      copies: pairs of masked copies per answer.
    """
    pairs = [*zip(prompts_of(batches), answers_of(batches), strict=True)]
    lengths = np.array([len(answer) for _, answer in pairs])
    base = _nats(before, pairs)
    objective = BlockDiffusion(
        block_len=block_len, complementary=True, causal_context=True
    ).for_validation()
    bound = np.zeros(len(batches))
    for i, batch in enumerate(tqdm(batches, "bound", unit="batch")):
        keys = jax.random.split(jax.random.key(i), copies)
        bound[i] = np.mean([float(_bound(lm.params, batch, k, lm.cfg, objective)) for k in keys])
    of_batch = lengths.reshape(len(batches), ROWS).sum(axis=1)
    return [
        _line(BEFORE, base, base, lengths),
        _line(PLAIN, _nats(lm, pairs), base, lengths),
        _line(
            f"blocks of {block_len}, bound", bound * of_batch,
            base.reshape(len(batches), ROWS).sum(axis=1), of_batch,
        ),
    ]  # fmt: skip


@functools.partial(jax.jit, static_argnames=("cfg", "objective"))
def _bound(
    params: Params, batch: Batch, key: jax.Array, cfg: ModelConfig, objective: BlockDiffusion
) -> jax.Array:
    """Nats per token of the answers of a batch, at most, by masks that are drawn by the key."""
    context = Context(key, 1.0, is_validation=True)
    return objective.loss(Learned(params), cfg, batch, context)[1]["nll_bound"]


def _nats(lm: LanguageModel, pairs: Sequence[tuple[Tokens, Tokens]]) -> np.ndarray:
    found = causal_log_likelihood(lm, pairs, batch_size=ROWS)
    return np.array([-one.log_prob for one in found])


def _line(name: str, nats: np.ndarray, base: np.ndarray, lengths: np.ndarray) -> dict[str, str]:
    def show(nats: np.ndarray) -> str:
        low, high = np.exp(bootstrap_ratio(nats, lengths))
        return f"{math.exp(nats.sum() / lengths.sum()):.2f} ({low:.2f} to {high:.2f})"

    return {"read": name, "perplexity": show(nats), "over the model before": show(nats - base)}


def write(
    lm: LanguageModel, before: LanguageModel, prompts: list[Tokens], block_len: int,
    gen_len: int, batch_size: int,
) -> Texts:  # fmt: skip
    """Answers of both, of the model of blocks in every way."""

    def plainly(lm: LanguageModel, drafter: Drafter | None = None) -> list[Completion]:
        return complete(
            lm, prompts, drafter=drafter, gen_len=gen_len, batch_size=batch_size, progress=True
        )

    texts = {
        BEFORE: plainly(before),
        PLAIN: plainly(lm),
        "self-speculation": plainly(lm, SelfSpeculation(block_len)),
    }
    for threshold in THRESHOLDS:
        texts[f"blocks, {threshold} sure"] = generate(
            lm, prompts, method="causal_context", rule=Threshold(threshold), block_len=block_len,
            gen_len=gen_len, batch_size=batch_size, progress=True,
        )  # fmt: skip
    return texts


def compare(before: LanguageModel, prompts: list[Tokens], texts: Texts) -> list[dict[str, str]]:
    """A line per way of writing."""
    lines = []
    for name, said in texts.items():
        forwards = np.array([one.num_forwards + one.draft_forwards for one in said])
        written = np.array([one.tokens.size for one in said])
        low, high = bootstrap_ratio(written, forwards)
        pairs = [(p, one.tokens.tolist()) for p, one in zip(prompts, said, strict=True)]
        pairs = [pair for pair in pairs if pair[1]]
        lengths = np.array([len(answer) for _, answer in pairs])
        same = sum(
            np.array_equal(one.tokens, other.tokens)
            for one, other in zip(said, texts[PLAIN], strict=True)
        )
        judged = _line(name, nats := _nats(before, pairs), nats, lengths)["perplexity"]
        lines.append({
            "written": name,
            "tokens": str(written.sum()),
            "tokens per forward": f"{written.sum() / forwards.sum():.2f} ({low:.2f} to {high:.2f})",
            "judged": judged,
            "as plain": f"{same}/{len(said)}",
        })  # fmt: skip
    return lines


def samples(lm: LanguageModel, prompts: list[Tokens], texts: Texts, num: int) -> list[str]:
    """The first answers, as Markdown: who wrote what."""
    assert lm.tokenizer is not None
    shown = []
    for i, prompt in enumerate(prompts[:num]):
        shown += ["Prompt:", _quoted(lm.tokenizer.decode(prompt))]
        for name, said in texts.items():
            one = said[i]
            rate = one.tokens.size / (one.num_forwards + one.draft_forwards)
            shown += [f"{name[0].upper() + name[1:]}, {rate:.2f}:", _quoted(one.text or "")]
    return shown


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines())
