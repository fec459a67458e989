"""How likely an autoregressive model finds given answers: exactly, with one forward each.

    log p(answer | prompt) = sum over i of log p(a_i | prompt, a_1 .. a_{i-1})

`decode.likelihood` is its counterpart for masked-diffusion models, where such a number is a bound.

Letters: B rows, T positions, G answer positions at the end of T, A answer length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from decode.core.requests import check_tokens
from decode.likelihood import Pair, answer_slots, chunks, encode_pair, pad_left, prompt_slots
from dlm import vocab
from dlm.config import ModelConfig
from dlm.lm import LanguageModel
from dlm.models import decoder
from dlm.params import Params
from dlm.sharding import constrain
from dlm.window import Window


@dataclasses.dataclass(frozen=True)
class CausalLikelihood:
    """What a model says about one answer.

    Attributes:
      log_prob: the answer's log-likelihood given its prompt, in nats.
      num_tokens: A, the answer's length.
      is_greedy: whether each token of the answer is the most probable one behind those before it.
    """

    log_prob: float
    num_tokens: int
    is_greedy: bool


def causal_log_likelihood(
    lm: LanguageModel, pairs: Sequence[Pair], *, batch_size: int = 16
) -> list[CausalLikelihood]:
    """Log-likelihoods of answers given prompts, read from left to right.

    A pair's result depends on nothing else in the list. Compiles once per bucket of lengths: whole
    pairs go up to a multiple of 32 tokens, answers to a power of two.

    Example:
      >>> lm = dlm.load("path/to/checkpoint")
      >>> (one,) = causal_log_likelihood(lm, [("The capital of France is", " Paris")])
      >>> one.log_prob, one.is_greedy

    Args:
      lm: from `dlm.load`.
      pairs: (prompt, answer), as `decode.likelihood.log_likelihood` takes them. The last token of
        an answer is not read, so a pair may have one token more than the model can hold.
      batch_size: pairs per forward.

    Returns:
      One `CausalLikelihood` per pair.

    Raises:
      ValueError: the model never learned to read from left to right, a prompt or an answer is
        empty or does not fit into the model, or `batch_size` is below 1, in one sentence.
      TypeError: if a pair is not two texts or two lists of token ids.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if lm.cfg.never_causal:
        raise ValueError(
            "this is a diffusion model, which never learned to read from left to right: use "
            "decode.likelihood"
        )
    encoded = [encode_pair(lm, i, pair) for i, pair in enumerate(pairs)]
    for i, (prompt, answer) in enumerate(encoded):
        _check_pair(lm.cfg, i, prompt, answer)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (prompt, answer) in enumerate(encoded):
        T = min(prompt_slots(len(prompt) + len(answer) - 1), lm.cfg.max_seq_len)
        groups.setdefault((T, min(answer_slots(len(answer)), T)), []).append(i)

    results: dict[int, CausalLikelihood] = {}
    progress = tqdm(total=len(encoded), desc="likelihood", unit="pair", delay=5)
    with progress, contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh):
        for (T, G), members in groups.items():
            for chunk in chunks(members, batch_size):
                # The last chunk repeats pairs to be full: one shape, one program.
                index = np.resize(np.asarray(chunk, np.int32), batch_size)
                # One slot more holds the last token of each answer, which is no input.
                tokens, start, answer_len = pad_left(lm.cfg, encoded, index, T + 1)
                found = _score(
                    lm.params, lm.cfg, tokens[:, :-1], tokens[:, T + 1 - G :], start, answer_len
                )
                for i, log_prob, is_greedy in zip(chunk, *jax.device_get(found), strict=False):
                    results[i] = CausalLikelihood(
                        float(log_prob), len(encoded[i][1]), bool(is_greedy)
                    )
                progress.update(len(chunk))
    return [results[i] for i in range(len(encoded))]


@functools.partial(jax.jit, static_argnames="cfg")
def _score(
    params: Params,
    cfg: ModelConfig,
    tokens: jax.Array,
    answer: jax.Array,
    start: jax.Array,
    answer_len: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One forward: log-likelihoods [B] float32, and whether answers are greedy [B] bool.

    Args:
      params: the model's.
      cfg: the model.
      tokens: [B, T] int32. Prompts and answers without their last tokens, padded on the left.
      answer: [B, G] int32. What the last G positions are to predict.
      start: [B] int32. First real position.
      answer_len: [B] int32. A; the last so many of G are the answer.
    """
    G = answer.shape[1]
    window = Window.left_padded(constrain(tokens, "batch", None), start, is_causal=True)
    hidden = decoder.forward(params, cfg, window).hidden[:, tokens.shape[1] - G :]
    stats = vocab.score(vocab.head(params), hidden, answer)
    is_answer = jnp.arange(G)[None] >= G - answer_len[:, None]
    log_prob = jnp.where(is_answer, stats.log_prob, 0.0).sum(axis=1)
    return log_prob, (~is_answer | (stats.token == answer)).all(axis=1)


def _check_pair(cfg: ModelConfig, i: int, prompt: list[int], answer: list[int]) -> None:
    for name, tokens in (("prompt", prompt), ("answer", answer)):
        if not tokens:
            raise ValueError(f"the {name} of pair {i} has 0 tokens; it must have at least 1")
        check_tokens(cfg, f"the {name} of pair {i}", tokens)
    if len(prompt) + len(answer) - 1 > cfg.max_seq_len:
        raise ValueError(
            f"pair {i} has {len(prompt)} + {len(answer)} tokens, of which all but the last must be "
            f"at most the model's max_seq_len={cfg.max_seq_len}"
        )
