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
import contextlib
import dataclasses
import datetime
import operator
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from dlm import chat
from dlm.written import write_json, write_text

EOS, BOS, MASK = "<|endoftext|>", "<|startoftext|>", "<|mdm_mask|>"

CLEANS = "clean_up_tokenization_spaces"
CLEANS_BPE = f"{CLEANS}_for_bpe_even_though_it_will_corrupt_output"


@contextlib.contextmanager
def refusing(said: str) -> Iterator[None]:
    """Makes a ValueError that begins with `said` of whatever the tokenizers library raises."""
    try:
        yield
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{said} ({error})") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust: no Exception, and in no module
            raise
        raise ValueError(f"{said} ({error})") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` and what a language model must know about its special tokens.

    Attributes:
      backend: does the work; saved as `tokenizer.json`.
      eos_token_id: ends a completion.
      pad_token_id: fills unused positions.
      bos_token_id: begins a sequence; None if there is none.
      mask_token_id: the MASK token; None if there is none.
      chat_template: Jinja source that turns messages into a prompt, or several by name; None if
        there is none.
      other_tokens: further special tokens by name, for chat templates: {"unk_token": "<unk>"}.
      cleans_up: whether decoded text has no spaces before punctuation and contracted words, as a
        file may ask for ("it 's here ." is "it's here.").
      vocab_size: largest token id + 1. Models often have more rows than that.
    """

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    eos_token_id: int
    pad_token_id: int
    bos_token_id: int | None = None
    mask_token_id: int | None = None
    chat_template: str | Mapping[str, str] | None = dataclasses.field(default=None, repr=False)
    other_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    cleans_up: bool = False
    vocab_size: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.backend.no_padding()
        self.backend.no_truncation()
        vocab = self.backend.get_vocab(with_added_tokens=True)
        object.__setattr__(self, "vocab_size", 1 + max(vocab.values()))

    def encode(self, text: str, *, whole: bool = False, plain: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
          text: special tokens written in it are recognised.
          whole: whether to add what the tokenizer puts around a whole text, as the begin token of
            Llama. A text that begins with the begin token, or that a chat template wrote, has it.
          plain: whether special tokens written in the text are text. For what users give.

        Raises:
          TypeError: the text is not a string.
          ValueError: a closed vocabulary (`word_tokenizer`) does not cover the text.
        """
        if not isinstance(text, str):
            raise TypeError(f"text={text!r} must be a str, not a {type(text).__name__}")
        adds = whole and not isinstance(text, chat.Rendered)
        ids = self._ids(text, adds, plain)
        if adds and ids[:2] == [self.bos_token_id] * 2:
            return self._ids(text, False, plain)
        return ids

    def encode_begin(self, text: str) -> list[int]:
        """Token ids of a whole text that goes on: nothing is put behind it. Errors as `encode`."""
        ids = self.encode(text, whole=True)
        if isinstance(text, chat.Rendered) or not ids or ids[-1] == self.bos_token_id:
            return ids
        is_added = self.backend.encode(text, add_special_tokens=True).special_tokens_mask
        while ids and is_added and is_added.pop() and ids[-1] != self.bos_token_id:
            ids.pop()
        return ids

    def _ids(self, text: str, adds: bool, plain: bool) -> list[int]:
        self.backend.encode_special_tokens = plain
        try:
            with refusing(f"text={text[:40]!r}... cannot be encoded"):
                return list(self.backend.encode(text, add_special_tokens=adds).ids)
        except ValueError as error:
            if not isinstance(self.backend.model, models.WordLevel):
                raise
            at = self._first_uncovered(text)
            raise ValueError(
                f"text[{at}:]={text[at : at + 20]!r}... is not covered by the vocabulary of "
                f"{self.vocab_size} pieces; after {text[max(0, at - 20) : at]!r}"
            ) from error

    def num_tokens(
        self, texts: Sequence[str], *, whole: bool = False, plain: bool = False
    ) -> list[int]:
        """How many tokens `encode` gives for each text, or one more; many texts at a time.

        It is one more of a whole text that has a begin token already. The arguments, and errors,
        are otherwise those of `encode`.
        """
        self.backend.encode_special_tokens = plain
        with refusing(f"{len(texts)} texts cannot be encoded"):
            found = self.backend.encode_batch_fast(list(texts), add_special_tokens=whole)
        return list(map(len, found))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids.

        Args:
          ids: token ids; those that the tokenizer does not know (padded rows of a model's
            vocabulary) are left out.
          skip_special_tokens: whether special tokens are left out too.

        Raises:
          TypeError: there is something else than integers.
          ValueError: they cannot be token ids.
        """
        try:
            whole = list(map(operator.index, ids))
        except TypeError as error:
            raise TypeError(f"ids must be the token ids of one text, integers ({error})") from error
        with refusing(f"{len(whole)} token ids cannot be decoded"):
            text = self.backend.decode(whole, skip_special_tokens=skip_special_tokens)
        return _clean_up(text) if self.cleans_up else text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        now: datetime.datetime | None = None,
        **variables: Any,
    ) -> chat.Rendered:
        """The prompt for a conversation, for `encode` and the loops: nothing is added to it.

        Args:
          messages: such as `[{"role": "user", "content": "Hi"}]`.
          add_generation_prompt: whether to end with the opening of the assistant's turn.
          tools: JSON schemas of functions.
          documents: to answer from.
          template: the name of one of several; None: "tool_use" with tools, where there is one,
            else "default".
          now: the date for templates that tell it; None: today's.
          variables: what else the template reads, such as `enable_thinking`.

        Raises:
          ValueError: there is no such template, or it refuses the messages.
        """
        given = {"tools": tools, "documents": documents, **variables}
        given["add_generation_prompt"] = add_generation_prompt
        source = self._template(template, tools is not None)
        return chat.render(source, messages, given, self._special_tokens(), now)

    def _template(self, name: str | None, has_tools: bool) -> str:
        templates = self.chat_template
        if templates is None:
            raise ValueError(
                "this tokenizer has no chat template: write the prompt as text, or load one with "
                "chat_template.jinja or a chat_template in tokenizer_config.json"
            )
        if isinstance(templates, str):
            templates = {"default": templates}
        wanted = name or ("tool_use" if has_tools and "tool_use" in templates else "default")
        if wanted not in templates:
            raise ValueError(
                f"template={wanted!r} must be one of this tokenizer's chat templates: "
                f"{', '.join(map(repr, sorted(templates)))}"
            )
        return templates[wanted]

    def with_mask(self, text: str) -> Tokenizer:
        """The same tokenizer whose MASK is the token `text`, behind the last id if it is new."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens([text])
        return dataclasses.replace(self, backend=backend, mask_token_id=backend.token_to_id(text))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `load_tokenizer` reads."""
        target = pathlib.Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            CLEANS: False,
            **({key: True for key in cleaning_keys(self.backend)} if self.cleans_up else {}),
            **self._special_tokens(),
        }
        if isinstance(self.chat_template, str):
            config["chat_template"] = self.chat_template
        elif self.chat_template is not None:
            config["chat_template"] = [
                {"name": name, "template": text} for name, text in self.chat_template.items()
            ]
        write_text(target / "tokenizer.json", self.backend.to_str(pretty=True))
        write_json(target / "tokenizer_config.json", config)

    def _special_tokens(self) -> dict[str, str]:
        """{"eos_token": its text, ...} of those that exist."""
        ids = {name: getattr(self, f"{name}_token_id") for name in ("eos", "pad", "bos", "mask")}
        texts = {
            f"{name}_token": text
            for name, value in ids.items()
            if value is not None and (text := self.backend.id_to_token(value)) is not None
        }
        return {**self.other_tokens, **texts}

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
    backend.add_special_tokens([EOS, BOS, MASK])
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
    bad = [piece for piece in pieces if not piece or EOS in piece or MASK in piece]
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
    backend.add_special_tokens([EOS, MASK])
    eos = len(pieces)
    return Tokenizer(backend, eos, eos, mask_token_id=eos + 1)


def frame(
    begin: tuple[str, int] | None, end: tuple[str, int] | None
) -> processors.TemplateProcessing | None:
    """What puts tokens, each with its id, around a whole text; None: there are none to put."""
    if begin is None and end is None:
        return None
    before, after = ([] if token is None else [token] for token in (begin, end))

    def template(text: str) -> list[str]:
        return [*(token for token, _ in before), text, *(token for token, _ in after)]

    return processors.TemplateProcessing(
        single=template("$A"), pair=template("$A") + template("$B"), special_tokens=before + after
    )


def cleaning_keys(backend: tokenizers.Tokenizer) -> tuple[str, ...]:
    """What all must be true in a config for spaces to be taken out of decoded text.

    As in `transformers`, a second key must insist on it for byte-pair encodings, in whose files the
    first one is often true although they were never decoded so.
    """
    return (CLEANS, CLEANS_BPE) if isinstance(backend.model, models.BPE) else (CLEANS,)


def _clean_up(text: str) -> str:
    """`text` without the spaces that word pieces put before punctuation, as `transformers` does."""
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for end in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {end}", end)
    return text
