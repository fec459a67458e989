"""Ways of drafting by name: what `complete` takes; those that need nothing trained.

    from decode.speculative.points import METHODS, named

    complete(lm, prompts, method="prompt_lookup")

A drafter's own published settings stand in its file (`Drafter.points`).
"""

from __future__ import annotations

from decode.core.component import entry
from decode.speculative.components import DRAFTERS
from decode.speculative.loop import SpeculativeMethod

METHODS: dict[str, SpeculativeMethod] = {
    name: SpeculativeMethod(drafter) for kind in DRAFTERS for name, drafter in kind.points().items()
}


def named(name: str) -> SpeculativeMethod:
    """The method of the table.

    Raises:
      ValueError: there is no such method.
    """
    return entry(METHODS, name)
