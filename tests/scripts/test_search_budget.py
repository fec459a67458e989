"""Searches at equal forwards: what is counted, what is said of it, and a run on a small model."""

import json

import pytest

import dlm
from decode.complete import complete
from decode.core.sampling import Sampling
from decode.evaluation.job import make_job
from decode.evaluation.tables import read_markdown
from decode.search.planner import Writer, root_key
from decode.speculative.loop import SpeculativeMethod
from dlm.tasks import Example
from dlm.tasks.countdown import Countdown
from dlm.tokenizer import word_tokenizer
from scripts.search_budget import report, searches
from scripts.search_budget.asked import Asked, read
from tests.lib.mains import run_main
from tests.lib.paths import SHARED
from tests.lib.untrained import tiny

NUM = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("search_budget") / "model"
    dlm.save(path, tiny(word_tokenizer(Countdown().pieces), 128))
    return path


@pytest.fixture(scope="module")
def job(model):
    preset = read("countdown_3", "").preset
    return make_job(dlm.load(model), preset, num_examples=3, block_len=1, gen_len=6, batch_size=4)


def loose(job, is_right):
    """A task in which answers with a "1" pass, and are right where `is_right` says so."""

    class Loose(type(job.task)):
        def score(self, example, completion):
            return {"score": float("1" in completion and is_right(completion))}

    task = Loose(num_numbers=3)
    asked = Asked(None, lambda example: lambda prompt, text: float("1" in text))
    return asked, job.__class__(**{**vars(job), "task": task})


def test_samples_are_counted_up_to_the_first_that_passes(job):
    asked, job = loose(job, lambda text: text.count("1") == 1)
    found = searches.try_one(job, searches.sampled(asked, 1.0, NUM))
    for i, prompt in enumerate(job.prompts):
        writer = Writer(job.lm, SpeculativeMethod(sampling=Sampling(1.0)), prompt, 64)
        (drawn,) = writer.go_on([prompt], [6], [root_key(i)], times=NUM, rows=1, G=6)
        texts = [job.lm.tokenizer.decode(x.tokens[: len(x.tokens) - x.has_ended]) for x in drawn]
        passing = [n for n, text in enumerate(texts) if "1" in text]
        used = drawn[: passing[0] + 1] if passing else drawn
        assert found["checked"][i] == len(used)
        assert found["forwards"][i] == sum(len(one.tokens) for one in used)
        assert found["right"][i] == (bool(passing) and texts[passing[0]].count("1") == 1)
    assert any(n < NUM for n in found["checked"]) and any(found["right"])


def test_what_a_search_gives_is_right_only_if_it_passes_and_is(job):
    for is_right in (True, False):
        asked, ours = loose(job, lambda text, is_right=is_right: is_right)
        found = searches.try_one(ours, searches.searches(asked, NUM)["PG-TD"])
        passed = [
            "1" in complete(
                ours.lm, prompt, gen_len=6,
                method=searches.PGTD(reward=asked.check(None), num_rollouts=NUM),
            ).text
            for prompt in ours.prompts
        ]  # fmt: skip
        assert found["right"] == [is_right and one for one in passed] and any(passed)


def test_what_is_said_of_them():
    tried = searches.Tried(
        right=[True, True, False], forwards=[10, 30, 60], checked=[1, 3, 6], seconds=1.5
    )
    assert report.columns({"samples": tried}) == [10, 20, 40, 80, 160]
    assert report.within(tried, 10) == [True, False, False]
    assert report.within(tried, 1000) == tried["right"]
    (row,) = read_markdown(report.table({"samples": tried}))[0]
    assert row["solved within 20 (%)"] == "33 (6 to 79)"
    assert row["solved within 40 (%)"] == row["solved (%)"] == "67 (21 to 94)"
    assert (row["forwards"], row["checked"], row["examples/s"]) == ("33", "3.3", "2")


def test_puzzles_tell_how_far_an_answer_is():
    asked = read("game24", "")
    example = Example("1,2,3,4\n", "", {"operation": "game of 24"})
    right = "1*2=2,2*3=6,6*4=24"
    assert asked.check(example)(example.prompt, right) == 1
    assert asked.progress(example.prompt, right, True) == 1
    assert asked.progress(example.prompt, "1*2=3,", False) == 0
    asked = read("countdown_3", "")
    assert asked.progress("1,2,3,9\n", "1+2=3,3*3=9", True) == 1
    assert asked.progress("1,2,3,8\n", "1+2=3,3*3=9", True) < 1
    settings = [x.settings for n in (1, 2) for x in searches.searches(asked, n).values()]
    assert len(set(settings)) == 10
    assert set(searches.searches(asked, 1)) > set(searches.searches(Asked(None, None), 1))


def test_programs_are_checked_by_half_of_their_tests():
    if not (SHARED / "data" / "mbpp").exists():
        pytest.skip("needs the published files of MBPP")
    asked = read("mbpp", str(SHARED / "data"))
    task = asked.preset.make(split="test")
    example = task[0]
    name = example.metadata["test_list"][0].split("(")[0].removeprefix("assert ")
    public = f'def {name}(s, ch):\n    return "heo"\n[DONE] and more'
    assert asked.check(example)(example.prompt, public) == 1
    assert task.score(example, public)["score"] == 0
    assert asked.check(example)(example.prompt, "no program") == 0


def test_a_run_writes_what_it_says_and_decodes_nothing_again(model, tmp_path, monkeypatch):
    arguments = [
        "--task=countdown_3", f"--checkpoint={model}", f"--out={tmp_path}", "--num=2",
        "--num_examples=2", "--gen_len=6",
    ]  # fmt: skip
    said = run_main("scripts.search_budget", *arguments)
    page = (tmp_path / "search_budget.md").read_text()
    assert page.strip() in said and "| A* " in page and "solved within" in page
    found = json.loads((tmp_path / "results.json").read_text())["found"]
    assert found["samples, T 1"]["forwards"] == [12, 12]  # nothing passes
    assert (tmp_path / "search_budget.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(searches, "try_one", None)
    assert page.strip() in run_main("scripts.search_budget", *arguments)


def test_what_is_wrong_is_said(model, tmp_path):
    flags = [f"--checkpoint={model}", f"--out={tmp_path}"]
    said = run_main("scripts.search_budget", *flags, "--task=mbpp", code=1)
    assert "error: --data is missing" in said
