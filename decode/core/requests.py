"""What is asked of a decoding loop: prompts, lengths and seeds, checked and brought into one shape.

Similar requests share a compilation: lengths go up as `round_lengths` says, batches as `round_rows`
says. Rounding changes no result.

Letters: B rows, P prompt length, G completion positions.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlm.config import ModelConfig
from dlm.lm import LanguageModel
from dlm.sharding import batch_shards

PROMPT_BUCKET = 32
PREFILL = 512  # most prompt tokens per forward
MAX_ROWS = 32  # at once, unless more are asked for
Prompt = str | Sequence[int]
OnePrompt = str | list[int]  # and a list of prompts, as type checkers tell them apart:
ManyPrompts = list[str] | list[list[int]] | list[Prompt] | tuple[Prompt, ...]


@dataclasses.dataclass(frozen=True)
class Requests:
    """Checked requests.

    Attributes:
      gen_lens: most tokens to write, per prompt.
      key: [B, 2] uint32. A random stream per row.
      P: prompt length of all rows, at least the longest.
      G: completion length of all rows, likewise.
      B: rows, at least the number of prompts.
    """

    gen_lens: list[int]
    key: np.ndarray
    P: int
    G: int
    B: int


def is_single(prompts: Any) -> bool:
    """Whether `prompts` is one prompt: a string, or a non-empty sequence of integers."""
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, bytes) or not _is_list(prompts):
        raise TypeError(
            f"prompts is a {type(prompts).__name__}; it must be a string, a list of token ids, or "
            "a list of these"
        )
    return len(prompts) > 0 and isinstance(prompts[0], (int, np.integer))


def encode(lm: LanguageModel, prompt: Prompt) -> list[int]:
    """A prompt as token ids: a string as the model's own tokenizer does, begin token and all."""
    if isinstance(prompt, str):
        if lm.tokenizer is None:
            raise ValueError(
                "prompts are strings but the checkpoint has no tokenizer that could be read: give "
                "token ids, or load a directory that has a tokenizer.json"
            )
        return lm.tokenizer.encode(prompt, whole=True)
    hint = "; messages go through lm.tokenizer.apply_chat_template"
    if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, (Sequence, np.ndarray)):
        raise TypeError(
            f"a prompt is a {type(prompt).__name__}; it must be a string or a list of token ids"
            f"{hint if isinstance(prompt, Mapping) else ''}"
        )
    if wrong := [x for x in prompt if isinstance(x, bool) or not isinstance(x, (int, np.integer))]:
        raise TypeError(
            f"a prompt has {wrong[0]!r} among its token ids, which must be integers"
            f"{hint if isinstance(wrong[0], Mapping) else ''}"
        )
    return [int(token) for token in prompt]


