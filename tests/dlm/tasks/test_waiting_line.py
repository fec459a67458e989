import collections
import json
import pathlib
import re

import pytest

from dlm import tasks
from dlm.tasks import waiting_line
from dlm.tasks.parallel_bench import load_parallel_bench
from tests.lib.paths import SHARED

DATA = SHARED / "data" / "parallel_bench"

A, B, C, D = "Alice Adams", "Bruno Baker", "Clara Carter", "Daniel Dixon"
NEW = "Zoe Garcia"


def text(*people: str) -> str:
    return "[" + ", ".join(f'"{person}"' for person in people) + "]"


def score(operation, people, answer, gold=None, person=None):
    example = tasks.Example(
        prompt="",
        completion=text(*(gold or ())),
        metadata={"operation": operation, "people": people, "person": person, "index": None},
    )
    return tuple(waiting_line.score_line(example, answer).values())


RIGHT, LOOSE, WRONG = (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)


# ---- Scorers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('["Alice Adams", "Bruno Baker"]', RIGHT),
        ('\n ["Alice Adams", "Bruno Baker"] \n', RIGHT),
        ('Here is the list: ["Alice Adams", "Bruno Baker"]. Done', RIGHT),
        ('["Clara Carter"] no: ["Alice Adams", "Bruno Baker"]', RIGHT),  # the last list counts
        ('["Alice Adams", "Bruno Baker"] ["Alice Adams"]', WRONG),
        ('["Alice Adams","Bruno Baker"]', LOOSE),  # no space after the comma
        ('["Alice Adams",  "Bruno Baker"]', LOOSE),
        ("[Alice Adams, Bruno Baker]", LOOSE),  # no quotes
        ('["Alice Adams, "Bruno Baker"]', LOOSE),  # a missing quote
        ('["Alice Adams", "Bruno Baker]', LOOSE),
        ('"Alice Adams", "Bruno Baker"', LOOSE),  # no brackets
        ('["Alice Adams", "Bruno Baker"', LOOSE),
        ('"Alice Adams", "Bruno Baker"]', LOOSE),
        ('["Alice Adams", "Bruno Baker", ]', LOOSE),
        ('["Alice" Adams", "Bruno Baker"]', WRONG),
        ("['Alice Adams', 'Bruno Baker']", WRONG),  # only double quotes are known
        ('["Bruno Baker", "Alice Adams"]', WRONG),
        ('["Alice Adams"]', WRONG),
        ('["Alice Adams", "Alice Adams"]', WRONG),
        ('["Alice Adams", "Bruno Baker", "Bruno Baker"]', WRONG),
        ("[]", WRONG),
        ("", WRONG),
    ],
)
def test_reading_of_lists(answer, expected):
    assert score("copy", (A, B), answer, gold=(A, B)) == expected


@pytest.mark.parametrize(
    ("operation", "gold", "wrong"),
    [
        ("copy", (B, A, C), (A, B, C)),
        ("reverse", (C, A, B), (B, A, C)),
        ("sort", (A, B, C), (C, B, A)),
        ("insert_index", (B, NEW, A, C), (B, A, NEW, C)),
        ("remove_index", (B, C), (A, C)),
        ("replace_index", (B, A, NEW), (B, NEW, C)),
    ],
)
def test_one_right_answer(operation, gold, wrong):
    assert score(operation, (B, A, C), text(*gold), gold, NEW) == RIGHT
    assert score(operation, (B, A, C), text(*wrong), gold, NEW) == WRONG
    assert score(operation, (B, A, C), text(*gold).replace('"', ""), gold, NEW) == LOOSE


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((B, A, C), RIGHT),
        ((C, B, A), RIGHT),
        ((A, B, C), WRONG),  # the original order
        ((B, A), WRONG),
        ((B, A, A), WRONG),  # a name twice, one missing
        ((B, A, C, C), WRONG),
        ((B, A, D), WRONG),
    ],
)
def test_shuffle(answer, expected):
    assert score("shuffle", (A, B, C), text(*answer), gold=(B, C, A)) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((NEW, A, B), RIGHT),
        ((A, NEW, B), RIGHT),
        ((A, B, NEW), RIGHT),
        ((A, B), WRONG),
        ((B, NEW, A), WRONG),
        ((A, NEW, NEW, B), WRONG),  # only the first is taken away
        ((A, NEW), WRONG),
        ((A, D, B), WRONG),
    ],
)
def test_insert_random(answer, expected):
    assert score("insert_random", (A, B), text(*answer), (A, B, NEW), NEW) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((A, B), RIGHT),
        ((A, C), RIGHT),
        ((B, C), RIGHT),
        ((C, B), WRONG),  # order lost
        ((A,), WRONG),  # two removed
        ((A, B, C), WRONG),  # none removed
        ((A, A), WRONG),
        ((A, D), WRONG),
        ((A, B, B), WRONG),  # the right length, and one is missing, but nobody left
    ],
)
def test_remove_random(answer, expected):
    assert score("remove_random", (A, B, C), text(*answer), (B, C)) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((NEW, B, C), RIGHT),
        ((A, NEW, C), RIGHT),
        ((A, B, NEW), RIGHT),
        ((A, B, C), WRONG),
        ((A, NEW, NEW), WRONG),  # the first NEW is at 1, so position 2 must be unchanged
        ((NEW, A, C), WRONG),
        ((A, NEW), WRONG),
        ((A, B, C, NEW), WRONG),
        ((A, D, C), WRONG),
    ],
)
def test_replace_random(answer, expected):
    assert score("replace_random", (A, B, C), text(*answer), (NEW, B, C), NEW) == expected


