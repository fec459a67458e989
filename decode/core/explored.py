"""What a search on the host has looked at: for pictures, and to see what it cost."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Node:
    """A text that a search has looked at.

    Attributes:
      parent: the number of the node that it goes on from; -1: it is the prompt.
      tokens: what it adds to that one's text.
      score: what the search makes of it, the larger the better.
      visits: how often the search came by.
      is_end: whether the text is whole.
    """

    parent: int
    tokens: tuple[int, ...]
    score: float
    visits: int
    is_end: bool


@dataclasses.dataclass(frozen=True)
class Explored:
    """A tree of texts, and what it cost.

    Attributes:
      nodes: parents before their children, the prompt first.
      num_expansions: texts that were gone on with; of PG-TD: completions that the model made.
      num_tokens: that were written; 0: nobody counted.
      num_scored: texts that were scored.
    """

    nodes: tuple[Node, ...]
    num_expansions: int
    num_scored: int
    num_tokens: int = 0
