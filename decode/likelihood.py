"""How likely a masked-diffusion model finds given answers: Monte Carlo over masked copies.

The conditional log-likelihood of an answer of A tokens, as masked-diffusion models are judged on
multiple choice, is a bound: masks of every size, on average over where they are,

    L = sum over n = 1..A of  1/n  E[ sum over masked i of log p(a_i | prompt, unmasked answer) ],

the inner mean over all sets of n masked positions. One forward scores N copies of a pair:

    k ~ Uniform{1..A}
    n_j = round(k + j A / N), wrapped into 1..A        for j = 0..N-1
    copy j: n_j answer positions, uniformly drawn, are masked
    estimate = 1/N sum over j of  A / n_j  sum over masked i of log p(a_i | ...)

Each n_j is uniform on 1..A by itself, so the estimate is unbiased; together they spread evenly,
which lowers its variance. With A = 1 one copy says it all.

Reference: Nie et al., "Large Language Diffusion Models" (LLaDA), arXiv:2502.09992, §2.4, and
`get_log_likelihood` of the public code. Deviation: halves are rounded up. The public code rounds
them to even, so some n_j is not uniform and the estimate is biased when j A / N ends in 1/2: with
A = 3 and N = 2, its n_1 takes the values 2, 1, 1.

Antithetic pairs: copies j and j + N/2 share one random order of the answer positions and one n;
one masks the first n of the order, its partner the A - n others, or all again if n = A (nothing
masked would say nothing). The partner's count is again uniform on 1..A, and the end of a uniformly
random order is as uniform a set as its beginning: either copy is unbiased alone, so their mean is.
The n of the N/2 pairs are spread as above. Each token is so scored once by a pair with n < A.

Reference: Gong et al., "DiffuCoder", arXiv:2506.20639 (complementary masks). Zhu et al., "LLaDA
1.5", arXiv:2505.19223, study the variance of these estimates; what they call antithetic is another
thing, one set of masks for two models, and comes from calling this with the same `seed` for both.

Letters: R pairs, N copies of each, B = R N rows, T positions, G answer positions at the end of T, A
answer length, M mask orders.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from decode.core.requests import PROMPT_BUCKET, per_prompt_seeds, whole_number
from decode.diffusion.components import FixedBlocks, MaskInputs, Quota
from decode.diffusion.loop import DiffusionMethod, check_tokens, decode, init_state
from decode.diffusion.step import mask_id
from dlm import vocab
from dlm.config import ModelConfig
from dlm.lm import LanguageModel
from dlm.models import decoder
from dlm.params import Params
from dlm.sharding import constrain
from dlm.window import Window

ANSWER_BUCKET = 16  # answers are padded to this times a power of two

Text = str | Sequence[int]
Pair = tuple[Text, Text]


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """What a model says about one answer.

    Attributes:
      log_prob: estimate of the answer's log-likelihood given its prompt, in nats.
      standard_error: of `log_prob`, from how the batches of copies differ; 0 for an answer of one
        token, whose estimate is exact; NaN if there was only one batch.
      num_tokens: A, the answer's length.
      num_forwards: masked copies that the model was run on (NFE), twice that with guidance.
    """

    log_prob: float
    standard_error: float
    num_tokens: int
    num_forwards: int


def log_likelihood(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    *,
    num_samples: int = 128,
    batch_size: int = 16,
    guidance: float = 0.0,
    antithetic: bool = False,
    seed: int | Sequence[int] = 0,
) -> list[Likelihood]:
    """Estimates log-likelihoods of answers given prompts; see above for the estimator.

    A pair's result depends on its random stream, which its seed or its place in the list picks, and
    on nothing else in the list. Compiles once per bucket of lengths: whole pairs go up to a
    multiple of 32 tokens, answers to a power of two.

    Example:
      >>> lm = dlm.load("path/to/checkpoint")
      >>> choices = [("The capital of France is", city) for city in (" Paris", " Rome")]
      >>> best = max(log_likelihood(lm, choices), key=lambda choice: choice.log_prob)

    Args:
      lm: from `dlm.load`.
      pairs: (prompt, answer), both text or both token ids. Of text, white space at the end of the
        prompt goes to the answer, prompt and whole text are encoded separately, and what the whole
        has after the prompt's length is the answer.
      num_samples: masked copies per answer; at most `batch_size` or a multiple of it. Answers of
        one token take one.
      batch_size: sequences per forward. Up to so many copies of an answer share out the mask
        sizes, so it changes results, within their errors.
      guidance: classifier-free guidance scale w >= 0: z_u + (w + 1) (z_c - z_u), where z_u sees
        MASK in place of the prompt. Twice the forwards. 0: off.
      antithetic: whether copies come in pairs with complementary masks.
      seed: of all random masks, pair i then uses `fold_in(key(seed), i)`; or a number in [0, 2^32)
        per pair, which then uses `fold_in(key(0), number)`.

    Returns:
      One `Likelihood` per pair.

    Raises:
      ValueError: on an empty answer, lengths or tokens that the model does not allow, text without
        a tokenizer, or numbers that make no sense, in one sentence.
      TypeError: if a pair is not two texts or two lists of token ids.
    """
    _check_numbers(num_samples, batch_size, guidance, antithetic)
    encoded = _encode_pairs(lm, pairs)
    first, streams = _streams(seed, len(encoded))
    groups: dict[tuple[int, int, int, int], list[int]] = {}
    for i, (prompt, answer) in enumerate(encoded):
        T = min(prompt_slots(len(prompt) + len(answer)), lm.cfg.max_seq_len)
        G = min(answer_slots(len(answer)), T)
        wanted = 1 if len(answer) == 1 else num_samples
        N = min(wanted, batch_size)
        groups.setdefault((T, G, N, wanted // N), []).append(i)

    results: dict[int, Likelihood] = {}
    key = jax.random.key(first)
    progress = tqdm(total=len(encoded), desc="likelihood", unit="pair", delay=5)
    with progress, contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh):
        for (T, G, N, num_batches), members in groups.items():
            for chunk in chunks(members, batch_size // N):
                # The last chunk repeats pairs to be full: one shape, one program.
                index = np.resize(np.asarray(chunk, np.int32), batch_size // N)
                tokens, start, answer_len = pad_left(lm.cfg, encoded, index, T)
                estimates = [
                    _estimate(
                        lm.params,
                        lm.cfg,
                        tokens,
                        start,
                        answer_len,
                        key,
                        streams[index],
                        step,
                        guidance or None,
                        num_answer_slots=G,
                        num_copies=N,
                        antithetic=antithetic and N > 1,
                    )
                    for step in range(num_batches)
                ]
                per_pair = np.stack(jax.device_get(estimates), axis=1).astype(np.float64)
                for i, samples in zip(chunk, per_pair[: len(chunk)], strict=True):
                    A = len(encoded[i][1])
                    results[i] = Likelihood(
                        log_prob=float(samples.mean()),
                        standard_error=0.0 if A == 1 else _standard_error(samples),
                        num_tokens=A,
                        num_forwards=num_batches * N * (2 if guidance else 1),
                    )
                progress.update(len(chunk))
    return [results[i] for i in range(len(encoded))]


def greedy_match(
    lm: LanguageModel, pairs: Sequence[Pair], *, batch_size: int = 16, guidance: float = 0.0
) -> list[bool]:
    """Whether greedy decoding, the surest token of all at each step, gives exactly the answer.

    As many steps as the answer has tokens, in any order; MASK is never proposed. End-of-text is a
    token like any other.

    Args:
      lm: from `dlm.load`.
      pairs: as for `log_likelihood`.
      batch_size: answers decoded at a time.
      guidance: as for `log_likelihood`.

    Returns:
      One bool per pair.

    Raises:
      ValueError, TypeError: as `log_likelihood`.
    """
    _check_numbers(1, batch_size, guidance, False)
    encoded = _encode_pairs(lm, pairs)
    method = DiffusionMethod(
        scheduler=FixedBlocks(None),
        rule=Quota(lm.cfg.max_seq_len),  # more steps than positions: one token per step
        guidance=guidance or None,
    )
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (prompt, answer) in enumerate(encoded):
        slots = prompt_slots(len(prompt)), answer_slots(len(answer))
        groups.setdefault(slots, []).append(i)

    results: dict[int, bool] = {}
    progress = tqdm(total=len(encoded), desc="greedy match", unit="pair", delay=5)
    with progress, contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh):
        for (P, G), members in groups.items():
            for chunk in chunks(members, batch_size):
                state = init_state(
                    lm.cfg,
                    method,
                    [encoded[i][0] for i in chunk],
                    gen_len=[len(encoded[i][1]) for i in chunk],
                    prompt_len=P,
                    canvas_len=G,
                    batch_size=batch_size,
                )
                state = decode(lm.params, lm.cfg, method, state)
                for i, row in zip(chunk, np.asarray(state.tokens), strict=False):
                    answer = encoded[i][1]
                    results[i] = row[P : P + len(answer)].tolist() == answer
                progress.update(len(chunk))
    return [results[i] for i in range(len(encoded))]


def mask_counts(k: jax.Array | int, answer_len: jax.Array | int, num: int) -> jax.Array:
    """Evenly spread numbers of masked positions: [num] int32, each in 1..A.

    Args:
      k: scalar int32 in 1..A. The first of them.
      answer_len: scalar int32. A.
      num: how many.
    """
    j = jnp.arange(num, dtype=jnp.int32)
    n = k + (2 * j * answer_len + num) // (2 * num)  # round(k + j A / num), halves up
    return (n - 1) % answer_len + 1


def draw_masks(
    key: jax.Array, is_answer: jax.Array, *, num_copies: int, antithetic: bool
) -> jax.Array:
    """Which positions are masked in each copy of one pair: [N, G] bool, at least one per copy.

    Args:
      key: of this pair and batch.
      is_answer: [G] bool. Positions that may be masked; at least one.
      num_copies: N, even if `antithetic`.
      antithetic: whether copy N/2 + j is the partner of copy j.
    """
    count_key, order_key = jax.random.split(key)
    A = is_answer.sum()
    M = num_copies // 2 if antithetic else num_copies
    counts = mask_counts(jax.random.randint(count_key, (), 1, A + 1), A, M)[:, None]  # [M, 1]
    noise = jax.random.uniform(order_key, (M, is_answer.shape[0]))
    noise = jnp.where(is_answer[None], noise, jnp.inf)
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)  # place of each position in the order
    is_masked = rank < counts
    if not antithetic:
        return is_masked
    partner = (rank >= counts % A) & is_answer[None]  # of all A: all A again
    return jnp.concatenate([is_masked, partner])


@functools.partial(jax.jit, static_argnames=("cfg", "num_answer_slots", "num_copies", "antithetic"))
def _estimate(
    params: Params,
    cfg: ModelConfig,
    tokens: jax.Array,
    start: jax.Array,
    answer_len: jax.Array,
    key: jax.Array,
    stream: jax.Array,
    step: jax.Array | int,
    guidance: jax.Array | float | None,
    *,
    num_answer_slots: int,
    num_copies: int,
    antithetic: bool,
) -> jax.Array:
    """One forward: the mean over N copies of each of R pairs, [R] float32.

    Args:
      params: the model's.
      cfg: the model.
      tokens: [R, T] int32. Prompts and answers, padded on the left.
      start: [R] int32. First real position.
      answer_len: [R] int32. A; the last so many of T are the answer.
      key: of all pairs.
      stream: [R] uint32. A pair's random stream.
      step: where in the stream.
      guidance: scale, or None.
      num_answer_slots: G >= the longest answer.
      num_copies: N.
      antithetic: see `draw_masks`.
    """
    (R, T), G, N = tokens.shape, num_answer_slots, num_copies
    fold_in = jax.random.fold_in
    keys = jax.vmap(lambda i: fold_in(fold_in(key, i), step))(stream)
    is_answer = jnp.arange(T)[None] >= T - answer_len[:, None]  # [R, T]
    draw = functools.partial(draw_masks, num_copies=N, antithetic=antithetic)
    is_masked = jax.vmap(draw)(keys, is_answer[:, T - G :])  # [R, N, G]

    answer = jnp.repeat(tokens[:, T - G :], N, axis=0)  # [B, G]
    masked = jnp.where(is_masked.reshape(R * N, G), mask_id(cfg), answer)
    canvas = jnp.concatenate([jnp.repeat(tokens[:, : T - G], N, axis=0), masked], axis=1)
    start, is_answer = jnp.repeat(start, N), jnp.repeat(is_answer, N, axis=0)
    hidden = _hidden(params, cfg, canvas, start)
    if guidance is not None:
        if cfg.logit_cap is not None:
            raise ValueError(
                "guidance mixes logits through hidden states, which logits with logit_cap="
                f"{cfg.logit_cap} do not allow: leave it out"
            )
        # Logits are linear in hidden states, so these are mixed in place of logits.
        blind = _hidden(params, cfg, jnp.where(is_answer, canvas, mask_id(cfg)), start)
        hidden, blind = hidden.astype(jnp.float32), blind.astype(jnp.float32)
        hidden = blind + (guidance + 1) * (hidden - blind)
    if cfg.shifted_logits:
        hidden = jnp.roll(hidden, 1, axis=1)  # hidden i - 1 predicts token i
    log_prob = vocab.score(vocab.head(params), hidden[:, T - G :], answer).log_prob

    total = jnp.where(is_masked, log_prob.reshape(R, N, G), 0.0).sum(axis=2)
    return (total / is_masked.sum(axis=2) * answer_len[:, None]).mean(axis=1)


def _hidden(params: Params, cfg: ModelConfig, tokens: jax.Array, start: jax.Array) -> jax.Array:
    """[B, T, D] hidden states of whole rows that are padded on the left."""
    window = Window.left_padded(constrain(tokens, "batch", None), start)
    return decoder.forward(params, cfg, window).hidden


def _streams(seed: int | Sequence[int], num: int) -> tuple[int, np.ndarray]:
    """The seed of the key that all share, and what is folded into it: [num] uint32."""
    is_one = np.ndim(seed) == 0
    seeds = [whole_number("seed", seed)] if is_one else per_prompt_seeds(seed, num)
    if wrong := [x for x in seeds if not 0 <= x < 2**32]:
        raise ValueError(f"seed has {wrong[0]}, which must be in [0, 2^32)")
    if is_one:
        return seeds[0], np.arange(num, dtype=np.uint32)
    return 0, np.array(seeds, np.uint32)


def pad_left(
    cfg: ModelConfig,
    encoded: Sequence[tuple[list[int], list[int]]],
    index: np.ndarray,
    length: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [R, T], first real positions [R] and answer lengths [R] of the pairs `index`."""
    tokens = np.full((len(index), length), cfg.pad_token_id, np.int32)
    for row, i in zip(tokens, index, strict=True):
        whole = encoded[i][0] + encoded[i][1]
        row[length - len(whole) :] = whole
    start = [length - len(encoded[i][0]) - len(encoded[i][1]) for i in index]
    answer_len = [len(encoded[i][1]) for i in index]
    return tokens, np.array(start, np.int32), np.array(answer_len, np.int32)


