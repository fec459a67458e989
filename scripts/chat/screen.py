"""Text that is certain, and behind it text that may still change, on a terminal."""

from __future__ import annotations

import re
import shutil
import unicodedata
from typing import TextIO

DIM, PLAIN = "\x1b[2m", "\x1b[22m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


class Screen:
    """Writes an answer; what may still change is dim, and is written anew in every round.

    Where nothing can be written anew (a pipe, a file), only certain text is written.

    Attributes:
      out: where to.
      is_terminal: whether it is one.
    """

    def __init__(self, out: TextIO, is_terminal: bool) -> None:
        self.out, self.is_terminal = out, is_terminal
        self._end = self._ahead = (0, 0)  # row and column, from where the answer began

    def begin(self) -> None:
        """The cursor is in the first column."""
        self._end = self._ahead = (0, 0)

    def write(self, text: str, ahead: str = "") -> None:
        """What is new of the certain text, and all that stands behind it now."""
        if not self.is_terminal:
            self.out.write(text)
            self.out.flush()
            return
        width, height = shutil.get_terminal_size()
        text, ahead = (_CONTROL.sub("\N{REPLACEMENT CHARACTER}", x) for x in (text, ahead))
        text, ahead = text.expandtabs(4), ahead.expandtabs(4)
        parts = []
        if self._ahead != self._end:  # back to where the certain text ends
            row, column = self._end
            row, column = (row + 1, 0) if column == width else (row, column)
            up = self._ahead[0] - row
            parts += [f"\x1b[{up}A" * (up > 0), "\r", f"\x1b[{column}C" * (column > 0), "\x1b[J"]
            self._end = row, column
        parts.append(text)
        self._end = self._ahead = _advance(self._end, text, width)
        if ahead:
            # What scrolls away cannot be written anew.
            while ahead and _advance(self._end, ahead, width)[0] - self._end[0] > height - 2:
                ahead = ahead[: len(ahead) * 3 // 4]
            parts += [DIM, ahead, PLAIN]
            self._ahead = _advance(self._end, ahead, width)
        self.out.write("".join(parts))
        self.out.flush()


def _advance(place: tuple[int, int], text: str, width: int) -> tuple[int, int]:
    """Row and column of the cursor behind a text; in column `width` it waits for what comes."""
    row, column = place
    for character in text:
        if character == "\n":
            row, column = row + 1, 0
            continue
        cells = _cells(character)
        if column + cells > width:
            row, column = row + 1, 0
        column += cells
    return row, column


def _cells(character: str) -> int:
    """How many columns it takes."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