def whole_number(name: str, value: Any) -> int:
    """A number that counts, numpy's included; ValueError if `value` is none."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name}={value!r} must be a whole number")


def made_by(name: str, value: Any, kind: type, maker: str) -> None:
    """ValueError unless a value is of the class whose objects `maker` makes."""
    if not isinstance(value, kind):
        raise ValueError(
            f"{name} is a {type(value).__name__}, which must be what `{maker}` returns"
        )


def token_ids(name: str, text: Any, vocab_size: int = 2**31) -> list[int]:
    """What a field or a text says; ValueError if it is no list of ids of a vocabulary."""
    tokens = np.asarray(text, object)
    if tokens.ndim != 1:
        raise ValueError(f"{name} has {text!r}, which must be a list of token ids")
    found = [whole_number(f"a token of {name}", token) for token in tokens.tolist()]
    if wrong := [token for token in found if not 0 <= token < vocab_size]:
        raise ValueError(f"{name} has {wrong[0]}, not in [0, vocab_size={vocab_size})")
    return found


def real_number(name: str, value: Any) -> float:
    """A number, numpy's and JAX's included; ValueError if `value` is none."""
    try:
        if not isinstance(value, (bool, str, bytes)):
            return float(value)
    except TypeError:
        pass
    raise ValueError(f"{name}={value!r} must be a number")


def per_prompt(name: str, values: int | Sequence[int], num: int) -> list[int]:
    """One value per prompt; ValueError unless there is one for all, or as many as prompts."""
    if not _is_list(values):
        return [whole_number(name, values)] * num
    found = [whole_number(f"an entry of {name}", value) for value in values]  # type: ignore[union-attr]
    if len(found) != num:
        raise ValueError(f"{name} has {len(found)} entries for {num} prompts: give one or {num}")
    return found


def per_prompt_seeds(seeds: int | Sequence[int], num: int) -> list[int]:
    """One seed per prompt; of a single one, prompt i uses seeds + i."""
    if _is_list(seeds):
        return per_prompt("seeds", seeds, num)
    first = whole_number("seed", seeds)
    return list(range(first, first + num))


def read_stop_ids(stop_ids: Sequence[int]) -> np.ndarray | None:
    """[n] int64, tokens that end a text: one argument of a program, however many; None: none.

    Raises:
      ValueError: they are no list of whole numbers.
    """
    if not _is_list(stop_ids):
        raise ValueError(f"stop_ids={stop_ids!r} must be a list of token ids; (): none")
    ids = [whole_number("an entry of stop_ids", token) for token in stop_ids]
    return np.array(ids, np.int64) if ids else None


def check_stop_ids(stop_ids: Any, cfg: ModelConfig) -> None:
    """Raises ValueError unless tokens that end a text, [n] or a tuple, are tokens of the model."""
    for token in np.asarray(stop_ids).reshape(-1).tolist():
        if not 0 <= whole_number("an entry of stop_ids", token) < cfg.vocab_size:
            raise ValueError(f"stop_ids has {token}, not in [0, vocab_size={cfg.vocab_size})")


def _is_list(value: object) -> bool:
    """Whether something has entries, and is no text."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def split_gaps(
    cfg: ModelConfig, prompts: Sequence[list[int]], gen_len: int | Sequence[int]
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Prompts that hold MASK where tokens are to be decided, as a loop takes them.

    Args:
      cfg: the model.
      prompts: token ids and MASK.
      gen_len: tokens to be written behind each, 0 or more; one number, or one per prompt.

    Returns:
      What stands before the first MASK of each prompt; the rest of it; completion lengths, which
      count that rest.

    Raises:
      ValueError: there is no MASK token, or nothing to decide, or a prompt holds ids the model does
        not have or is longer than it allows.
    """
    mask = cfg.mask_token_id
    if mask is None:
        raise ValueError("infill=True needs a model with a MASK token, and mask_token_id is None")
    heads, bodies, lengths = [], [], []
    for i, (prompt, length) in enumerate(
        zip(prompts, per_prompt("gen_len", gen_len, len(prompts)), strict=True)
    ):
        if length < 0 or (length == 0 and mask not in prompt):
            raise ValueError(
                f"prompt {i} has {prompt.count(mask)} MASK tokens (id {mask}) and gen_len={length}"
                ": with infill=True it must have some to fill, or a length to write behind"
            )
        check_tokens(cfg, f"prompt {i}", [token for token in prompt if token != mask])
        _check_length(cfg, i, len(prompt), length)
        first = prompt.index(mask) if mask in prompt else len(prompt)
        if first == 0 and prompt and cfg.shifted_logits:
            raise ValueError(
                f"prompt {i} begins with MASK, but each token is predicted from the one before: "
                "give at least one token first"
            )
        heads.append(prompt[:first])
        bodies.append(prompt[first:])
        lengths.append(len(prompt) - first + length)
    return heads, bodies, lengths


def repeat_requests(
    prompts: Sequence[list[int]],
    gen_len: int | Sequence[int],
    seeds: int | Sequence[int],
    num_return: int,
) -> tuple[list[list[int]], list[int], list[int]]:
    """Every request `num_return` times in a row: prompts, completion lengths, seeds.

    The first of them has the seed it would have alone; the others' are 2^32 apart, in the upper of
    the two words that a row's random stream begins with.
    """
    if num_return < 1:
        raise ValueError(f"num_return={num_return} must be at least 1")
    most = 2**64 - ((num_return - 1) << 32)
    if wrong := [s for s in per_prompt_seeds(seeds, len(prompts)) if num_return > 1 and s >= most]:
        raise ValueError(
            f"seed={wrong[0]} must be below {most} with num_return={num_return}: further texts "
            "have seeds 2^32 apart"
        )
    num, times = len(prompts), range(num_return)
    return (
        [prompt for prompt in prompts for _ in times],
        [length for length in per_prompt("gen_len", gen_len, num) for _ in times],
        [seed + (j << 32) for seed in per_prompt_seeds(seeds, num) for j in times],
    )


def round_rows(num: int, most: int | None) -> int:
    """Rows for `num` requests, `most` at once; as many for every device of the mesh in use.

    Without a limit there are up to `MAX_ROWS`, a power of two.
    """
    rows = min(1 << (max(num, 1) - 1).bit_length(), MAX_ROWS) if most is None else most
    shards = batch_shards()
    return -(-rows // shards) * shards


def round_lengths(
    cfg: ModelConfig, prompts: Sequence[Sequence[int]], gen_lens: Sequence[int]
) -> tuple[int, int]:
    """The prompt and completion length that requests are brought to.

    Prompts go up to a multiple of `PROMPT_BUCKET`, completions by at most a quarter, neither beyond
    what the model can hold.
    """
    P, G = max(map(len, prompts), default=0), max(gen_lens, default=0)
    step = max(8, 1 << max(G.bit_length() - 3, 0))
    wide = -(-G // step) * step
    G = max(G, min(wide, cfg.max_seq_len - P))
    bucket = -(-max(P, 1) // PROMPT_BUCKET) * PROMPT_BUCKET
    return max(P, min(bucket, cfg.max_seq_len - G)), G


def prompt_buckets(prompts: Sequence[Sequence[int]], rows: int) -> list[list[int]]:
    """Prompts, by their numbers, in buckets that are decoded one after the other, longest first.

    A bucket's prompts are up to twice as long as each other; what would not fill the rows twice
    goes with longer ones. At most `rows` prompts are one bucket.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    if len(prompts) <= rows:
        return [sorted(order)]
    buckets: list[list[int]] = []
    for i in order:
        shortest = len(prompts[buckets[-1][0]]) / 2 if buckets else 0
        if not buckets or (
            len(prompts[i]) < shortest and len(prompts[i]) > 0 and len(buckets[-1]) >= 2 * rows
        ):
            buckets.append([])
        buckets[-1].append(i)
    return buckets


