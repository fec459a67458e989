"""What every token of a vocabulary stands for, as bytes: for what reads text as it is written.

Half a character is no text, but it is bytes. Those of all tokens of a text, joined, are the text's
(but for a space that SentencePiece puts before its first word).
"""

from __future__ import annotations

import functools
import json
import re

from dlm.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece spells bytes
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # and spaces


@functools.lru_cache(maxsize=4)
def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> tuple[bytes, ...]:
    """The bytes of token ids 0 to `vocab_size` - 1.

    Special tokens, and ids that the tokenizer does not know, have none.
    """
    backend = tokenizer.backend
    decoder = json.dumps(json.loads(backend.to_str()).get("decoder"))
    added = backend.get_added_tokens_decoder()
    found = []
    for i in range(vocab_size):
        if i in added:
            found.append(b"" if added[i].special else added[i].content.encode())
            continue
        piece = backend.id_to_token(i) or ""
        if "ByteLevel" in decoder:
            found.append(b"".join(_spelled().get(x, x.encode()) for x in piece))
        elif (byte := _BYTE.fullmatch(piece)) and "ByteFallback" in decoder:
            found.append(bytes([int(byte[1], 16)]))
        else:
            found.append(piece.replace(_SPACE, " ").encode())
    return tuple(found)


@functools.cache
def _spelled() -> dict[str, bytes]:
    """The character by which byte-level vocabularies spell each byte.

    Printable Latin-1 stands for itself, the other bytes for the characters from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    spelled = {chr(b): bytes([b]) for b in printable}
    return spelled | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}
