"""Comparing methods: statistics by hand, the table of methods, runs on an untrained model."""

import csv
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest

import dlm
from decode.diffusion.points import FAMILIES, METHODS, family_of, named, override
from dlm.params import init_params
from dlm.presets import PRESETS
from dlm.tasks.scan import Scan
from dlm.tasks.waiting_line import WaitingLine
from dlm.tokenizer import word_tokenizer
from scripts import compare, measuring
from tests.lib.paths import ROOT


def untrained(task) -> dlm.LanguageModel:
    tokenizer = word_tokenizer(task.pieces)
    cfg = dataclasses.replace(
        PRESETS["tiny"],
        n_kv_heads=4,
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return dlm.LanguageModel(init_params(jax.random.key(0), cfg), cfg, tokenizer)


@pytest.fixture(scope="module")
def lm() -> dlm.LanguageModel:
    return untrained(WaitingLine())


@pytest.fixture(scope="module")
def model_path(lm, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("compare") / "model"
    dlm.save(path, lm)
    return path


@pytest.fixture(scope="module")
def job(lm) -> measuring.Job:
    preset = measuring.TASKS["waiting_line"]
    return measuring.make_job(lm, preset, num_examples=10, block_len=4, gen_len=8, batch_size=4)


# ---- Statistics --------------------------------------------------------------------------------


def test_aup_by_hand():
    points = [(4.0, 72.0), (1.0, 80.0), (2.0, 78.0)]  # 72 is more than 5 below 80: dropped
    weight = math.exp(-3 * (1 - 78 / 80))
    expected = 1 * 80 + (2 - 1) * (78 * weight + 80 * 1) / 2
    assert compare.aup(points, best=80) == pytest.approx(expected)
    assert compare.aup([(3.0, 50.0)], best=100) == 150  # left of the slowest point: no weight
    assert compare.aup([(1.0, 0.0), (2.0, 0.0)], best=0) == 0
    # Somebody else's better answers make these worth less.
    assert compare.aup(points, best=100) < expected


def test_bootstrap_interval():
    low, high = measuring.bootstrap([0.0, 1.0] * 100)
    sigma = 0.5 / math.sqrt(200)
    assert low == pytest.approx(0.5 - 1.96 * sigma, abs=0.015)
    assert high == pytest.approx(0.5 + 1.96 * sigma, abs=0.015)
    assert measuring.bootstrap([1.0] * 7) == (1.0, 1.0)
    assert measuring.bootstrap([0.0, 1.0] * 100) == (low, high)  # the same seed
    narrow = measuring.bootstrap([0.0, 1.0] * 1000)
    assert narrow[1] - narrow[0] < 0.5 * (high - low)


def test_summary_of_two_points_by_hand():
    point = lambda label, family: measuring.Point(label, family, named("one_per_step", 4))
    points = [point("one_per_step", "quota"), point("fast", "quota"), point("other", "other")]
    record = lambda score, forwards, seconds: {
        "score": score, "tokens": [4, 8], "forwards": forwards, "first_block_s": [0.1, 0.3],
        "seconds": seconds, "compile_s": 1.5,
    }  # fmt: skip
    records = [
        record([1, 1], [4, 8], 6.0), record([1, 0], [2, 2], 2.0), record([1, 1], [6, 6], 3.0)
    ]  # fmt: skip
    rows, areas = compare.summarise(points, records, {"all": [0, 1], "second": [1]})
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
    points, left_out = compare.make_points(job, methods_file=str(tmp_path / name))
    assert [(p.label, p.family) for p in points] == [
        ("one_per_step", "quota"), ("low", "threshold"), ("klass", "klass")
    ]  # fmt: skip
    assert float(points[1].method.rule.threshold) == 0.25 and not left_out


def test_labels_say_what_was_changed(job, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "- {name: threshold, rule: {threshold: 0.8}, scheduler: {block_len: 2}}\n"
        "- {name: threshold, family: cached, cache: dual}\n"
    )
    points, _ = compare.make_points(job, methods_file=str(tmp_path / "mine.yaml"))
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
        compare.make_points(job, methods_file=str(tmp_path / "mine.yaml"))
    assert "\n" not in str(error.value)


def test_default_is_every_method_that_the_model_allows(job):
    points, left_out = compare.make_points(job, delimiter='", "')
    assert [p.label for p in points] == list(METHODS) and not left_out
    points, left_out = compare.make_points(job)
    assert left_out == [left_out[0]] and "adablock is left out: delimiter_ids" in left_out[0]
    with pytest.raises(ValueError, match="adablock: delimiter_ids is empty"):
        compare.make_points(job, ["adablock"])


def test_jobs_that_make_no_sense(lm):
    preset = measuring.TASKS["waiting_line"]
    with pytest.raises(ValueError, match="must be at most"):
        measuring.make_job(lm, preset, num_examples=10**6, block_len=4)
    with pytest.raises(ValueError, match="gen_len=1000 are more than the model's max_seq_len"):
        measuring.make_job(lm, preset, num_examples=2, block_len=4, gen_len=1000)
    with pytest.raises(ValueError):  # another task's words
        measuring.make_job(lm, measuring.TASKS["scan"], num_examples=2, block_len=4)


def test_groups(job):
    assert {group: len(members) for group, members in job.groups.items()} == {
        "all": 10, "one right answer": 5, "many right answers": 4
    }  # fmt: skip
    scan = measuring.make_job(
        untrained(Scan()), measuring.TASKS["scan"], num_examples=50, block_len=4, gen_len=8
    )
    assert list(scan.groups) == ["all", "after", "and"] and scan.batch_size == 50


# ---- Runs --------------------------------------------------------------------------------------


def test_measured_points_are_not_measured_again(job, model_path, tmp_path, monkeypatch):
    points, _ = compare.make_points(job, ["threshold", "threshold_0.7"])
    log, decoded = tmp_path / "measured.jsonl", []
    measure = measuring.measure
    monkeypatch.setattr(
        measuring, "measure", lambda job, *rest: decoded.append(rest) or measure(job, *rest)
    )
    first = measuring.run(job, points, log)
    assert len(decoded) == 3 and len(first[0]["score"]) == 10
    assert all(n == 8 for n in first[0]["forwards"])  # one per step, eight tokens, untrained
    assert first[1]["compile_s"] == first[2]["compile_s"]  # one program
    assert measuring.run(job, points, log) == first and len(decoded) == 3

    # An interrupted write costs that point only; the next one starts on a line of its own.
    text = log.read_text().rstrip("\n")
    log.write_text(text[:-20])
    measuring.run(job, points, log)
    measuring.run(job, points, log)
    assert len(decoded) == 4

    # Other settings, or another checkpoint, are other measurements.
    shorter = dataclasses.replace(job, gen_len=4)
    measuring.run(shorter, points[:1], log)
    assert len(decoded) == 5
    other = dataclasses.replace(job.lm, params=jax.tree.map(lambda x: x * 1.5, job.lm.params))
    measuring.run(dataclasses.replace(job, lm=other), points[:1], log)
    assert len(decoded) == 6


def test_batches_do_not_change_answers(job, lm):
    method = named("threshold_dual_cache", 4)
    whole = measuring.measure(dataclasses.replace(job, batch_size=10), method, {})
    programs: dict = {}
    parts = measuring.measure(job, method, programs)  # batches of 4, 4 and 2
    assert len(programs) == 1
    for name in ("score", "tokens", "forwards"):
        assert whole[name] == parts[name]
    assert all(0 < s <= parts["seconds"] for s in parts["first_block_s"])


def command(*arguments: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "scripts.compare", *arguments]
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_command_writes_what_it_says(model_path, tmp_path):
    done = command(
        f"--checkpoint={model_path}", f"--out={tmp_path}", "--methods=threshold,threshold_0.5",
        "--num_examples=10", "--gen_len=8", "--block_len=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "### many right answers" in done.stdout and "### AUP per family" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in results["rows"][:3]] == [
        "one_per_step", "threshold", "threshold_0.5"
    ]  # fmt: skip
    assert results["rows"][0]["speedup"] == 1 and set(results["aup"]) == {"quota", "threshold"}
    with (tmp_path / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(results["rows"]) == 9
    assert (tmp_path / "speed_quality.png").read_bytes().startswith(b"\x89PNG")
    assert len([x for x in (tmp_path / "measured.jsonl").read_text().splitlines() if x]) == 3


@pytest.mark.slow
def test_command_says_what_is_wrong(model_path, tmp_path):
    done = command(f"--checkpoint={model_path}", f"--out={tmp_path}", "--methods=treshold")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "error: there is no method 'treshold'; close: threshold" in done.stderr
