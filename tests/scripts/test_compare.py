"""Comparing methods: the summary by hand, the table of methods, runs on an untrained model."""

import csv
import json
import pathlib

import pytest

import dlm
from decode.diffusion.points import FAMILIES, METHODS, family_of, named, override
from decode.evaluation.job import Job, Point, make_job
from dlm.tasks.presets import TASKS
from dlm.tasks.waiting_line import WaitingLine
from scripts.compare.points import make_points
from scripts.compare.report import summarise
from tests.lib.mains import run_main
from tests.lib.untrained import untrained


@pytest.fixture(scope="module")
def lm() -> dlm.LanguageModel:
    return untrained(WaitingLine())


@pytest.fixture(scope="module")
def model_path(lm, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("compare") / "model"
    dlm.save(path, lm)
    return path


@pytest.fixture(scope="module")
def job(lm) -> Job:
    preset = TASKS["waiting_line"]
    return make_job(lm, preset, num_examples=10, block_len=4, gen_len=8, batch_size=4)


# ---- Summary -----------------------------------------------------------------------------------


def test_summary_of_two_points_by_hand():
    point = lambda label, family: Point(label, family, named("one_per_step", 4))
    points = [point("one_per_step", "quota"), point("fast", "quota"), point("other", "other")]
    record = lambda score, forwards, seconds: {
        "score": score, "tokens": [4, 8], "forwards": forwards, "first_block_s": [0.1, 0.3],
        "seconds": seconds, "compile_s": 1.5,
    }  # fmt: skip
    records = [
        record([1, 1], [4, 8], 6.0), record([1, 0], [2, 2], 2.0), record([1, 1], [6, 6], 3.0)
    ]  # fmt: skip
    rows, areas = summarise(points, records, {"all": [0, 1], "second": [1]})
    assert [row["method"] for row in rows] == ["one_per_step", "fast", "other"] * 2
    fast = rows[1]
    assert (fast["accuracy"], fast["nfe"], fast["tokens_per_forward"]) == (50, 2, 3)
    assert (fast["speedup"], fast["tokens_per_s"], fast["compile_s"]) == (3, 6, 1.5)
    assert fast["first_block_s"] == pytest.approx(0.2)
    assert rows[4]["accuracy"] == 0 and rows[4]["tokens_per_forward"] == 4
    assert areas["quota"] == {"all": 100, "second": 100}
    assert areas["other"] == pytest.approx({"all": 100, "second": 400 / 3})


# ---- Methods -----------------------------------------------------------------------------------


def test_every_name_is_there_once_and_gives_a_method(lm):
    assert len(METHODS) == sum(map(len, FAMILIES.values()))
    for name in METHODS:
        for block_len in (1, 8):
            method = named(name, block_len)
            if name != "adablock":  # wants delimiters
                method.validate(lm.cfg)
        assert name in FAMILIES[family_of(name)]


def test_unknown_names_get_close_ones():
    with pytest.raises(ValueError, match=r"no method 'treshold'; close: threshold") as error:
        named("treshold", 8)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="there are one_per_step, quota_2"):
        named("qqqqqqq", 8)
    with pytest.raises(ValueError, match="block_len=0 must be at least 1"):
        named("threshold", 0)


def test_override_changes_numbers_and_components():
    method = override(
        named("threshold", 8),
        {
            "rule": {"threshold": 0.8}, "scheduler": {"block_len": None}, "cache": "dual",
            "temperature": 0.5,
        },
    )  # fmt: skip
    assert float(method.rule.threshold) == 0.8 and method.scheduler.block_len is None
    assert type(method.cache).__name__ == "DualCache" and method.temperature == 0.5
    method = override(named("adablock", 8), {"scheduler": {"delimiter_ids": [3, 4]}})
    assert method.scheduler.delimiter_ids == (3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rle": {}}, r"a method has no field 'rle'; it has scheduler, cache"),
        ({"rule": {"treshold": 1}}, r"rule \(Threshold\) has no field 'treshold'; it has .*thresh"),
        ({"rule": {"threshold": "1e-3"}}, r"rule.threshold='1e-3' must be a number"),
        ({"rule": {"threshold": None}}, r"rule.threshold=None must be a number"),
        ({"rule": {"threshold": True}}, r"rule.threshold=True must be a number"),
        ({"scheduler": {"aligned": 1}}, r"scheduler.aligned=1 must be true or false"),
        ({"scheduler": {"block_len": 2.5}}, r"scheduler.block_len=2.5 must be a whole number"),
        ({"rule": 0.8}, r"rule=0.8 must be fields of the method's rule"),
        ({"cache": "daul"}, r"there is no cache 'daul'; close: dual"),
        ({"temperature": "warm"}, r"temperature='warm' must be a number"),
    ],
)
def test_override_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        override(named("threshold", 8), changes)
    assert "\n" not in str(error.value)