def test_replace_random_uses_the_first_index():
    """It shows only where the new person is in the line already, as a published file might."""
    assert score("replace_random", (A, NEW, C), text(NEW, NEW, C), (A, NEW, NEW), NEW) == RIGHT


# ---- Generator --------------------------------------------------------------------------------


def test_names():
    first, last = waiting_line.FIRST_NAMES, waiting_line.LAST_NAMES
    assert len(first) == len(last) == 64
    assert len({*first, *last}) == 128
    assert all(re.fullmatch("[A-Z][a-z]+", name) for name in (*first, *last))


def expected_answer(operation, people, person, index):
    """Gold of the operations with one right answer, from the card's table."""
    answer = list(people)
    match operation:
        case "reverse":
            answer.reverse()
        case "sort":
            answer.sort()
        case "insert_index":
            answer.insert(index, person)
        case "remove_index":
            del answer[index]
        case "replace_index":
            answer[index] = person
    return answer


def test_questions_and_answers():
    task = waiting_line.WaitingLine(num_shots=0, seed=3)
    lengths: collections.Counter[int] = collections.Counter()
    indices: dict[str, set[tuple[int, int]]] = collections.defaultdict(set)
    for i in range(600):
        example = task[i]
        operation, people, person, index = (
            example.metadata[key] for key in ("operation", "people", "person", "index")
        )
        assert operation == waiting_line.OPERATIONS[i % 10]
        lengths[len(people)] += 1
        assert len(set(people)) == len(people) and person not in people
        assert (person is not None) == operation.startswith(("insert", "replace"))
        assert (index is not None) == operation.endswith("_index")
        assert example.prompt.count(text(*people)) == 1
        assert person is None or f'"{person}"' in example.prompt
        assert index is None or f"position {index} " in example.prompt
        assert example.prompt.endswith("Answer with the final list only.\n")
        if index is not None:
            indices[operation].add((len(people), index))
        if "random" not in operation and operation != "shuffle":
            assert example.completion == text(*expected_answer(operation, people, person, index))
        assert task.score(example, example.completion) == {"score": 1.0, "score_strict": 1.0}
    assert set(lengths) == {3, 4, 5, 6} and min(lengths.values()) > 100
    assert {i for n, i in indices["insert_index"] if n == 3} == {0, 1, 2, 3}
    assert {i for n, i in indices["remove_index"] if n == 3} == {0, 1, 2}
    assert {i for n, i in indices["replace_index"] if n == 3} == {0, 1, 2}


@pytest.mark.parametrize(
    ("operation", "num_answers"),
    [("shuffle", 5), ("insert_random", 4), ("remove_random", 3), ("replace_random", 3)],
)
def test_answers_are_uniform(operation, num_answers):
    task = waiting_line.WaitingLine(
        operations=(operation,), min_people=3, max_people=3, num_shots=0, num_examples=1500
    )
    counts: collections.Counter[tuple[int, ...]] = collections.Counter()
    for i in range(len(task)):
        example = task[i]
        people = example.metadata["people"]
        answer = waiting_line.parse_list_strict(example.completion)
        assert answer is not None
        counts[tuple(people.index(name) if name in people else -1 for name in answer)] += 1
    assert len(counts) == num_answers
    expected = len(task) / num_answers
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 18.5  # 0.1 % level of 4 degrees of freedom


