"""What moves between chips, read from the text of a compiled program."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_MOVES = re.compile(
    r"= (?P<shape>.*?) (?P<op>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LIMIT = re.compile(r"ROOT .* compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT")
_ARRAY = re.compile(r"\b(pred|bf|f|s|u)(\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of transfer in a program.

    Attributes:
      op: such as "all-gather".
      shape: of what it gives, per chip.
      num_bytes: of that.
      group: chips that take part.
      branch: of the conditional that it is in, from 0 (false); -1: it runs in any case.
      times: how often it runs: loops over layers count their rounds, others once.
    """

    op: str
    shape: str
    num_bytes: int
    group: int
    branch: int
    times: int

    @property
    def bytes_moved(self) -> float:
        """Through the links of a chip, all times together, on a ring."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.op, share)
        if self.op == "reduce-scatter":
            factor *= self.group  # what it gives is a share of what it takes
        return self.times * factor * self.num_bytes


def collectives(program: str) -> list[Collective]:
    """All transfers of a compiled program (its text), those that move most first."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            lines[name] = []
            entry = name if header[1] else entry
        elif name:
            lines[name].append(line)
    found: collections.Counter[tuple[str, str, int, int, int]] = collections.Counter()
    pending = [(entry, 1, -1)]
    while pending:
        name, times, branch = pending.pop()
        for line in lines.get(name, ()):
            if move := _MOVES.search(line):
                shape, num_bytes = _largest_of(move["shape"])
                found[move["op"], shape, num_bytes, _group_size(line), branch] += times
            if loop := _LOOP.search(line):
                rounds = _rounds(lines.get(loop[1], []))
                pending.append((loop[2], times * rounds, branch))
            pending += [(callee, times, branch) for callee in _CALLS.findall(line)]
            if branches := _BRANCHES.search(line):
                for i, callee in enumerate(branches[1].split(",")):
                    pending.append((callee.strip(" %"), times, i if branch < 0 else branch))
    moves = [Collective(*key, times) for key, times in found.items()]
    return sorted(moves, key=lambda move: -move.bytes_moved)


def _rounds(condition: list[str]) -> int:
    """How often a loop runs that counts up to a constant; 1 of any other."""
    for line in condition:
        if limit := _LIMIT.search(line):
            for other in condition:
                if constant := re.search(rf"%{re.escape(limit[1])} = .* constant\((\d+)\)", other):
                    return int(constant[1])
    return 1


def _largest_of(shapes: str) -> tuple[str, int]:
    """The largest array of an array or a tuple of them, and its bytes."""
    best = ("", 0)
    for kind, bits, dims in _ARRAY.findall(shapes):
        size = math.prod(int(d) for d in dims.split(",") if d) * max(int(bits or 8) // 8, 1)
        if size > best[1]:
            best = (f"{kind}{bits}[{dims}]", size)
    return best


def _group_size(line: str) -> int:
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(groups[1].split(","))
    return 2  # a permutation names pairs
