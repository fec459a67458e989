"""Behind a dot only members of what stands before it, as Python's own introspection knows them."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import io
import keyword
import re
import tokenize
import types
from collections.abc import Iterable, Iterator
from typing import Any

from decode.constraints.monitors.contracts import PYTHON_BREAKS
from decode.constraints.monitors.dereference import Dereference

# Modules of the standard library that do nothing when they are imported.
MODULES = (
    "array", "base64", "bisect", "calendar", "cmath", "collections", "contextlib", "copy", "csv",
    "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "hashlib", "heapq",
    "inspect", "io", "itertools", "json", "math", "numbers", "operator", "os", "os.path", "pathlib",
    "pprint", "random", "re", "shutil", "statistics", "string", "struct", "sys", "tempfile",
    "textwrap", "time", "types", "typing", "unicodedata", "uuid", "warnings", "zlib",
)  # fmt: skip
_CHAIN = re.compile(r"(?<![\w.)\]}'\"])([^\W\d]\w*(?:\.[^\W\d]\w*)*)\.\Z")
_CLOSERS = {"(": ")", "[": "]", "{": "}"}
_UNKNOWN = object()


@dataclasses.dataclass(frozen=True, eq=False)
class PythonMonitor(Dereference):
    """Members of modules that a program imports, of what they hold, and of plain values.

    Example:
      >>> complete(lm, "import math\ndef area(r):\n    return math.", constraint=PythonMonitor())

    The program so far is parsed, not run: as far as its whole lines go, and once more with open
    brackets closed, and what both say is united. Nothing is asked where a name may be another thing
    than one that was imported or given a literal, behind calls and in strings and comments, nor of
    objects that may have members of their own. Only `modules` are imported, to be looked at.

    Deviations: there is no limit on the time of an analysis, which parses the program and no more.

    Reference: Agrawal et al., arXiv:2306.10763, Sec. 3, with introspection in the place of a
    language server.

    Attributes:
      modules: what may be imported here; of other modules nothing is known.
      breaks: bytes that end a name.
      max_names: >= 1, most names of a thing: of those that have more nothing is asked.
    """

    modules: tuple[str, ...] = MODULES
    breaks: frozenset[int] = PYTHON_BREAKS
    max_names: int = 2000

    def __post_init__(self) -> None:
        if self.max_names < 1:
            raise ValueError(f"max_names={self.max_names} must be at least 1")
        if not isinstance(self.modules, tuple):
            raise ValueError(f"modules={self.modules!r} must be a tuple of names")

    def analyse(self, text: bytes) -> Iterable[bytes]:
        return _members(text, self.modules)


@functools.lru_cache(maxsize=1024)
def _members(text: bytes, modules: tuple[str, ...]) -> frozenset[bytes]:
    """Names that may stand behind a program that ends with a dot; none: nothing is known."""
    try:
        program = text.decode()
    except UnicodeDecodeError:
        return frozenset()
    chain = _CHAIN.search(program)
    if chain is None:
        return frozenset()
    opened = _opened(program + "x")
    if opened is None:  # in a string or a comment
        return frozenset()
    closed = _parse(program + "x" + "".join(_CLOSERS[x] for x in reversed(opened)))
    begun, num_chars = _parse_lines(program[: program.rfind("\n") + 1])
    path = chain[1].split(".")
    rest = program[num_chars : chain.start(1)]
    if closed is None and re.search(rf"\b{path[0]}\b(?!\s*\.)", rest):
        return frozenset()  # it may be bound where nothing was parsed
    things = [_look_up(tree, path, modules) for tree in (closed, begun) if tree is not None]
    found = [thing for thing in things if thing is not None]
    if not all(names := [_dir(thing) for thing in found]):
        return frozenset()
    every = {name for some in names for name in some if not keyword.iskeyword(name)}
    return frozenset(name.encode() for name in every)


def _opened(program: str) -> list[str] | None:
    """Brackets that are open at the end; None if that is no place where a name ends."""
    opened: list[str] = []
    last: tokenize.TokenInfo | None = None
    try:
        for token in tokenize.generate_tokens(io.StringIO(program).readline):
            if token.type == tokenize.NAME:
                last = token
            if token.type == tokenize.OP and token.string in _CLOSERS:
                opened.append(token.string)
            elif token.type == tokenize.OP and token.string in _CLOSERS.values() and opened:
                opened.pop()
    except (tokenize.TokenError, SyntaxError):  # of what is open
        pass
    lines = program.split("\n")
    is_here = last is not None and last.end == (len(lines), len(lines[-1]))
    return opened if is_here else None


def _parse(program: str) -> ast.Module | None:
    try:
        return ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _parse_lines(program: str) -> tuple[ast.Module | None, int]:
    """The longest beginning of whole lines that is a program, and how many characters it has."""
    lines = program.splitlines(keepends=True)
    for n in range(len(lines), 0, -1):
        some = "".join(lines[:n])
        if (tree := _parse(some)) is not None:
            return tree, len(some)
    return None, 0


def _look_up(tree: ast.Module, chain: list[str], modules: tuple[str, ...]) -> Any:
    """What a chain of names stands for, or `_UNKNOWN`; None: its first name is not there.

    What is imported with a star may have any name.
    """
    bound = [thing for name, thing in _bindings(tree, modules) if name in (chain[0], "*")]
    if not bound:
        return None
    if any(thing is not bound[0] for thing in bound):
        return _UNKNOWN
    thing = bound[0]
    for name in chain[1:]:
        if not isinstance(thing, types.ModuleType | type):
            return _UNKNOWN
        thing = inspect.getattr_static(thing, name, _UNKNOWN)
    return thing


def _bindings(tree: ast.Module, modules: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Every name that a program binds, and to what; literals stand for their types' instances."""
    known: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                yield name, _import(alias.name if alias.asname else name, modules)
        elif isinstance(node, ast.ImportFrom):
            module = _UNKNOWN if node.level else _import(node.module or "", modules)
            for alias in node.names:
                found = _UNKNOWN
                if module is not _UNKNOWN and alias.name != "*":
                    found = inspect.getattr_static(module, alias.name, _UNKNOWN)
                yield alias.asname or alias.name, found
        elif isinstance(node, ast.Assign) and (kind := _literal(node.value)) is not None:
            for target in node.targets:
                if isinstance(target, ast.Name):
                    known.add(id(target))
                    yield target.id, _of_type(kind)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, _UNKNOWN
        elif isinstance(node, ast.arg):
            yield node.arg, _UNKNOWN
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name, _UNKNOWN
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.rest, _UNKNOWN
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            continue
        elif isinstance(node, ast.Name) and id(node) not in known:
            yield node.id, _UNKNOWN


