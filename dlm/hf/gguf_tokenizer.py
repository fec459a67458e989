"""The tokenizer and the chat template inside a GGUF file.

Two kinds are read. "gpt2" is byte-level BPE; how it cuts text first is said by a name only, see
`PRE_TOKENIZERS`. "llama" is SentencePiece's BPE: pieces and scores, of which the highest is merged
first. A whole `tokenizer.huggingface.json` is preferred to both.

References: the GGUF specification; the `tokenizer.json` files that models publish beside such
files; Kudo & Richardson, "SentencePiece", arXiv:1808.06226.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from dlm.hf.gguf_file import GGUFFile
from dlm.hf.tokenizer import QWEN2_PATTERN
from dlm.tokenizer import Tokenizer, frame, refusing


class _Type(enum.IntEnum):
    """What an entry of `tokenizer.ggml.token_type` says."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How byte-level BPE cuts text before it merges.

    Attributes:
      pattern: a piece is what it matches, or what is between two matches; None: as GPT-2 does.
      splits_digits: whether every digit is a piece of its own, whatever the pattern.
      is_nfc: whether text is brought to Unicode's normal form C first.
      ignores_merges: whether a piece that is a token is that token, without merging.
      adds_bos: whether the begin token is added, where the file does not say.
    """

    pattern: str | None = None
    splits_digits: bool = False
    is_nfc: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False


_LLAMA_3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = PreTokenizer(_LLAMA_3_PATTERN, ignores_merges=True, adds_bos=True)

# `tokenizer.ggml.pre` -> how text is cut.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "qwen2": PreTokenizer(QWEN2_PATTERN, is_nfc=True),
    "smaug-bpe": PreTokenizer(_LLAMA_3_PATTERN),
    "smollm": PreTokenizer(splits_digits=True),
    "starcoder": PreTokenizer(splits_digits=True),
    "tekken": PreTokenizer(_TEKKEN_PATTERN, ignores_merges=True, adds_bos=True),
}

_IDS = ("eos", "padding", "bos", "mask", "unknown", "eot", "eom", "seperator")

# Control tokens that end a text or a turn, by whichever name a family gives them. A file names one
# end, and maybe those of a turn and of a message; readers of these files stop at all of them.
_END_NAMES = (
    "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>",
    "<end_of_turn>", "<end_of_utterance>", "<|end_of_turn|>", "<EOT>", "</s>",
)  # fmt: skip

# Keys behind "tokenizer.ggml." that say what prompts for filling in look like; nothing here fills
# in with them.
_UNUSED_KEYS = ("fim_", "prefix_token_id", "suffix_token_id", "middle_token_id", "token_type_count")


# What the values of other keys are, where they are there.
_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "pre": (str,),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_sep_token"), (bool,)),
    **dict.fromkeys(("add_space_prefix", "remove_extra_whitespaces"), (bool,)),
}
_LISTS: dict[str, tuple[type, ...]] = {
    "tokens": (str,),
    "token_type": (int,),
    "scores": (int, float),
    "merges": (str,),
}


def load_gguf_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer of a file, of `open_gguf`.

    Raises:
      ValueError: it is missing, incomplete or of a kind that is not read.
    """
    try:
        ids = token_ids(file)
        assert ids["eos"] is not None
        return Tokenizer(
            _backend(file, ids),
            ids["eos"],
            ids["eos"] if ids["padding"] is None else ids["padding"],
            bos_token_id=ids["bos"],
            mask_token_id=ids["mask"],
            chat_template=_chat_template(file),
            other_tokens=_unknown(file, ids),
        )
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _backend(file: GGUFFile, ids: Mapping[str, int | None]) -> tokenizers.Tokenizer:
    """The tokenizer that is whole in the file, or that of its pieces."""
    if (whole := file.metadata.get("tokenizer.huggingface.json")) is None:
        return _build(file, ids)
    if not isinstance(whole, str):
        raise ValueError(f"tokenizer.huggingface.json={whole!r} must be text")
    with refusing("broken tokenizer.huggingface.json"):
        return tokenizers.Tokenizer.from_str(whole)


def _chat_template(file: GGUFFile) -> str | dict[str, str] | None:
    """One, or several by name."""
    first, prefix = "tokenizer.chat_template", "tokenizer.chat_template."
    found = {
        "default" if key == first else key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key == first or key.startswith(prefix)
    }
    for name, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"chat template {name!r} is {value!r}, not text")
    return found.get("default") if set(found) <= {"default"} else found


def _unknown(file: GGUFFile, ids: Mapping[str, int | None]) -> dict[str, str]:
    """The token for what is unknown, as chat templates call it."""
    tokens, i = file.metadata.get("tokenizer.ggml.tokens", ()), ids["unknown"]
    return {} if i is None or i >= len(tokens) else {"unk_token": tokens[i]}


def token_ids(file: GGUFFile) -> dict[str, int | None]:
    """The ids that a file gives for "eos", "padding", "bos", "mask", ...; None where it does not.

    Raises:
      ValueError: one is no number, or no token of the file, or there is no end of a text.
    """
    _check_kinds(file)
    num = len(file.metadata.get("tokenizer.ggml.tokens", ()))
    ids: dict[str, int | None] = {}
    for name in _IDS:
        key = f"tokenizer.ggml.{name}_token_id"
        ids[name] = value = file.metadata.get(key)
        if value is not None and not (type(value) is int and 0 <= value < (num or value + 1)):
            raise ValueError(f"{key}={value!r} must be one of the {num} tokens")
    if ids["eos"] is None:
        raise ValueError("tokenizer.ggml.eos_token_id must be given")
    return ids


