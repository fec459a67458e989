"""What a search has looked at: for pictures, and to see what it cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Fate = Literal["won", "found", "kept", "dropped"]


@dataclasses.dataclass(frozen=True)
class Node:
    """Something that a search tried: a token, or a step of several.

    Attributes:
      parent: the number of what it stands behind, which comes before it in a list; -1: the prompt.
      text: what is shown of it.
      fate: "won": it is of the best text; "found": it ends another one that was found; "kept": the
        search went on from it for a while; "dropped": it did not.
      score: what it was chosen by; None: by nothing.
      parts: what the score is made of, by name.
    """

    parent: int
    text: str
    fate: Fate = "kept"
    score: float | None = None
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Explored:
    """The tree of a search on the host, and what it cost.

    Attributes:
      nodes: parents before their children.
      num_expansions: texts that were gone on with; of PG-TD: completions that the model made.
      num_scored: texts that were scored.
      num_tokens: that were written; 0: nobody counted.
    """

    nodes: tuple[Node, ...]
    num_expansions: int
    num_scored: int
    num_tokens: int = 0
