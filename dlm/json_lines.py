"""JSON files and files of JSON lines, as others write them."""

from __future__ import annotations

import json
import pathlib
from typing import Any


def parse_lines(raw: bytes, name: object) -> list[tuple[int, Any]]:
    """(line number from 1, value) of every line that is not blank.

    Lines are UTF-8 and end at "\\n" only; a byte order mark before the first is no part of it.

    Args:
      raw: the file.
      name: what it is called in errors.

    Raises:
      ValueError: a line is not UTF-8, is not JSON or has an object with a key twice, or there is no
        line; in one sentence that names it.
    """
    found = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode(), object_pairs_hook=_object)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}, line {number}: not UTF-8 ({error.reason})") from error
        except (ValueError, RecursionError) as error:  # no JSON, or numbers or depths without end
            said = getattr(error, "msg", None) or str(error)
            raise ValueError(
                f"{name}, line {number}: not valid JSON ({said}); every line must be one JSON value"
            ) from error
        found.append((number, value))
    if not found:
        raise ValueError(f"{name} holds no records; it must have one JSON value per line")
    return found


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; a ValueError with its path if there is none."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        said: dict[str, Any] = {}
        for key, value in pairs:
            if key in said and said[key] != value:
                raise ValueError(f"{key} is {said[key]!r:.60} and {value!r:.60}: leave one out")
            said[key] = value
        return said

    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or too deep
        raise ValueError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice, and only one value can count")
    return found