def _check_kinds(file: GGUFFile) -> None:
    """ValueError where a key has a value of another kind than it should."""
    for key, kinds in (_KINDS | _LISTS).items():
        value = file.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            continue
        values = [value] if key in _KINDS else value
        if not isinstance(values, list) or not all(isinstance(entry, kinds) for entry in values):
            what = " or ".join(kind.__name__ for kind in kinds)
            what = what if key in _KINDS else f"a list of {what}"
            raise ValueError(f"tokenizer.ggml.{key} must be {what}")


def end_ids(file: GGUFFile) -> tuple[int, ...]:
    """All tokens that end a text, that of the file first."""
    ids = token_ids(file)
    tokens = file.metadata.get("tokenizer.ggml.tokens", ())
    types = file.metadata.get("tokenizer.ggml.token_type", ())
    named = [
        i for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _Type.CONTROL and token in _END_NAMES
    ]  # fmt: skip
    found = [i for i in (ids["eos"], ids["eot"], ids["eom"], *named) if i is not None]
    return tuple(dict.fromkeys(found))


def _build(file: GGUFFile, ids: Mapping[str, int | None]) -> tokenizers.Tokenizer:
    given = {
        key: value
        for whole, value in file.metadata.items()
        if (key := whole.removeprefix("tokenizer.ggml.")) != whole
        and not key.startswith(_UNUSED_KEYS)
        and key.removesuffix("_token_id") not in _IDS
    }
    kind, tokens, types = (given.pop(key, None) for key in ("model", "tokens", "token_type"))
    if tokens is None:
        raise ValueError("tokenizer.ggml.tokens must be given")
    if types is None or len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type must be a list of {len(tokens)} numbers")
    twice = len(tokens) - len(set(tokens))
    if twice:
        raise ValueError(f"{twice} of tokenizer.ggml.tokens are there twice")
    if kind == "gpt2":
        backend, adds_bos = _byte_level(given, tokens, types)
    elif kind == "llama":
        backend, adds_bos = _sentence_piece(given, tokens, types, ids["unknown"]), True
    else:
        raise ValueError(
            f"tokenizer.ggml.model={kind!r} is not supported; only 'gpt2' and 'llama' "
            "are, and a whole tokenizer.huggingface.json"
        )
    for content, type_ in zip(tokens, types, strict=True):
        if content and type_ in (_Type.CONTROL, _Type.USER_DEFINED, _Type.UNKNOWN):
            special = type_ != _Type.USER_DEFINED
            backend.add_tokens([tokenizers.AddedToken(content, special=special, normalized=False)])
    adds = {
        "bos": given.pop("add_bos_token", adds_bos and ids["bos"] is not None),
        "eos": given.pop("add_eos_token", False),
    }
    if given.pop("add_sep_token", False) or given:
        raise ValueError(
            f"tokenizer.ggml.{next(iter(given), 'add_sep_token')} is not known for "
            f"tokenizers of kind {kind!r} here, and might change how text is encoded"
        )
    around: list[tuple[str, int] | None] = []
    for name in ("bos", "eos"):
        value = ids[name] if adds[name] else None
        if adds[name] and value is None:
            raise ValueError(f"tokenizer.ggml.add_{name}_token needs {name}_token_id beside it")
        around.append(None if value is None else (tokens[value], value))
    backend.post_processor = frame(*around)
    return backend


def _byte_level(
    given: dict[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level BPE, and whether it adds the begin token where the file does not say."""
    name, merges = given.pop("pre", None), given.pop("merges", None)
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre={name!r} is not known; only "
            f"{', '.join(map(repr, PRE_TOKENIZERS))} are"
        )
    pairs = [(a, b) for a, _, b in (merge.partition(" ") for merge in merges or ())]
    if not pairs or any(not a or not b or " " in b for a, b in pairs):
        raise ValueError("tokenizer.ggml.merges must be a list of pairs of tokens")
    if given.pop("add_space_prefix", False):
        raise ValueError("tokenizer.ggml.add_space_prefix must be false for 'gpt2'")
    given.pop("scores", None)  # merges say it all
    cut = PRE_TOKENIZERS[name]
    with refusing("broken tokenizer.ggml.merges"):
        model = models.BPE(
            vocab=_vocab(tokens, types), merges=pairs, ignore_merges=cut.ignores_merges
        )
    backend = tokenizers.Tokenizer(model)
    if cut.is_nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.splits_digits else []
    if cut.pattern is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(cut.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, cut.adds_bos


def _sentence_piece(
    given: dict[str, Any],
    tokens: Sequence[str],
    types: Sequence[int],
    unknown: int | None,
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: of all neighbours that make a piece, those of the highest score merge.

    Scores are all different in published files; of equal ones the piece that is listed first wins.
    Spaces are written as "▁", one is put before a text and before what follows a special token, and
    what no piece covers is spelled in bytes.
    """
    scores = given.pop("scores", None)
    if scores is None or len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores must be a list of {len(tokens)} numbers")
    if given.pop("pre", "default") != "default" or given.pop("remove_extra_whitespaces", False):
        raise ValueError(
            "tokenizer.ggml.pre and remove_extra_whitespaces must be absent for a "
            "tokenizer of kind 'llama'"
        )
    given.pop("merges", None)  # follow from the scores
    has_prefix = given.pop("add_space_prefix", True)
    vocab = _vocab(tokens, types)
    pieces = {token: i for token, i in vocab.items() if types[i] == _Type.NORMAL}
    pairs = [
        (scores[i], vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece, i in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    unk = None if unknown is None else tokens[unknown]
    model = models.BPE(
        vocab=vocab,
        merges=[(left, right) for *_, left, right in pairs],
        unk_token=unk,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    first = [normalizers.Prepend("▁")] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*first, spaces])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _vocab(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Without the entries that only fill up the embedding."""
    return {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != _Type.UNUSED
    }