def test_shots_are_answered_training_examples():
    task = waiting_line.WaitingLine(num_shots=2, split="test", seed=1)
    train = waiting_line.WaitingLine(num_shots=0, split="train")
    for i in range(50):
        example = task[i]
        *shots, last = example.prompt.split("User:\n")[1:]
        assert len(shots) == 2 and last.endswith("\nAssistant:\n")
        assert text(*example.metadata["people"]) in last
        for shot in shots:
            question, _, answer = shot.removesuffix("\n\n").partition("Assistant:\n")
            lines = question.splitlines()
            people = waiting_line.parse_list_strict(lines[2])
            assert people is not None
            asked = train.ask(
                example.metadata["operation"],
                people,
                *([int(re.findall(r"position (\d)", lines[1])[0])] if "(" in lines[1] else [None]),
                *(re.findall(r'"(.+?)"', lines[1]) or [None]),
            )
            assert asked.prompt == question
            assert train.score(asked, answer) == {"score": 1.0, "score_strict": 1.0}
            assert waiting_line.splits.split_of(", ".join(sorted(people))) == "train"


def test_operations_cycle_and_do_not_change_the_pieces():
    task = waiting_line.WaitingLine(operations=("sort", "shuffle"), num_shots=0)
    assert [task[i].metadata["operation"] for i in range(4)] == ["sort", "shuffle"] * 2
    assert task.pieces == waiting_line.WaitingLine(split="test", seed=5, max_people=9).pieces


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operations": ()}, r"operations=\(\) must be a non-empty tuple"),
        ({"operations": "copy"}, "operations='copy' must be a non-empty tuple"),
        ({"operations": ("copy", "swap")}, "operation='swap' must be one of copy, reverse, sort"),
        ({"min_people": 1}, r"min_people=1 must be in \[2, max_people=6\]"),
        ({"min_people": 7}, r"min_people=7 must be in \[2, max_people=6\]"),
        ({"num_first_names": 65}, r"num_first_names=65 must be in \[2, 64\]"),
        ({"num_last_names": 1}, r"num_last_names=1 must be in \[2, 64\]"),
        (
            {"num_first_names": 4, "num_last_names": 5},
            "num_first_names . num_last_names = 20 must be at least 24 for max_people=6",
        ),
        ({"num_shots": -1}, "num_shots=-1 must be at least 0"),
        ({"split": "dev"}, "split='dev' must be 'train' or 'test'"),
    ],
)
def test_bad_fields(options, message):
    with pytest.raises(ValueError, match=message):
        waiting_line.WaitingLine(**options)


# ---- One's own list ---------------------------------------------------------------------------


def test_ask():
    task = waiting_line.WaitingLine(operations=("copy",), num_shots=0)
    assert task.ask("replace_index", [A, B, C], 2, NEW).completion == text(A, B, NEW)
    assert task.ask("insert_index", [A, B], index=2, person=NEW).completion == text(A, B, NEW)
    assert task.ask("remove_index", [A, B], index=0).completion == text(B)
    assert task.ask("sort", [C, A, B]).completion == text(A, B, C)
    asked = task.ask("shuffle", [A, B, C, D])
    assert asked == task.ask("shuffle", (A, B, C, D))
    assert task.score(asked, asked.completion) == {"score": 1.0, "score_strict": 1.0}
    with_shot = waiting_line.WaitingLine().ask("shuffle", [A, B, C, D])
    assert with_shot.prompt.startswith("User:\n") and asked.prompt in with_shot.prompt


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("swap", [A, B]), ValueError, "operation='swap' must be one of copy, reverse"),
        (("copy", A), TypeError, "must be a list of names, not one string"),
        (("copy", [A]), ValueError, "people has 1 names; it must have at least 2"),
        (
            ("copy", [A, "Alicia Adams"]),
            ValueError,
            r"people\[1\]='Alicia Adams' .* 32 known first",
        ),
        (("copy", [A, "Bruno Bakker"]), ValueError, r"'Bruno Bakker' .* 32 known last .* Baker,"),
        (("copy", [A, "Bruno"]), ValueError, r"people\[1\]='Bruno' must end with"),
        (("copy", [A, "Amy Adams"]), ValueError, "Amy"),  # name 33, while 32 are used
        (("copy", [A, B, A]), ValueError, r"people\[2\]='Alice Adams' is in the list twice"),
        (("copy", [A, B], 0), ValueError, "index=0 must be left out for operation 'copy'"),
        (("copy", [A, B], None, NEW), ValueError, "person='Zoe Garcia' must be left out"),
        (("remove_index", [A, B]), ValueError, r"index=None must be in \[0, 1\]"),
        (("remove_index", [A, B], 2), ValueError, r"index=2 must be in \[0, 1\] .* 2 people"),
        (("insert_index", [A, B], 3, NEW), ValueError, r"index=3 must be in \[0, 2\]"),
        (("insert_index", [A, B], -1, NEW), ValueError, r"index=-1 must be in \[0, 2\]"),
        (("insert_random", [A, B], None, None), ValueError, "person=None must be the new person"),
        (("insert_random", [A, B], 1, NEW), ValueError, "index=1 must be left out"),
        (("replace_random", [A, B], None, "Zoe X"), ValueError, "person='Zoe X' must end with"),
        (("replace_random", [A, B], None, B), ValueError, "must not be in the line already"),
    ],
)
def test_ask_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        waiting_line.WaitingLine(num_shots=0).ask(*arguments)


