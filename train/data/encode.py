"""One example as one row: tokenised, padded, or refused with a sentence that says what is too long.

Letters: P prompt length, G completion length.
"""

from __future__ import annotations

import numpy as np

from dlm import tasks
from dlm.tokenizer import Tokenizer
from train.config import ConfigError

_HINT = " (data.too_long='cut' or 'leave_out' lets it pass)"


def encode_example(
    example: tasks.Example | tasks.Encoded | tasks.Arrays,
    tokenizer: Tokenizer,
    prompt_len: int,
    completion_len: int,
    cut: bool = False,
    plain: bool = False,
) -> dict[str, np.ndarray]:
    """One row of a batch.

    Args:
      example: a prompt and a completion, which are encoded each on its own, as a prompt is when
        decoding; or token ids, or arrays, which are taken as they are.
      tokenizer: encodes both.
      prompt_len: P.
      completion_len: G; the completion and one EOS must fit.
      cut: whether what does not fit is cut instead: the first tokens of a prompt, the last ones of
        a completion, which then has no EOS.
      plain: whether special tokens written in texts are text.

    Returns:
      prompt [P], prompt_start [], completion [G] and completion_len [], of token ids step_map [G]
      too, all int32; see `train.objectives`. Of arrays, those.

    Raises:
      ConfigError: the prompt or the completion is too long or has a MASK token; arrays are of other
        lengths.
    """
    if isinstance(example, tasks.Arrays):
        return _check_arrays(example, prompt_len, completion_len)
    if isinstance(example, tasks.Encoded):
        return _pad_encoded(example, tokenizer, prompt_len, completion_len, cut)
    prompt = _encode(example.prompt, tokenizer, plain, whole=True)  # as decoding will
    completion = _encode(example.completion, tokenizer, plain)
    if cut:
        prompt = prompt[max(0, len(prompt) - prompt_len) :]
        completion = completion[:completion_len]
    elif len(prompt) > prompt_len:
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens, more than data.prompt_len={prompt_len}: "
            f"{_shorten(example.prompt)}{_HINT}"
        )
    elif len(completion) + 1 > completion_len:
        raise ConfigError(
            f"the completion has {len(completion)} tokens and its end, more than "
            f"data.completion_len={completion_len}: {_shorten(example.completion)}{_HINT}"
        )
    start = prompt_len - len(prompt)
    num_eos = completion_len - len(completion)
    return {
        "prompt": np.array([tokenizer.pad_token_id] * start + prompt, np.int32),
        "prompt_start": np.array(start, np.int32),
        "completion": np.array(completion + [tokenizer.eos_token_id] * num_eos, np.int32),
        "completion_len": np.array(min(len(completion) + 1, completion_len), np.int32),
    }


def _pad_encoded(
    example: tasks.Encoded,
    tokenizer: Tokenizer,
    prompt_len: int,
    completion_len: int,
    cut: bool,
) -> dict[str, np.ndarray]:
    """As `encode_example`. Positions added to a completion were never decided."""
    if cut:
        example = tasks.Encoded(
            example.prompt[max(0, len(example.prompt) - prompt_len) :],
            example.completion[:completion_len],
            example.step_map[:completion_len],
        )
    for name, tokens, limit in (
        ("prompt", example.prompt, prompt_len),
        ("completion", example.completion, completion_len),
    ):
        if len(tokens) > limit:
            raise ConfigError(
                f"a trajectory's {name} has {len(tokens)} tokens, more than "
                f"data.{name}_len={limit}{_HINT}"
            )
        if len(tokens) and not 0 <= np.min(tokens) <= np.max(tokens) < tokenizer.vocab_size:
            wrong = next(t for t in np.asarray(tokens) if not 0 <= t < tokenizer.vocab_size)
            raise ConfigError(
                f"the {name} has token {wrong}, which must be in [0, {tokenizer.vocab_size}), the "
                "tokenizer's"
            )
    eos, start = tokenizer.eos_token_id, prompt_len - len(example.prompt)
    more = (0, completion_len - len(example.completion))
    completion = np.pad(example.completion, more, constant_values=eos)
    is_eos = completion == eos
    length = int(is_eos.argmax()) + 1 if is_eos.any() else completion_len
    pad = (start, 0)
    return {
        "prompt": np.pad(example.prompt, pad, constant_values=tokenizer.pad_token_id),
        "prompt_start": np.array(start, np.int32),
        "completion": completion,
        "completion_len": np.array(length, np.int32),
        "step_map": np.pad(example.step_map, more, constant_values=-1),
    }


def _check_arrays(
    example: tasks.Arrays, prompt_len: int, completion_len: int
) -> dict[str, np.ndarray]:
    """As `encode_example`."""
    for name, value in example.values.items():
        if prompt_len or len(value) != completion_len:
            raise ConfigError(
                f"{name} has {len(value)} positions: data.prompt_len={prompt_len} must be 0 and "
                f"data.completion_len={completion_len} must be {len(value)}"
            )
    return dict(example.values)


def encode_text(
    example: tasks.Example, tokenizer: Tokenizer, plain: bool = False
) -> dict[str, np.ndarray]:
    """A text to be packed: "tokens" [n] int32, with what the tokenizer adds and EOS at the end.

    Raises:
      ConfigError: the example has a prompt or a MASK token.
    """
    if len(example.prompt):
        raise ConfigError(
            f"data.packing=True takes whole texts, but there is a prompt: "
            f"{_shorten(example.prompt)}"
        )
    tokens = _encode(example.completion, tokenizer, plain, whole=True)
    if tokens[-1:] != [tokenizer.eos_token_id]:
        tokens.append(tokenizer.eos_token_id)
    return {"tokens": np.array(tokens, np.int32)}


def mask_text(tokenizer: Tokenizer) -> str | None:
    """How the MASK token is written; None: there is none."""
    mask = tokenizer.mask_token_id
    return None if mask is None else tokenizer.backend.id_to_token(mask)


def _encode(text: str, tokenizer: Tokenizer, plain: bool, whole: bool = False) -> list[int]:
    """Token ids. MASK is none of them: it would be learned as what is to be decided."""
    try:
        tokens = tokenizer.encode(text, whole=whole, plain=plain)
    except ValueError as error:
        raise ConfigError(f"data.tokenizer does not fit the task: {error}") from error
    if tokenizer.mask_token_id in tokens:
        name = str(mask_text(tokenizer))
        raise ConfigError(
            f"the text has {name!r} at character {text.find(name)}, which is the MASK token: take "
            "it out, or set data.plain=True, with which special tokens in texts are text"
        )
    return tokens


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]}...{text[-17:]}")