def read_requests(
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    gen_len: int | Sequence[int],
    seeds: int | Sequence[int],
    prompt_len: int | None,
    canvas_len: int | None,
    batch_size: int | None,
    *,
    may_be_empty: bool,
) -> Requests:
    """Checks requests; the arguments are those of the loops' `init_state`.

    Raises:
      ValueError: on an empty list, an empty prompt where there must be a token to go on from, a
        prompt that holds MASK or ids the model does not have, lengths it does not allow, or seeds
        of more than 64 bits.
    """
    num = len(prompts)
    if num == 0:
        raise ValueError("prompts is an empty list: give at least one prompt")
    gen_lens = per_prompt("gen_len", gen_len, num)
    seed_list = per_prompt_seeds(seeds, num)
    for i, (prompt, length) in enumerate(zip(prompts, gen_lens, strict=True)):
        if length < 1:
            raise ValueError(f"gen_len={length} of prompt {i} must be at least 1")
        _check_length(cfg, i, len(prompt), length)
        if len(prompt) == 0 and not may_be_empty:
            raise ValueError(
                f"prompt {i} is empty, but each token is predicted from the one before: give at "
                "least one token"
            )
        check_tokens(cfg, f"prompt {i}", prompt)
    longest = max(map(len, prompts))
    P = longest if prompt_len is None else prompt_len
    G = max(gen_lens) if canvas_len is None else canvas_len
    B = num if batch_size is None else batch_size
    if longest > P or max(gen_lens) > G or num > B:
        raise ValueError(
            f"prompt_len={P}, canvas_len={G} and batch_size={B} must be at least the longest "
            f"prompt {longest}, the longest gen_len {max(gen_lens)} and the number of prompts {num}"
        )
    key = np.zeros((B, 2), np.uint32)
    for b, seed in enumerate(seed_list):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed={seed} of prompt {b} must be a number of 64 bits")
        key[b] = np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
    return Requests(gen_lens, key, P, G, B)


def _check_length(cfg: ModelConfig, i: int, num_tokens: int, length: int) -> None:
    """Raises ValueError if prompt i is too long to be gone on with."""
    if num_tokens + length > cfg.max_seq_len:
        raise ValueError(
            f"prompt {i} has {num_tokens} tokens, which with gen_len={length} is more than the "
            f"model's max_seq_len={cfg.max_seq_len}"
        )


def piece_len(num_tokens: int, most: int = PREFILL) -> int:
    """How many tokens of prompts of at most `num_tokens` are read per forward.

    As few pieces as there can be, of one length, which is rounded up to a multiple of 8.
    """
    num_pieces = -(-num_tokens // most)
    if num_pieces <= 1:
        return num_tokens
    return min(most, (-(-num_tokens // num_pieces) + 7) // 8 * 8)


def lay_out(
    cfg: ModelConfig, prompts: Sequence[Sequence[int]], gen_lens: Sequence[int], B: int, S: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [B, S], lengths [B] and ends [B], int32; rows without a prompt are done."""
    tokens = np.full((B, S), cfg.pad_token_id, np.int32)
    lengths, ends = np.ones(B, np.int32), np.ones(B, np.int32)
    for b, (prompt, length) in enumerate(zip(prompts, gen_lens, strict=True)):
        tokens[b, : len(prompt)] = prompt
        lengths[b], ends[b] = len(prompt), len(prompt) + length
    return tokens, lengths, ends


def check_tokens(cfg: ModelConfig, name: str, tokens: Sequence[int]) -> None:
    """Raises ValueError unless `tokens`, called `name`, are known tokens of the model."""
    for token in tokens:
        if token == cfg.mask_token_id:
            raise ValueError(
                f"{name} contains the mask token {token}, which stands for one to be decided: "
                "remove it"
            )
        if not 0 <= token < cfg.vocab_size:
            raise ValueError(
                f"{name} contains token {token}, which must be in [0, vocab_size={cfg.vocab_size})"
            )
