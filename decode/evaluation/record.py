"""Answers by what was asked, in a file of JSON lines: a run that is interrupted goes on.

    record = Record("answers.jsonl")
    with record.adding() as add:
        for key in wanted:
            if key not in record.found:
                add(key, {"text": ...})
    record.put_in_order(wanted)

Keys are hashes of everything that an answer depends on, so runs of other models or settings may
share a file. One process at a time writes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from decode.files import open_to_add, replace_file

Answer = dict[str, Any]


class Record:
    """What was answered so far.

    Attributes:
      path: the file; None: nothing is kept beyond this process.
      found: answers by key.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """Reads a file that may not be there yet; a line that was cut short is taken away.

        Raises:
          ValueError: a line is no answer.
        """
        self.path = None if path is None else pathlib.Path(path)
        self.found: dict[str, Answer] = {}
        self._read()

    def _read(self) -> None:
        """Finds what the file has, also what others have added since; errors as above."""
        if self.path is None or not self.path.exists():
            return
        raw = self.path.read_bytes()
        kept = raw[: raw.rfind(b"\n") + 1]
        if kept != raw:
            os.truncate(self.path, len(kept))
        for number, line in enumerate(kept.split(b"\n")[:-1], 1):
            try:
                answer = json.loads(line)
                self.found[answer.pop("key")] = answer
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise ValueError(
                    f"{self.path}, line {number} is no answer with a key: delete the line, and "
                    "what it held is answered again"
                ) from None

    @contextlib.contextmanager
    def adding(self) -> Iterator[Callable[[str, Answer], None]]:
        """Takes answers, each written as it comes.

        Raises:
          ValueError: another process writes the file.
          OSError: it cannot be written.
        """
        if self.path is None:
            yield self.found.__setitem__
            return
        with open_to_add(self.path) as file:
            self._read()

            def add(key: str, answer: Answer) -> None:
                file.write(_line(key, answer))
                file.flush()
                self.found[key] = answer

            yield add

    def put_in_order(self, keys: Sequence[str]) -> None:
        """Brings these answers into this order, behind all others.

        Raises:
          ValueError: another process writes the file.
        """
        if self.path is None or not self.path.exists():
            return
        with open_to_add(self.path):
            self._read()
            last = dict.fromkeys(keys)
            ordered = [*(key for key in self.found if key not in last), *last]
            if ordered != list(self.found):
                self.found = {key: self.found[key] for key in ordered}
                replace_file(self.path, "".join(_line(*item) for item in self.found.items()))


def _line(key: str, answer: Answer) -> str:
    return json.dumps({"key": key} | answer, ensure_ascii=False) + "\n"