METHODS_FILES = {
    "mine.yaml": "- {name: threshold, label: low, rule: {threshold: 0.25}}\n- {name: klass}\n",
    "mine.json": '{"methods": [{"name": "threshold", "label": "low", "rule": '
    '{"threshold": 25e-2}}, {"name": "klass"}]}',
    "mine.py": "import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict("
    "{'methods': [{'name': 'threshold', 'label': 'low', 'rule': {'threshold': 0.25}}, "
    "{'name': 'klass'}]})\n",
}


@pytest.mark.parametrize("name", METHODS_FILES)
def test_methods_files(name, job, tmp_path):
    (tmp_path / name).write_text(METHODS_FILES[name])
    points, left_out = make_points(job, methods_file=str(tmp_path / name))
    assert [(p.label, p.family) for p in points] == [
        ("one_per_step", "quota"), ("low", "threshold"), ("klass", "klass")
    ]  # fmt: skip
    assert float(points[1].method.rule.threshold) == 0.25 and not left_out


def test_labels_say_what_was_changed(job, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "- {name: threshold, rule: {threshold: 0.8}, scheduler: {block_len: 2}}\n"
        "- {name: threshold, family: cached, cache: dual}\n"
    )
    points, _ = make_points(job, methods_file=str(tmp_path / "mine.yaml"))
    assert [p.label for p in points[1:]] == [
        "threshold threshold=0.8 block_len=2",
        "threshold cache=dual",
    ]
    assert [p.family for p in points[1:]] == ["threshold", "cached"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: treshold}", r"method 0 \(treshold\): there is no method 'treshold'; close"),
        ("- {name: klass, rule: {kl: 1}}", r"method 0 \(klass\): rule \(Klass\) has no field 'kl'"),
        ("- {name: threshold, rule: {threshold: 2}}", r"=2: threshold=2 must be in \[0, 1\]"),
        ("- {rule: {threshold: 2}}", r"method 0: .* must be fields, among them a name"),
        ("- {name: klass}\n- {name: klass}", r"two methods labelled 'klass'"),
        ("{}", r"must be a list of methods"),
        ("- {name: [", r"mine.yaml: while parsing"),
    ],
)  # fmt: skip
def test_wrong_methods_files(text, message, job, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        make_points(job, methods_file=str(tmp_path / "mine.yaml"))
    assert "\n" not in str(error.value)


def test_default_is_every_method_that_the_model_allows(job):
    points, left_out = make_points(job, delimiter='", "')
    assert [p.label for p in points] == list(METHODS) and not left_out
    points, left_out = make_points(job)
    assert left_out == [left_out[0]] and "adablock is left out: delimiter_ids" in left_out[0]
    with pytest.raises(ValueError, match="adablock: delimiter_ids is empty"):
        make_points(job, ["adablock"])


# ---- Runs --------------------------------------------------------------------------------------


@pytest.mark.exhaustive(every=4)
def test_command_writes_what_it_says(model_path, tmp_path):
    said = run_main(
        "scripts.compare", f"--checkpoint={model_path}", f"--out={tmp_path}",
        "--methods=threshold,threshold_0.5", "--num_examples=10", "--gen_len=8", "--block_len=4",
    )  # fmt: skip
    assert "### many right answers" in said and "### AUP per family" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in results["rows"][:3]] == [
        "one_per_step", "threshold", "threshold_0.5"
    ]  # fmt: skip
    assert results["rows"][0]["speedup"] == 1 and set(results["aup"]) == {"quota", "threshold"}
    with (tmp_path / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(results["rows"]) == 9
    assert (tmp_path / "speed_quality.png").read_bytes().startswith(b"\x89PNG")
    assert len([x for x in (tmp_path / "measured.jsonl").read_text().splitlines() if x]) == 3


def test_command_says_what_is_wrong(model_path, tmp_path):
    flags = [f"--checkpoint={model_path}", f"--out={tmp_path}", "--methods=treshold"]
    said = run_main("scripts.compare", *flags, code=1)
    assert "error: there is no method 'treshold'; close: threshold" in said
