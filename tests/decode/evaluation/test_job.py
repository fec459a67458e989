"""Jobs on an untrained model: what is asked, what is measured, and what is not measured again."""

import dataclasses

import jax
import pytest

import dlm
from decode.diffusion.points import family_of, named
from decode.evaluation import job as jobs
from decode.evaluation.job import Job, Point, make_job, measure, measure_points
from dlm.tasks.presets import TASKS
from dlm.tasks.scan import Scan
from dlm.tasks.waiting_line import WaitingLine
from tests.lib.untrained import untrained


@pytest.fixture(scope="module")
def lm() -> dlm.LanguageModel:
    return untrained(WaitingLine())


@pytest.fixture(scope="module")
def job(lm) -> Job:
    preset = TASKS["waiting_line"]
    return make_job(lm, preset, num_examples=10, block_len=4, gen_len=8, batch_size=4)


def test_jobs_that_make_no_sense(lm):
    preset = TASKS["waiting_line"]
    with pytest.raises(ValueError, match="must be at most"):
        make_job(lm, preset, num_examples=10**6, block_len=4)
    with pytest.raises(ValueError, match="gen_len=1000 are more than the model's max_seq_len"):
        make_job(lm, preset, num_examples=2, block_len=4, gen_len=1000)
    with pytest.raises(ValueError):  # another task's words
        make_job(lm, TASKS["scan"], num_examples=2, block_len=4)


def test_groups(job):
    assert {group: len(members) for group, members in job.groups.items()} == {
        "all": 10, "one right answer": 5, "many right answers": 4
    }  # fmt: skip
    scan = make_job(untrained(Scan()), TASKS["scan"], num_examples=50, block_len=4, gen_len=8)
    assert list(scan.groups) == ["all", "after", "and"] and scan.batch_size == 32


@pytest.mark.exhaustive(every=4)
def test_measured_points_are_not_measured_again(job, tmp_path, monkeypatch):
    points = [
        Point(name, family_of(name), named(name, job.block_len))
        for name in ("one_per_step", "threshold", "threshold_0.7")
    ]
    log, decoded = tmp_path / "measured.jsonl", []
    monkeypatch.setattr(
        jobs, "measure", lambda job, *rest: decoded.append(rest) or measure(job, *rest)
    )
    first = measure_points(job, points, log)
    assert len(decoded) == 3 and len(first[0]["score"]) == 10
    assert all(n == 8 for n in first[0]["forwards"])  # one per step, eight tokens, untrained
    assert first[2]["compile_s"] < 0.2 * first[1]["compile_s"]  # one program
    assert measure_points(job, points, log) == first and len(decoded) == 3

    # An interrupted write costs that point only; the next one starts on a line of its own.
    text = log.read_text().rstrip("\n")
    log.write_text(text[:-20])
    measure_points(job, points, log)
    measure_points(job, points, log)
    assert len(decoded) == 4

    # Other settings, or another checkpoint, are other measurements.
    shorter = dataclasses.replace(job, gen_len=4)
    measure_points(shorter, points[:1], log)
    assert len(decoded) == 5
    other = dataclasses.replace(job.lm, params=jax.tree.map(lambda x: x * 1.5, job.lm.params))
    measure_points(dataclasses.replace(job, lm=other), points[:1], log)
    assert len(decoded) == 6


@pytest.mark.exhaustive(every=4)
def test_rows_do_not_change_answers(job, lm):
    method = named("threshold_dual_cache", 4)
    whole = measure(dataclasses.replace(job, batch_size=10), method)
    parts = measure(job, method)  # four at a time
    for name in ("score", "tokens", "forwards"):
        assert whole[name] == parts[name]
    assert all(0 < s <= parts["seconds"] for s in parts["first_block_s"])
