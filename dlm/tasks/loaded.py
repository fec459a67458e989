"""Tasks whose examples are all in memory."""

from __future__ import annotations

from collections.abc import Sequence

from dlm import tasks
from dlm.tasks import splits


class Loaded(tasks.Task):
    """A task with a field `examples`.

    Attributes:
      examples: in order.
    """

    examples: tuple[tasks.Example, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tasks.Example:
        return self.examples[splits.check_index(index, len(self))]

    @property
    def loaded(self) -> Sequence[tasks.Example]:
        return self.examples
