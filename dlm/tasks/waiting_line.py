"""Waiting lines: ten operations on a list of people, easy one token at a time, hard in parallel.

Reference: Kang et al., "ParallelBench: Understanding the Trade-offs of Parallel Decoding in
Diffusion LLMs", arXiv:2510.04767. `WaitingLine` makes tasks of the same ten kinds with names and
wording of our own; `dlm.tasks.parallel_bench` reads the published files. Both use the same scorer.

Where an operation has many right answers (shuffle and the three `..._random` ones), the completion
is one of them, drawn uniformly: given the prompt, the tokens of an answer depend on each other.

As published, "sort" orders by the whole string, that is by first name.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from dlm import tasks
from dlm.tasks import splits

OPERATIONS = (
    "copy",
    "reverse",
    "sort",
    "shuffle",
    "insert_index",
    "insert_random",
    "remove_index",
    "remove_random",
    "replace_index",
    "replace_random",
)

_FIRST_NAMES = """
Alice Bruno Clara Daniel Elena Felix Grace Henry Irene Jonas Karen Liam Maria Nora Oscar Paula
Quentin Rosa Simon Teresa Ursula Victor Wendy Xavier Yvonne Zoe Adam Bella Colin Diana Eric Fiona
Amy Benjamin Carol David Emma Frank Gina Hugo Ingrid Joseph Katie Leon Monica Nathan Olga Peter
Ralph Sarah Tobias Uma Vera Walter George Hannah Ivan Julia Kevin Laura Martin Nina Oliver Petra
"""
_LAST_NAMES = """
Adams Baker Carter Dixon Evans Fisher Gibson Harris Ingram Jensen Keller Larson Miller Nelson Owens
Parker Quinn Rivera Smith Turner Underwood Vargas Walker Young Zimmerman Anderson Bennett Collins
Davis Ellis Foster Garcia Hughes Irwin Jackson Knight Lopez Morgan Novak Olsen Perez Ramsey Sanders
Taylor Vaughn Watson Abbott Brooks Coleman Duncan Edwards Fleming Griffin Hansen Johnson Kramer
Lambert Murphy Nguyen Ortega Porter Reyes Schmidt Thompson
"""
FIRST_NAMES = tuple(_FIRST_NAMES.split())
LAST_NAMES = tuple(_LAST_NAMES.split())

_SCENE = "You are in charge of the waiting line at a customer service desk.\n"
_ANSWER = " Answer with the final list only.\n"
_POSITION = " at position {index} (the first position is 0)"

# Per operation the sentence before the list and the one after it.
_SENTENCES = {
    "copy": (
        "These people have arrived in this order:\n",
        "\nWrite down exactly the same list." + _ANSWER,
    ),
    "reverse": (
        "A colleague wrote the line down the wrong way round:\n",
        "\nPut the list in the reverse order." + _ANSWER,
    ),
    "sort": (
        "To find people faster, the line should be in alphabetical order:\n",
        "\nSort the list alphabetically." + _ANSWER,
    ),
    "shuffle": (
        "To be fair to everybody, the line should be put in a random order:\n",
        "\nShuffle the list so that its order is not the one above." + _ANSWER,
    ),
    "insert_index": (
        'A new person "{person}" joins the line' + _POSITION + ":\n",
        "\nInsert the new person there." + _ANSWER,
    ),
    "insert_random": (
        'A new person "{person}" joins the line at a random position:\n',
        "\nInsert the new person anywhere." + _ANSWER,
    ),
    "remove_index": (
        "The person" + _POSITION + " has gone home:\n",
        "\nRemove that person." + _ANSWER,
    ),
    "remove_random": (
        "One of the people in the line has gone home:\n",
        "\nRemove any one person." + _ANSWER,
    ),
    "replace_index": (
        "The person" + _POSITION + ' gives the place to "{person}":\n',
        "\nReplace that person." + _ANSWER,
    ),
    "replace_random": (
        'One of the people in the line gives the place to "{person}":\n',
        "\nReplace any one person." + _ANSWER,
    ),
}
_USER, _ASSISTANT, _END_OF_TURN = "User:\n", "Assistant:\n", "\n\n"


# ---- Lists as text ----------------------------------------------------------------------------


def render_list(people: Sequence[str]) -> str:
    """`["A B", "C D"]`."""
    return "[" + ", ".join(f'"{person}"' for person in people) + "]"


def parse_list(text: str) -> list[str]:
    """The loose reading: what is between the last "[" and the next "]", split at commas.

    Either bracket may be missing; quotes and spaces around an item are dropped, empty items too.
    """
    inside = text.rpartition("[")[2].partition("]")[0]
    return [item.strip('" ') for item in inside.split(",") if item.strip()]


def parse_list_strict(text: str) -> list[str] | None:
    """The strict reading: None unless the same part of `text` is written like `render_list` does.

    There may be text before and after the brackets.
    """
    match = re.fullmatch(r"([^\]]*)\].*", text.rpartition("[")[2], flags=re.DOTALL)
    if match is None or "[" not in text:
        return None
    items = match[1].split(", ")
    if not all(re.fullmatch(r'"[^"]*"', item) for item in items):
        return None
    return [item[1:-1] for item in items]


# ---- Right answers ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Question:
    """One question: `person` and `index` are None where the operation has no use for them."""

    operation: str
    people: tuple[str, ...]
    person: str | None
    index: int | None


def _needs_person(operation: str) -> bool:
    return operation.startswith(("insert", "replace"))


def _needs_index(operation: str) -> bool:
    return operation.endswith("_index")


def _num_positions(operation: str, num_people: int) -> int:
    """Positions that an insertion, removal or replacement can have."""
    return num_people + 1 if operation.startswith("insert") else num_people


def _answer(question: _Question, rng: np.random.Generator) -> list[str]:
    """A right answer, uniform among all of them."""
    operation, people = question.operation, list(question.people)
    if operation == "copy":
        return people
    if operation == "reverse":
        return people[::-1]
    if operation == "sort":
        return sorted(people)
    if operation == "shuffle":
        answer = people
        while answer == people:
            answer = [people[i] for i in rng.permutation(len(people))]
        return answer
    index = question.index
    if index is None:
        index = int(rng.integers(_num_positions(operation, len(people))))
    new = [] if question.person is None else [question.person]
    after = people[index:] if operation.startswith("insert") else people[index + 1 :]
    return people[:index] + new + after


def _is_right(example: tasks.Example, answer: list[str]) -> bool:
    operation, person = example.metadata["operation"], example.metadata["person"]
    people = list(example.metadata["people"])
    if operation == "shuffle":
        return sorted(answer) == sorted(people) and answer != people
    if operation == "insert_random":
        if person not in answer:
            return False
        answer = list(answer)
        answer.remove(person)  # the first occurrence
        return answer == people
    if operation == "remove_random":
        missing = set(people) - set(answer)
        return len(missing) == 1 and answer == [name for name in people if name not in missing]
    if operation == "replace_random":
        if person not in answer or len(answer) != len(people):
            return False
        people[answer.index(person)] = person  # the first occurrence
        return answer == people
    return answer == parse_list(example.completion)


def score_line(example: tasks.Example, completion: str) -> dict[str, float]:
    """Scores an answer by the rules of the published benchmark.

    Returns:
        "score": 1.0 where the list as `parse_list` reads it is right. "score_strict": 1.0 where the
        list is right and well written, see `parse_list_strict`.
    """
    strict = parse_list_strict(completion)
    return {
        "score": float(_is_right(example, parse_list(completion))),
        "score_strict": float(strict is not None and _is_right(example, strict)),
    }


def with_shots(shots: Sequence[tuple[str, str]], prompt: str) -> str:
    """`prompt` alone, or as the last of several turns in plain text."""
    if not shots:
        return prompt
    turns = [_USER + text + _ASSISTANT + answer + _END_OF_TURN for text, answer in shots]
    return "".join(turns) + _USER + prompt + _ASSISTANT


# ---- The generated task -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WaitingLine(splits.Stream):
    """Random waiting lines and operations on them.

    Example:
        >>> task = WaitingLine(operations=("reverse",), num_shots=0)
        >>> example = task.ask("reverse", ["Alice Adams", "Bruno Baker"])
        >>> example.completion, task.score(example, '["Alice Adams", "Bruno Baker"]')["score"]
        ('["Bruno Baker", "Alice Adams"]', 0.0)

    The people of one line are distinct, and a new person is never in it. The split is decided by
    the group of people, in whatever order and for whatever operation: no training prompt holds the
    line of a test prompt, for the in-context examples of both splits are training groups too.

    Attributes:
        operations: item i has operation i modulo their number.
        min_people: shortest list, at least 2; lengths are uniform.
        max_people: longest list.
        num_first_names: how many of `FIRST_NAMES` are used, 2 to 64.
        num_last_names: how many of `LAST_NAMES` are used, 2 to 64. There must be 16 combinations
            and four times `max_people`.
        num_shots: answered examples of the same operation in the prompt; published: 1.
    """

    operations: tuple[str, ...] = OPERATIONS
    min_people: int = 3
    max_people: int = 6
    num_first_names: int = 32
    num_last_names: int = 32
    num_shots: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.operations or not isinstance(self.operations, tuple):
            raise ValueError(f"operations={self.operations!r} must be a non-empty tuple of names")
        for operation in self.operations:
            check_operation(operation)
        if not 2 <= self.min_people <= self.max_people:
            raise ValueError(
                f"min_people={self.min_people} must be in [2, max_people={self.max_people}]"
            )
        for field, names in (("num_first_names", FIRST_NAMES), ("num_last_names", LAST_NAMES)):
            if not 2 <= getattr(self, field) <= len(names):
                raise ValueError(f"{field}={getattr(self, field)} must be in [2, {len(names)}]")
        num_combinations = self.num_first_names * self.num_last_names
        if num_combinations < max(16, 4 * self.max_people):
            raise ValueError(
                f"num_first_names * num_last_names = {num_combinations} must be at least "
                f"{max(16, 4 * self.max_people)} for max_people={self.max_people}"
            )
        if self.num_shots < 0:
            raise ValueError(f"num_shots={self.num_shots} must be at least 0")

    def __getitem__(self, index: int) -> tasks.Example:
        rng = self._rng(index)
        operation = self.operations[index % len(self.operations)]
        return self._example(self._draw(rng, operation, self.split), rng)

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """Loose "score" and "score_strict"; see `score_line`."""
        return score_line(example, completion)

    def ask(
        self,
        operation: str,
        people: Sequence[str],
        index: int | None = None,
        person: str | None = None,
    ) -> tasks.Example:
        """The example for one's own waiting line.

        Args:
            operation: one of `OPERATIONS`, whether in this task's `operations` or not.
            people: at least two distinct "First Last" of names that this task knows.
            index: position from 0, for the `..._index` operations and only for them.
            person: the new person, for insertions and replacements and only for them.

        Returns:
            The example, with shots as the task has them. Where many answers are right, the
            completion is one of them, always the same for the same question.

        Raises:
            TypeError: `people` is one string.
            ValueError: anything else is not as described.
        """
        check_operation(operation)
        if isinstance(people, str):
            raise TypeError(f"people={people!r} must be a list of names, not one string")
        if len(people) < 2:
            raise ValueError(f"people has {len(people)} names; it must have at least 2")
        for i, name in enumerate(people):
            self._check_name(f"people[{i}]", name)
            if name in people[:i]:
                raise ValueError(f"people[{i}]={name!r} is in the list twice; names must differ")
        self._check_person(operation, people, person)
        _check_position(operation, len(people), index)
        question = _Question(operation, tuple(people), person, index)
        rng = np.random.default_rng([self.seed, *repr(question).encode()])
        return self._example(question, rng)

    @property
    def pieces(self) -> tuple[str, ...]:
        """Sentences, list signs, digits, first names, and last names with their leading space.

        They are the same for all `operations`, list lengths, shots, splits and seeds, so that one
        tokenizer serves them all.
        """
        templates = [_SCENE, *(text for pair in _SENTENCES.values() for text in pair)]
        sentences = [part for text in templates for part in re.split(r"\{\w+\}", text)]
        return tuple(
            dict.fromkeys(
                [
                    *(_USER, _ASSISTANT, _END_OF_TURN),
                    *sentences,
                    *('["', '", "', '"]'),
                    *"0123456789",
                    *FIRST_NAMES[: self.num_first_names],
                    *(f" {name}" for name in LAST_NAMES[: self.num_last_names]),
                ]
            )
        )

    def _draw(self, rng: np.random.Generator, operation: str, split: str) -> _Question:
        num_people = int(rng.integers(self.min_people, self.max_people + 1))
        num_combinations = self.num_first_names * self.num_last_names
        for _ in range(splits.MAX_DRAWS):
            chosen = rng.choice(num_combinations, num_people + 1, replace=False)
            *people, person = (
                f"{FIRST_NAMES[i // self.num_last_names]} {LAST_NAMES[i % self.num_last_names]}"
                for i in chosen
            )
            if splits.split_of(", ".join(sorted(people))) == split:
                break
        else:
            raise ValueError(f"no {split} group in {splits.MAX_DRAWS} draws for {self}")
        index = int(rng.integers(_num_positions(operation, num_people)))
        return _Question(
            operation,
            tuple(people),
            person if _needs_person(operation) else None,
            index if _needs_index(operation) else None,
        )

    def _example(self, question: _Question, rng: np.random.Generator) -> tasks.Example:
        answer = render_list(_answer(question, rng))
        shots = []
        for _ in range(self.num_shots):
            shot = self._draw(rng, question.operation, "train")
            shots.append((_render_question(shot), render_list(_answer(shot, rng))))
        return tasks.Example(
            prompt=with_shots(shots, _render_question(question)),
            completion=answer,
            metadata=dict(vars(question)),
        )

    def _check_name(self, field: str, name: str) -> None:
        first, _, last = name.partition(" ")
        known_first = FIRST_NAMES[: self.num_first_names]
        known_last = LAST_NAMES[: self.num_last_names]
        if first not in known_first:
            raise ValueError(
                f"{field}={name!r} must start with one of the {len(known_first)} known first "
                f"names: {', '.join(known_first)}"
            )
        if last not in known_last:
            raise ValueError(
                f"{field}={name!r} must end with one of the {len(known_last)} known last names: "
                f"{', '.join(known_last)}"
            )

    def _check_person(self, operation: str, people: Sequence[str], person: str | None) -> None:
        if not _needs_person(operation):
            if person is not None:
                raise ValueError(f"person={person!r} must be left out for operation {operation!r}")
            return
        if person is None:
            raise ValueError(f"person=None must be the new person for operation {operation!r}")
        self._check_name("person", person)
        if person in people:
            raise ValueError(f"person={person!r} must not be in the line already")


def _render_question(question: _Question) -> str:
    before, after = _SENTENCES[question.operation]
    before = before.format(person=question.person, index=question.index)
    return _SCENE + before + render_list(question.people) + after


def check_operation(operation: str) -> None:
    """ValueError unless it is one of `OPERATIONS`."""
    if operation not in OPERATIONS:
        raise ValueError(f"operation={operation!r} must be one of {', '.join(OPERATIONS)}")


def _check_position(operation: str, num_people: int, index: int | None) -> None:
    if not _needs_index(operation):
        if index is not None:
            raise ValueError(f"index={index} must be left out for operation {operation!r}")
        return
    high = _num_positions(operation, num_people) - 1
    if index is None or not 0 <= index <= high:
        raise ValueError(
            f"index={index} must be in [0, {high}] for operation {operation!r} on {num_people} "
            "people"
        )
