"""Text to token ids and back: bytes, a closed set of pieces, or a published `tokenizer.json`.

Example:
    >>> tokenizer = byte_tokenizer()
    >>> tokenizer.encode("Hi<|endoftext|>")
    [72, 105, 256]
    >>> tokenizer.decode([72, 105, 256])
    'Hi'
    >>> word_tokenizer(["copy ", "1 ", "2 "]).encode("copy 2 1 ")
    [0, 2, 1]
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

_EOS, _BOS, _MASK = "<|endoftext|>", "<|startoftext|>", "<|mdm_mask|>"

# MASK tokens of published models; LLaDA's tokenizer_config.json does not say which one it is.
_MASK_NAMES = (_MASK, "<|mask|>")

# A directory that holds one of these is meant to have a tokenizer.
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")

# How Qwen2 (and so Dream, which publishes only vocab.json and merges.txt) cuts text before BPE.
_QWEN2_CLASSES = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` and what a language model must know about its special tokens.

    Attributes:
      backend: does the work; saved as `tokenizer.json`.
      eos_token_id: ends a completion.
      pad_token_id: fills unused positions.
      bos_token_id: begins a sequence; None if there is none.
      mask_token_id: the MASK token; None if there is none.
      chat_template: Jinja source that turns messages into a prompt; None if there is none.
      vocab_size: largest token id + 1. Models often have more rows than that.
    """

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    eos_token_id: int
    pad_token_id: int
    bos_token_id: int | None = None
    mask_token_id: int | None = None
    chat_template: str | None = dataclasses.field(default=None, repr=False)
    vocab_size: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.backend.no_padding()
        self.backend.no_truncation()
        vocab = self.backend.get_vocab(with_added_tokens=True)
        object.__setattr__(self, "vocab_size", 1 + max(vocab.values()))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Adds nothing; special tokens written in the text are recognised.

        Raises:
          TypeError: the text is not a string.
          ValueError: a closed vocabulary (`word_tokenizer`) does not cover the text.
        """
        if not isinstance(text, str):
            raise TypeError(f"text={text!r} must be a str, not a {type(text).__name__}")
        try:
            return list(self.backend.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the library raises nothing narrower
            if not isinstance(self.backend.model, models.WordLevel):
                raise
            at = self._first_uncovered(text)
            raise ValueError(
                f"text[{at}:]={text[at : at + 20]!r}... is not covered by the vocabulary of "
                f"{self.vocab_size} pieces; after {text[max(0, at - 20) : at]!r}"
            ) from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids.

        Args:
          ids: token ids; those that the tokenizer does not know (padded rows of a model's
            vocabulary) are left out.
          skip_special_tokens: whether special tokens are left out too.
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt for a conversation, as text for `encode`.

        Args:
          messages: such as `[{"role": "user", "content": "Hi"}]`.
          add_generation_prompt: whether to end with the opening of the assistant's turn.

        Raises:
          ValueError: there is no template, or it refuses the messages.
        """
        import jinja2
        import jinja2.ext
        import jinja2.sandbox

        if self.chat_template is None:
            raise ValueError(
                "this tokenizer has no chat template: write the prompt as text, or load one with "
                "chat_template.jinja or a chat_template in tokenizer_config.json"
            )

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = lambda x, indent=None: json.dumps(
            x, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens(),
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template cannot write these messages: {error}") from error

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `load_tokenizer` reads."""
        target = pathlib.Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._special_tokens(),
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        self.backend.save(str(target / "tokenizer.json"))
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (target / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def _special_tokens(self) -> dict[str, str | None]:
        """{"eos_token": its text, ...} of those that exist."""
        ids = {name: getattr(self, f"{name}_token_id") for name in ("eos", "pad", "bos", "mask")}
        return {
            f"{name}_token": self.backend.id_to_token(value)
            for name, value in ids.items()
            if value is not None
        }

    def _first_uncovered(self, text: str) -> int:
        """Where the first piece of `text` begins that is not in the vocabulary."""
        special = [re.escape(t.content) for t in self.backend.get_added_tokens_decoder().values()]
        start = 0
        for segment in re.split(f"({'|'.join(special)})", text):
            if self.backend.token_to_id(segment) is None and self.backend.pre_tokenizer:
                for piece, (at, _) in self.backend.pre_tokenizer.pre_tokenize_str(segment):
                    if self.backend.token_to_id(piece) is None:
                        return start + at
            start += len(segment)
        return 0


def byte_tokenizer() -> Tokenizer:
    """One token per UTF-8 byte: ids 0-255 are the bytes, then end-of-text (= pad), begin, MASK.

    Lossless on any text; bytes that are not UTF-8 decode to the replacement character.
    """
    # The byte-level model spells bytes as characters: printable Latin-1 as themselves, the others
    # as the characters from 256 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    spelled = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    model = models.BPE(vocab={spelled[b]: b for b in range(256)}, merges=[])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_EOS, _BOS, _MASK])
    return Tokenizer(backend, 256, 256, bos_token_id=257, mask_token_id=258)


def word_tokenizer(pieces: Sequence[str]) -> Tokenizer:
    """A closed vocabulary: `pieces` in order, then end-of-text (= pad) and MASK.

    Text is cut from left to right, each time by the longest piece that fits; nothing is tried
    again. Decoding joins the pieces, so covered text comes back unchanged.

    Args:
      pieces: different, non-empty strings; they may hold spaces, or whole sentences.

    Raises:
      ValueError: there are no pieces, one is empty or given twice, or one holds a special token.
    """
    pieces = list(pieces)
    twice = [piece for piece, count in collections.Counter(pieces).items() if count > 1]
    bad = [piece for piece in pieces if not piece or _EOS in piece or _MASK in piece]
    if not pieces or twice or bad:
        raise ValueError(
            f"{len(pieces)} pieces, given twice: {twice}, empty or holding a special token: {bad}; "
            "there must be at least one, all different, non-empty and free of special tokens"
        )
    backend = tokenizers.Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, ""))
    longest_first = sorted(pieces, key=len, reverse=True)
    pattern = tokenizers.Regex("|".join(re.escape(piece) for piece in longest_first))
    backend.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([_EOS, _MASK])
    eos = len(pieces)
    return Tokenizer(backend, eos, eos, mask_token_id=eos + 1)


def has_tokenizer(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds files of a tokenizer, readable by `load_tokenizer` or not."""
    return any((pathlib.Path(directory) / name).is_file() for name in _FILES)


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Reads `tokenizer.json`, or `vocab.json` and `merges.txt` of the Qwen2 family.

    Special tokens and the chat template come from `tokenizer_config.json`; a `chat_template.jinja`
    is preferred to the latter.

    Args:
      directory: holds these files.

    Raises:
      FileNotFoundError: the directory or the files are not there.
      ValueError: a file is broken, or no end-of-text token is known.
    """
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a directory; give one that holds tokenizer.json")
    config_file = root / "tokenizer_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    file = root / "tokenizer.json"
    if file.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file} is not a tokenizer file ({error})") from error
    elif (root / "vocab.json").is_file() and (root / "merges.txt").is_file():
        backend = _read_qwen2(root, config)
    else:
        raise FileNotFoundError(
            f"{root} has neither tokenizer.json nor vocab.json with merges.txt; save one there "
            "(Tokenizer.save, or save_pretrained of a fast tokenizer)"
        )

    def token_id(name: str, *known: str) -> int | None:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return next((i for i in map(backend.token_to_id, known) if i is not None), None)
        found = backend.token_to_id(token)
        if found is None:
            raise ValueError(f"{config_file}: {name}={token!r} is not in the vocabulary")
        return found

    eos, pad = token_id("eos_token", _EOS), token_id("pad_token")
    if eos is None:
        raise ValueError(f"{config_file} must name an eos_token; there is no {_EOS} either")
    return Tokenizer(
        backend,
        eos,
        eos if pad is None else pad,
        bos_token_id=token_id("bos_token"),
        mask_token_id=token_id("mask_token", *_MASK_NAMES),
        chat_template=_chat_template(root, config),
    )


def _read_qwen2(root: pathlib.Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE from `vocab.json` and `merges.txt`, with the added tokens of the config."""
    name = config.get("tokenizer_class")
    if name not in _QWEN2_CLASSES:
        raise ValueError(
            f"{root}: tokenizer_class={name!r} has no tokenizer.json, and vocab.json with "
            f"merges.txt is only understood for {', '.join(_QWEN2_CLASSES)}"
        )
    try:
        model = models.BPE.from_file(str(root / "vocab.json"), str(root / "merges.txt"))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{root}: broken vocab.json or merges.txt ({error})") from error
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    backend.decoder = decoders.ByteLevel()
    added = config.get("added_tokens_decoder", {})
    for wanted, token in sorted((int(key), token) for key, token in added.items()):
        backend.add_tokens([tokenizers.AddedToken(**token)])
        if (got := backend.token_to_id(token["content"])) != wanted:
            raise ValueError(
                f"{root}: added token {token['content']!r} must have id {wanted}, but vocab.json "
                f"and the tokens before it give it {got}"
            )
    return backend


def _chat_template(root: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    file = root / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        return next((t["template"] for t in template if t.get("name") == "default"), None)
    return template


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; a ValueError with its path if there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    return value