def _import(name: str, modules: tuple[str, ...]) -> Any:
    """A module that may be imported, or `_UNKNOWN`."""
    return importlib.import_module(name) if name in modules else _UNKNOWN


def _literal(node: ast.expr) -> type | None:
    """The type of a literal; None if it is none."""
    kinds: dict[type[ast.expr], type] = {
        ast.List: list, ast.ListComp: list, ast.Dict: dict, ast.DictComp: dict, ast.Set: set,
        ast.SetComp: set, ast.Tuple: tuple, ast.JoinedStr: str,
    }  # fmt: skip
    if isinstance(node, ast.Constant):
        return type(node.value)
    return kinds.get(type(node))


@functools.cache
def _of_type(kind: type) -> _Instance:
    """The same one for a type, so that names that are given two values of it are known."""
    return _Instance(kind)


@dataclasses.dataclass(frozen=True)
class _Instance:
    """Some value of a type."""

    kind: type


def _dir(thing: Any) -> list[str]:
    """All members of a thing; none if it may have others."""
    if isinstance(thing, _Instance):
        return dir(thing.kind)
    if isinstance(thing, types.ModuleType):
        return [] if "__getattr__" in vars(thing) else dir(thing)
    if isinstance(thing, type):
        return dir(thing) + dir(type(thing))
    return []
