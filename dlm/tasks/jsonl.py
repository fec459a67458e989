"""Tasks from JSON-lines files: templates over the fields of a record, and a scorer.

`gsm8k` and `mbpp` read the published files of

  * Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv:2110.14168;
  * Austin et al., "Program Synthesis with Large Language Models", arXiv:2108.07732.
"""

import ast
import builtins
import dataclasses
import decimal
import math
import os
import pathlib
import re
import string
import warnings
from collections.abc import Mapping
from typing import Any

from dlm import tasks
from dlm.json_lines import parse_lines
from dlm.tasks.loaded import Loaded

# A sign counts unless it is a subtraction ("10-3"); commas count between groups of three digits.
_NUMBER = re.compile(
    r"(?:(?<![0-9])-)?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def read_records(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, JSON object) of every line of a file that is not empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object, has a key twice, or the file has none.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file; give a JSON-lines file")
    records = parse_lines(file.read_bytes(), path)
    for number, record in records:
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, line {number}: must hold a JSON object, got {type(record).__name__}"
            )
    return records


def render(template: str, record: Mapping[str, Any], where: str) -> str:
    """`template` filled with the fields of `record`, with line ends made "\\n".

    Args:
        template: `str.format` syntax: "{field}", "{list[0]}", "{object[key]}".
        record: the fields.
        where: the record's origin, for the error.

    Raises:
        ValueError: the template is broken or names an attribute ("{field.attribute}"); the record
            lacks a field of the template, has null, NaN, a list or an object there, does not fit
            its format specification, or is no Unicode.
    """
    formatter = string.Formatter()
    try:
        fields = [field for _, field, _, _ in formatter.parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"the template {template!r} is broken: {error}") from error
    for field in fields:
        if "." in re.sub(r"\[[^]]*\]", "", field):
            raise ValueError(
                f"the template's field {field!r} has a dot, which would name an attribute: entries "
                "of objects are {object[key]}, and a field with a dot in its name needs another"
            )
        try:
            value, _ = formatter.get_field(field, (), record)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            known = ", ".join(sorted(record))
            raise ValueError(
                f"{where}: the record lacks the field {field!r} of the template ({error!r}); it "
                f"has {known}"
            ) from error
        if value is None:
            raise ValueError(f"{where}: the field {field!r} of the template is null")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: the field {field!r} of the template is no number: {value}")
        whole = field.rpartition("[")[0]
        if whole and isinstance(formatter.get_field(whole, (), record)[0], str):
            raise ValueError(f"{where}: the field {whole!r} of the template is text, not a list")
        if isinstance(value, (list, dict)):
            raise ValueError(
                f"{where}: the field {field!r} of the template is a {type(value).__name__}, of "
                "which the template must name an entry"
            )
    try:
        text = template.format_map(record)
    except (KeyError, TypeError, ValueError, MemoryError) as error:  # "{x:.2f}" where x is text
        raise ValueError(f"{where}: the template {template!r} does not fit: {error}") from error
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: the text has half of a character, {text[error.start]!r}, which no tokenizer "
            "can encode"
        ) from error
    return text.replace("\r\n", "\n")


@dataclasses.dataclass(frozen=True)
class JsonlTask(Loaded):
    """One example per line of a JSON-lines file.

    Example:
        >>> task = JsonlTask("data.jsonl", prompt="Q: {question}\\nA:", completion=" {answer}")
        >>> task.score(task[0], task[0].completion)
        {'score': 1.0}

    Attributes:
        path: the file.
        prompt: template of the prompt, see `render`.
        completion: template of the completion.
        scorer: called with (example, completion); exact match, white space aside, by default.
        shots: text that stands before every prompt as it is, such as examples with their answers.
        examples: one per record, made when the task is created, so that a bad file fails at once.
            Their metadata is the record and, unless the record has an "operation" of its own, the
            file's name without its suffix under that key.
        lines: the line that each example is from, counted from 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object or lacks a field of a template.
    """

    path: str | os.PathLike[str]
    prompt: str
    completion: str
    scorer: tasks.Scorer = tasks.exact_match
    shots: str = ""
    examples: tuple[tasks.Example, ...] = dataclasses.field(init=False, repr=False, compare=False)
    lines: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        operation = pathlib.Path(self.path).stem
        records = read_records(self.path)
        examples = []
        for number, record in records:
            where = f"{self.path}, line {number}"
            examples.append(
                tasks.Example(
                    prompt=self.shots + render(self.prompt, record, where),
                    completion=render(self.completion, record, where),
                    metadata={"operation": operation, **record},
                )
            )
        object.__setattr__(self, "examples", tuple(examples))
        object.__setattr__(self, "lines", tuple(number for number, _ in records))

    def where(self, index: int) -> str:
        """File and line of an example."""
        return f"{self.path}, line {self.lines[index]}"

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """Whatever `scorer` gives."""
        return self.scorer(example, completion)