# ---- Published files --------------------------------------------------------------------------

CONFIG = """
family/remove_random:
  prompt: 'Somebody left:

    {context}

    Who is there?

    '
family/oddly_named:
  name: family/replace_index
  prompt: '{context}: {word} is now at {index}.'
"""


def write_published(folder: pathlib.Path, name: str, *records: object) -> pathlib.Path:
    (folder / "task_config.yaml").write_text(CONFIG)
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_load_parallel_bench_form(tmp_path):
    shot = {"input": {"context": text(C, D)}, "answer": {"example": text(D)}}
    record = {
        "input": {"context": text(A, B), "icl_examples": [shot]},
        "answer": {"input": [A, B], "example": text(A)},
    }
    path = write_published(tmp_path, "remove_random", record)
    task = load_parallel_bench(path)
    example = task[0]
    assert len(task) == 1
    assert example.prompt == (
        f"User:\nSomebody left:\n{text(C, D)}\nWho is there?\nAssistant:\n{text(D)}\n\n"
        f"User:\nSomebody left:\n{text(A, B)}\nWho is there?\nAssistant:\n"
    )
    assert example.completion == text(A)
    assert task.score(example, text(B)) == {"score": 1.0, "score_strict": 1.0}
    assert task.score(example, text(A, B)) == {"score": 0.0, "score_strict": 0.0}
    bare = load_parallel_bench(path, num_shots=0)[0]
    assert bare.prompt == f"Somebody left:\n{text(A, B)}\nWho is there?\n"


def test_load_parallel_bench_errors(tmp_path):
    good = {"input": {"context": text(A, B)}, "answer": text(A)}
    path = write_published(tmp_path, "remove_random", good, {"input": {}})
    with pytest.raises(ValueError, match=r"num_shots=1 must be at most 0, the number .*line 1"):
        load_parallel_bench(path)
    with pytest.raises(ValueError, match="num_shots=-1 must be at least 0"):
        load_parallel_bench(path, num_shots=-1)
    with pytest.raises(ValueError, match=r"remove_random\.jsonl, line 2: .*'answer'"):
        load_parallel_bench(path, num_shots=0)
    with pytest.raises(ValueError, match="must have an entry for 'replace_index'"):
        load_parallel_bench(path, "replace_index")  # found by key, not by name
    with pytest.raises(ValueError, match="operation='swap' must be one of"):
        load_parallel_bench(path, "swap")
    with pytest.raises(FileNotFoundError, match=r"copy\.jsonl' is not a file"):
        load_parallel_bench(path.with_name("copy.jsonl"), "remove_random")
    (tmp_path / "task_config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"task_config\.yaml is missing"):
        load_parallel_bench(path)


def test_published_files():
    files = sorted(DATA.glob("waiting_line*/*.jsonl"))
    if not files:
        pytest.skip("shared data is absent")
    for file in files:
        task = load_parallel_bench(file)
        assert len(task) == 100
        for example in task.examples:
            metadata = example.metadata
            assert metadata["operation"] == file.stem
            assert example.prompt.count("\nAssistant:\n") == 2
            assert "{" not in example.prompt
            assert task.score(example, example.completion) == {"score": 1.0, "score_strict": 1.0}
            assert task.score(example, example.completion[:-1]) == {
                "score": 1.0,
                "score_strict": 0.0,
            }
            if "random" not in file.stem:
                answer = expected_answer(
                    file.stem, metadata["people"], metadata["person"], metadata["index"]
                )
                assert example.completion == text(*answer)
            if file.stem not in ("copy", "sort"):
                assert task.score(example, text(*metadata["people"]))["score"] == 0.0