def prompt_slots(length: int) -> int:
    return -(-max(length, 1) // PROMPT_BUCKET) * PROMPT_BUCKET


def answer_slots(length: int) -> int:
    return ANSWER_BUCKET << (-(-length // ANSWER_BUCKET) - 1).bit_length()


def chunks(members: list[int], size: int) -> Iterator[list[int]]:
    return (members[i : i + size] for i in range(0, len(members), size))


def _standard_error(samples: np.ndarray) -> float:
    n = len(samples)
    return float(samples.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def _check_numbers(num_samples: int, batch_size: int, guidance: float, antithetic: bool) -> None:
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    num_copies = min(num_samples, batch_size)
    if num_samples % num_copies:
        raise ValueError(
            f"num_samples={num_samples} must be a multiple of batch_size={batch_size}, or less "
            "than it"
        )
    if antithetic and num_copies % 2:
        name = "num_samples" if num_samples <= batch_size else "batch_size"
        raise ValueError(f"{name}={num_copies} must be even for antithetic pairs")
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance={guidance:g} must be at least 0 and finite")


def _encode_pairs(lm: LanguageModel, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    """Token ids of all prompts and answers, checked."""
    MaskInputs().validate(lm.cfg)
    if lm.cfg.block_len is not None:
        raise ValueError(
            "likelihoods show the model the whole text, but it was trained to see its own block of "
            f"{lm.cfg.block_len} and those before it: use a model with full attention"
        )
    if isinstance(pairs, str) or not isinstance(pairs, Sequence):
        raise TypeError(
            f"pairs is a {type(pairs).__name__}; it must be a list of (prompt, answer) pairs"
        )
    encoded = [encode_pair(lm, i, pair) for i, pair in enumerate(pairs)]
    for i, (prompt, answer) in enumerate(encoded):
        _check_pair(lm.cfg, i, prompt, answer)
    return encoded


def encode_pair(lm: LanguageModel, i: int, pair: Any) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer of pair i, see `log_likelihood`."""
    is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
    if is_pair and all(isinstance(part, str) for part in pair):
        if lm.tokenizer is None:
            raise ValueError(
                f"pair {i} is text but the checkpoint has no tokenizer: give token ids, or load a "
                "directory that has a tokenizer.json"
            )
        shorter = type(pair[0])(pair[0].rstrip())  # of a chat template, it still is
        prompt = lm.tokenizer.encode_begin(shorter)
        return prompt, lm.tokenizer.encode_begin(pair[0] + pair[1])[len(prompt) :]
    if is_pair and all(
        isinstance(part, (Sequence, np.ndarray)) and not isinstance(part, str) for part in pair
    ):
        name = f"a token of pair {i}"
        prompt, answer = ([whole_number(name, token) for token in part] for part in pair)
        return prompt, answer
    raise TypeError(f"pair {i} is {pair!r:.80}; it must be two strings or two lists of token ids")


def _check_pair(cfg: ModelConfig, i: int, prompt: list[int], answer: list[int]) -> None:
    if not answer:
        raise ValueError(f"the answer of pair {i} has 0 tokens; it must have at least 1")
    if len(prompt) + len(answer) > cfg.max_seq_len:
        raise ValueError(
            f"pair {i} has {len(prompt)} + {len(answer)} tokens, which must be at most the model's "
            f"max_seq_len={cfg.max_seq_len}"
        )
    if cfg.shifted_logits and not prompt:
        raise ValueError(
            f"the prompt of pair {i} is empty, but this model predicts each token from the one "
            "before: give at least one token"
        )
    for name, tokens in (("prompt", prompt), ("answer", answer)):
        check_tokens(cfg, f"the {name} of pair {i}", tokens)