# ---- GSM8K ------------------------------------------------------------------------------------


def final_number(text: str) -> decimal.Decimal | None:
    """The answer of a worked solution, or None where it has no number.

    This is the first number after the first "####" (a model may go on with another problem), and
    without such a number the last one of the text. Thousands commas, a dollar sign and a full stop
    after the number are dropped.
    """
    _, _, answer = text.partition("####")
    if match := _NUMBER.search(answer):
        number = match[0]
    elif numbers := _NUMBER.findall(text):
        number = numbers[-1]
    else:
        return None
    return decimal.Decimal(number.replace(",", "").replace("$", ""))


def score_final_number(example: tasks.Example, completion: str) -> dict[str, float]:
    """1.0 where both texts end in the same number (18 and 18.00 are the same)."""
    predicted = final_number(completion)
    return {"score": float(predicted is not None and predicted == final_number(example.completion))}


def gsm8k(path: str | os.PathLike[str]) -> JsonlTask:
    """Grade-school maths (`question`, `answer`), scored by the final number."""
    return JsonlTask(path, "Question: {question}\nAnswer:", " {answer}", score_final_number)


# ---- MBPP -------------------------------------------------------------------------------------


def extract_code(completion: str) -> str:
    """The program in an answer: up to "[DONE]", inside the first code fence where there is one."""
    code = completion.partition("[DONE]")[0]
    if fence := re.search(r"```(?:python|py)?[ ]*\n(.*?)(?:```|\Z)", code, flags=re.DOTALL):
        return fence[1]
    return code


def _parse(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model's odd escape sequences are not our concern
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _called_names(code: str) -> set[str]:
    """Plain names that are called in `code`, without Python's built-in ones."""
    tree = _parse(code)
    calls = ast.walk(tree) if tree else ()
    names = {
        node.func.id
        for node in calls
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return names - set(dir(builtins))


def score_python_syntax(example: tasks.Example, completion: str) -> dict[str, float]:
    """Whether the answer is Python that defines what the tests call. Nothing is executed.

    This is a *syntax-level* score: it says that a program of the right name was written, not that
    it is correct, and it is an upper bound of the usual pass rate.

    Returns:
        "parses": 1.0 where the code is valid Python. "score": 1.0 where it also defines, at its top
        level, every name that all tests in `example.metadata["test_list"]` call.
    """
    tree = _parse(extract_code(completion))
    if tree is None:
        return {"score": 0.0, "parses": 0.0}
    defined = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    tests = map(str, example.metadata["test_list"])
    wanted = set.intersection(*map(_called_names, tests))
    return {"score": float(wanted <= defined), "parses": 1.0}


def mbpp(
    path: str | os.PathLike[str], shots_path: str | os.PathLike[str] | None = None
) -> JsonlTask:
    """Short Python programs from a sentence and three tests, in the format of arXiv:2108.07732.

    Scored by syntax only, see `score_python_syntax`.

    Args:
        path: the file.
        shots_path: a file of solved examples, of which the second to fourth are shown before every
            prompt, as evaluation harnesses do; None: nothing is shown.
    """
    shots = ""
    if shots_path is not None:
        solved = mbpp(shots_path).examples[1:4]
        shots = "".join(f"{example.prompt}{example.completion}\n\n" for example in solved)
    return JsonlTask(
        path,
        "You are an expert Python programmer, and here is your task: {text} Your code should pass "
        "these tests:\n\n{test_list[0]}\n{test_list[1]}\n{test_list[2]}\n[BEGIN]\n",
        "{code}\n[DONE]",
        score_python_syntax,
        shots,
    )
