"""Task files: data sets that lie in a folder, exported tasks, their scorers."""

import json

import pytest
import yaml

from decode.evaluation import scoring, task_files
from decode.evaluation.task_files import LOCAL, export_task, write_local_tasks
from dlm.tasks.presets import TASKS
from tests.lib.paths import SHARED
from tests.lib.tiers import more

DATA = SHARED / "data"
needs = lambda name: pytest.mark.skipif(
    not (DATA / name).is_dir(), reason=f"the data set {name} lies not beside the repository"
)


class Loader(yaml.SafeLoader):
    """Of the harness's kind: functions are named."""


Loader.add_constructor("!function", lambda loader, node: f"!function {node.value}")


def read(path):
    return yaml.load(path.read_text(), Loader)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def function(said):
    """What a task file names."""
    module, name = said.removeprefix("!function ").rsplit(".", 1)
    assert module == "decode.evaluation.scoring"
    return getattr(scoring, name)


@pytest.mark.parametrize("name", [*TASKS])
def test_an_exported_task_scores_as_the_task_does(name, tmp_path):
    export_task(name, tmp_path, num_examples=5)
    config, docs = read(tmp_path / f"{name}.yaml"), lines(tmp_path / f"{name}.test.jsonl")
    files = config["dataset_kwargs"]["data_files"]
    assert files == {s: str(tmp_path / f"{name}.{s}.jsonl") for s in ("train", "test")}
    assert len(docs) == 5 and len(lines(tmp_path / f"{name}.train.jsonl")) == 32
    assert config["generation_kwargs"]["max_gen_toks"] == TASKS[name].gen_len
    task = TASKS[name].make(split="test").first(5)
    score = function(config["process_results"])
    for i, doc in enumerate(docs):
        assert (doc["prompt"], doc["completion"]) == (task[i].prompt, task[i].completion)
        for text in (doc["completion"], "nonsense", docs[i - 1]["completion"]):
            assert score(doc, [text]) == {"score": task.score(task[i], text)["score"]}
        assert score(doc, [doc["completion"]]) == {"score": 1.0}
        stops = config["generation_kwargs"]["until"]
        assert not any(stop in doc["completion"] for stop in stops)


def test_choices_have_the_right_one_among_them(tmp_path):
    export_task("word_problems", tmp_path, num_examples=40, num_choices=4)
    config = read(tmp_path / "word_problems_choice.yaml")
    assert config["task"] == "word_problems_choice" and config["output_type"] == "multiple_choice"
    docs = lines(tmp_path / "word_problems_choice.test.jsonl")
    for doc in docs:
        assert doc["choices"][doc["label"]] == doc["completion"]
        assert len(set(doc["choices"])) == 4
    assert {doc["label"] for doc in docs} == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="num_choices=1 must be at least 2, or 0"):
        export_task("word_problems", tmp_path, num_choices=1)
    with pytest.raises(ValueError, match=r"num_choices=60 must be at most \d+: so many answers"):
        export_task("word_problems", tmp_path, num_choices=60)


def test_exports_without_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no task 'word_problem'; there are waiting_line"):
        export_task("word_problem", tmp_path)
    with pytest.raises(ValueError, match=r"num_examples=0 must be in \[1, "):
        export_task("word_problems", tmp_path, num_examples=0)


def test_local_tasks_say_where_their_data_are(tmp_path):
    """In whatever folder: names of data sets decide, and nothing is copied."""
    data, out = tmp_path / 'a "quoted" folder', tmp_path / "out"
    for name in ("mbpp", "svamp"):
        (data / name).mkdir(parents=True)
    assert write_local_tasks(data, out) == ["mbpp_local", "svamp_local"]
    assert sorted(path.name for path in out.iterdir()) == ["mbpp.yaml", "svamp.yaml"]
    config = read(out / "mbpp.yaml")
    assert config["dataset_kwargs"]["data_files"]["test"] == f"{data}/mbpp/test_dev.jsonl"
    with pytest.raises(FileNotFoundError, match=f"has none of the folders {', '.join(LOCAL)}"):
        write_local_tasks(tmp_path / "out", tmp_path)


@pytest.mark.parametrize("name", LOCAL)
def test_files_of_local_tasks_are_there(name, tmp_path):
    if not DATA.is_dir():
        pytest.skip("the data sets lie not beside the repository")
    write_local_tasks(DATA, tmp_path)
    config = read(tmp_path / f"{name}.yaml")
    assert config["task"] == f"{name}_local"
    for file in config["dataset_kwargs"]["data_files"].values():
        assert task_files.pathlib.Path(file).is_file(), file


@needs("humaneval")
@pytest.mark.parametrize("task", [0, *more(*range(1, 82))])
def test_reference_solutions_of_humaneval_pass(task):
    doc = lines(DATA / "humaneval" / "dev.jsonl")[task]
    assert scoring.humaneval(doc, [doc["canonical_solution"]]) == {"pass@1": 1.0}
    assert scoring.humaneval(doc, ["    return None\n"]) == {"pass@1": 0.0}


@needs("mbpp")
@pytest.mark.parametrize("task", [0, 178, *more(*(i for i in range(250) if i not in (0, 178)))])
def test_reference_programs_of_mbpp_pass(task):
    """Number 178 is the one that needs what is set up for its tests."""
    doc = lines(DATA / "mbpp" / "test_dev.jsonl")[task]
    assert scoring.mbpp(doc, [doc["code"]]) == {"pass@1": 1.0}
    assert scoring.mbpp(doc, ["pass"]) == {"pass@1": 0.0}


def test_programs_are_run_with_what_comes_with_them():
    doc = {"test_setup_code": "a = 1", "test_list": ["assert f() == 1", "assert a == 1"]}
    assert scoring.mbpp(doc, ["def f(): return 1"]) == {"pass@1": 1.0}
    assert scoring.mbpp(doc, ["def f(): return 2"]) == {"pass@1": 0.0}
    doc = {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "f"}
    assert scoring.humaneval(doc, ["    return 1"]) == {"pass@1": 1.0}
    assert scoring.humaneval(doc, ["    return 2"]) == {"pass@1": 0.0}
