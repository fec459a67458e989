"""Small edits of Python programs with one right answer, made from the programs of MBPP.

Every program gets one edit, in turn, as far as it allows: a parameter is renamed, a function gets
its docstring, or its parameters get type hints. All else stays, character by character, so most of
the answer is a copy of the input.

Reference: Austin et al., "Program Synthesis with Large Language Models", arXiv:2108.07732.
"""

import ast
import dataclasses
import io
import os
import tokenize
import warnings
from collections.abc import Callable, Sequence

from dlm import tasks
from dlm.tasks import jsonl, rewriting
from dlm.tasks.loaded import Loaded

_NAMES = ("values", "number", "item", "other", "data", "result")

Edit = tuple[str, str]  # instruction, program


@dataclasses.dataclass(frozen=True)
class CodeEdits(Loaded):
    """One edit of every program of a JSON-lines file with texts `text` and `code`.

    Programs that cannot be parsed, are not ASCII or allow no edit are left out.

    Attributes:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object or lacks one of the two, or no program is left.
    """

    path: str | os.PathLike[str]
    examples: tuple[tasks.Example, ...] = dataclasses.field(init=False, repr=False, compare=False)
    lines: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        examples, lines = list[tasks.Example](), list[int]()
        for number, record in jsonl.read_records(self.path):
            where = f"{self.path}, line {number}"
            source = jsonl.render("{code}", record, where).strip() + "\n"
            text = " ".join(jsonl.render("{text}", record, where).split())
            if example := _example(source, text, len(examples)):
                examples.append(example)
                lines.append(number)
        if not examples:
            raise ValueError(f"{self.path} has no program that can be edited: give MBPP's")
        object.__setattr__(self, "examples", tuple(examples))
        object.__setattr__(self, "lines", tuple(lines))

    def where(self, index: int) -> str:
        """File and line of an example."""
        return f"{self.path}, line {self.lines[index]}"

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """1.0 for the edited program, white space at its ends aside; "copied" as of rewritings."""
        code = jsonl.extract_code(completion).strip()
        copied = rewriting.similarity(code, example.metadata["source"])
        return {"score": float(code == example.completion.strip()), "copied": copied}


def _example(source: str, text: str, turn: int) -> tasks.Example | None:
    """The edit whose turn it is, or the next one that the program allows."""
    tree = _parse(source)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)] if tree else []
    if not functions:
        return None
    kinds = list(EDITS)
    for i in range(len(kinds)):
        kind = kinds[(turn + i) % len(kinds)]
        made = EDITS[kind](source, functions[-1], text)
        if made is not None:
            instruction, target = made
            metadata = {"operation": kind, "source": source.rstrip()}
            prompt = rewriting.write_prompt(instruction, source.rstrip())
            return tasks.Example(prompt, target.rstrip(), metadata)
    return None


def rename(source: str, function: ast.FunctionDef, text: str) -> Edit | None:
    """The first parameter that is no attribute or keyword elsewhere is called something else."""
    tree = ast.parse(source)
    taken = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    taken |= {node.arg or "" for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    words = list(tokenize.generate_tokens(io.StringIO(source).readline))
    named = [word for word in words if word.type == tokenize.NAME]
    known = {word.string for word in named}
    old = next((a.arg for a in function.args.args if a.arg not in {*taken, "self"}), None)
    new = next((name for name in _NAMES if name not in known), None)
    if old is None or new is None:
        return None
    if any(isinstance(node, ast.JoinedStr) for node in ast.walk(tree)):
        return None  # whose names are tokens from Python 3.12 on only
    places = [(*word.start, len(old)) for word in named if word.string == old]
    changes = [(row, column, num, new) for row, column, num in places]
    return f"Rename the variable {old} to {new} in this program.", _replace(source, changes)


def add_docstring(source: str, function: ast.FunctionDef, text: str) -> Edit | None:
    """The description of the task stands in the function, which has no docstring yet."""
    first, lines = function.body[0], source.split("\n")
    indent = lines[first.lineno - 1][: first.col_offset]
    is_below = first.lineno > function.lineno and not indent.strip()
    is_plain = '"' not in text and "\\" not in text and not hasattr(first, "decorator_list")
    if ast.get_docstring(function) is not None or not is_below or not is_plain:
        return None
    lines.insert(first.lineno - 1, f'{indent}"""{text}"""')
    instruction = f'Add the docstring """{text}""" to the function {function.name}.'
    return instruction, "\n".join(lines)


def add_hints(source: str, function: ast.FunctionDef, text: str) -> Edit | None:
    """Every parameter gets the same type hint."""
    bare = [a for a in function.args.args if a.annotation is None and a.arg != "self"]
    if not bare:
        return None
    changes = [(a.end_lineno or 0, a.end_col_offset or 0, 0, ": object") for a in bare]
    instruction = f"Give every parameter of the function {function.name} the type hint object."
    return instruction, _replace(source, changes)


EDITS: dict[str, Callable[[str, ast.FunctionDef, str], Edit | None]] = {
    "rename": rename,
    "docstring": add_docstring,
    "hints": add_hints,
}


def _parse(source: str) -> ast.Module | None:
    if not source.isascii():  # columns are of bytes
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def _replace(source: str, changes: Sequence[tuple[int, int, int, str]]) -> str:
    """The text with others in place of (line from 1, column, characters, other)."""
    lines = source.split("\n")
    for row, column, num, new in sorted(changes, reverse=True):
        line = lines[row - 1]
        lines[row - 1] = line[:column] + new + line[column + num :]
    return "\n".join(lines)
