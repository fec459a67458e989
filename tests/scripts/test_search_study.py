"""Searches on a task: what is said of texts made by hand, and a run on an untrained model."""

import dataclasses
import json

import numpy as np
import pytest

import dlm
from configs import translation
from decode.causal_likelihood import causal_log_likelihood
from decode.complete import complete
from decode.core.results import Completion
from decode.evaluation.job import Job
from decode.search.components import Beam, Superposed
from decode.search.loop import SearchMethod
from decode.speculative.loop import SpeculativeMethod
from dlm.tasks import bleu
from dlm.tasks.countdown import Countdown
from dlm.tasks.translation import Translation
from dlm.tokenizer import word_tokenizer
from scripts.search_study import measure, methods, report
from scripts.search_study.asked import BLEU, DIVERSITY, SCORE, asked
from tests.lib.mains import run_main
from tests.lib.pairs import write_pairs
from tests.lib.paths import SHARED
from tests.lib.untrained import tiny
from train import loop


def job_of(task, num):
    """A job whose model is not asked."""
    return Job(None, task, [task[i] for i in range(num)], [], {}, 8, 1, num)


def written(texts):
    n = len(texts)
    return measure.Written(
        texts=texts, tokens=[4] * n, log_prob=[-3.0, -5.0][:n], forwards=[2, 4][:n],
        read=[8, 16][:n], seconds=2.0, compile_s=1.0,
    )  # fmt: skip


# ---- Texts made by hand ------------------------------------------------------------------------


def test_the_first_text_and_the_best(tmp_path):
    task = Translation(write_pairs(tmp_path))  # "A man runs in the park.", "... on the beach."
    texts = [
        ["A man sits in the park.", "A man runs in the park.", "A man runs in the park."],
        ["A man runs on the beach.", "A man on a beach."],
    ]
    (row,) = report.summarise(job_of(task, 2), BLEU, {"beams": written(texts)})
    right = [example.completion for example in task.loaded[:2]]
    first = sum(bleu.counts(t[0], [r]) for t, r in zip(texts, right, strict=True))
    value, low, high = row["quality"]
    assert value == pytest.approx(bleu.bleu(first)) and low <= value <= high
    assert row["best"][0] == pytest.approx(100) and row["best"][1:] == pytest.approx((100, 100))
    assert (row["texts"], row["most_texts"]) == (2, 3)
    # 7 words of 8 words of two texts that differ in one, 21 words; 8 of 7 + 6, all words but "a".
    distinct = [8 / 21, len({*["A", "man", "runs", "on", "the", "beach", ".", "a"]}) / 13]
    assert row["distinct_1"] == pytest.approx(np.mean(distinct))
    assert (row["log_prob"], row["forwards"], row["read"]) == (-4, 3, 12)
    assert (row["tokens_per_s"], row["answers_per_s"]) == (4, 1)
    cells = report.table([row], "BLEU").splitlines()[2].split("|")
    assert [cell.strip() for cell in cells[1:2]] == ["beams"]
    assert cells[3].strip() == "100.0 (100.0 to 100.0), n = 3"


def test_scores_have_an_oracle_and_open_texts_have_none():
    task = Countdown(num_numbers=3)
    right = [task[i].completion for i in range(2)]
    texts = [["1+1=2", right[0]], [right[1], "no"]]
    (row,) = report.summarise(job_of(task, 2), SCORE, {"drawn": written(texts)})
    assert row["quality"][0] == 50 and row["best"] == (100, 100, 100)
    texts = [["a b a b a b"], ["a b c d e f"]]
    (row,) = report.summarise(job_of(task, 2), DIVERSITY, {"drawn": written(texts)})
    assert row["quality"][0] == pytest.approx(50 * (1 + 2 / 5 * 2 / 4 * 2 / 3))
    assert row["seq_rep_4"] == pytest.approx(1 / 6) and row["best"] is None
    assert "best of n" not in report.table([row], "diversity (%)")


def test_programs_are_run_once_and_end_where_they_should(tmp_path, monkeypatch):
    record = {
        "task_id": "0", "prompt": "def twice(x):\n", "entry_point": "twice",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(f):\n    assert f(3) == 6\n",
    }  # fmt: skip
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "dev.jsonl").write_text(json.dumps(record) + "\n")
    preset, quality = asked("humaneval", str(tmp_path))
    task = preset.make(split="test")
    right, wrong = task[0].completion + "\nprint(1 +", "    return x\n"
    assert quality.best(task, task[0], [wrong, right]) == 1
    monkeypatch.setattr("decode.evaluation.scoring.run_program", None)
    assert quality.count(task, task[0], right).tolist() == [1, 1]
    assert quality.count(task, task[0], wrong).tolist() == [0, 1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published files are not there")
def test_published_files_are_tasks():
    lengths = {"translation": 1014, "wikitext2": 1000, "humaneval": 82, "mbpp": 250}
    for name, length in lengths.items():
        preset, _ = asked(name, str(SHARED / "data"))
        assert len(preset.make(split="test")) >= length


# ---- Methods -----------------------------------------------------------------------------------


def test_methods_by_name(toy_cfg):
    lm = dlm.LanguageModel({}, toy_cfg, word_tokenizer(["a", "."]))
    found, left_out = methods.methods_of((), 3, lm)
    assert left_out == ["top_k_50 is left out: top_k=50 must be in [1, vocab_size=24]"]
    assert {"greedy", "sampled"} <= found.keys() <= {"greedy", *methods.SAMPLING, *methods.SEARCHES}
    assert found["beam_4"].num_return == 3 and found["contrastive"].num_return == 1
    # What is tried ends at the tokenizer's marks, and what it took is counted.
    assert np.flatnonzero(found["cntp"].strategy.punctuation).tolist() == [1]
    none = np.zeros(0)
    answer = Completion("", none, 5, 0.0, "length", none, none, none, none)
    tried = dataclasses.replace(answer, counts={"num_read": 9})
    ours = lambda name, answer=answer: (
        methods.num_texts(found[name], 3), methods.num_read(found[name], answer)
    )  # fmt: skip
    assert [ours(name) for name in ("greedy", "sampled", "beam_4", "contrastive")] == [
        (1, 5), (3, 5), (1, 20), (1, 20)
    ]  # fmt: skip
    assert (ours("cntp", tried), ours("adadec", tried)) == ((3, 9), (1, 9))
    nameless = dlm.LanguageModel({}, toy_cfg)
    assert (
        "cntp is left out: punctuation=None needs a tokenizer"
        in methods.methods_of((), 3, nameless)[1][1]
    )
    with pytest.raises(ValueError, match="there is no method 'bream_4'; there are greedy, sampled"):
        methods.methods_of(["bream_4"], 3, lm)
    adadec = methods.named("adadec:theta=1.25:num_tried=5", 3, {})
    assert (adadec.strategy.theta, adadec.strategy.num_tried) == (1.25, 5)
    for wrong, said in {
        "adadec:thet=1": "AdaDec has no number 'thet'",
        "adadec:stops=1": "AdaDec has no number 'stops'",
        "adadec:theta=much": "'theta=much' must end with a number",
        "beam_4:num_beams=2.5": "num_beams=2.5",
        "greedy:theta=1": "there is no method 'greedy:theta=1'",
    }.items():
        with pytest.raises(ValueError, match=said):
            methods.named(wrong, 3, {})
    with pytest.raises(ValueError, match="top_k_50: top_k=50 must be in"):
        methods.methods_of(["top_k_50"], 3, lm)


# ---- A run -------------------------------------------------------------------------------------


def test_published_files_must_be_somewhere():
    with pytest.raises(ValueError, match=r"--data is missing, .* --task=wikitext2 reads"):
        asked("wikitext2", "")
    assert asked("countdown_3", "")[1] is SCORE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("search_study") / "model"
    dlm.save(path, tiny(word_tokenizer(Countdown().pieces), 128))
    return path


def test_a_run_writes_what_it_says_and_decodes_nothing_again(model, tmp_path, monkeypatch):
    arguments = [
        "--task=countdown_3", f"--checkpoint={model}", f"--out={tmp_path}", "--num_return=2",
        "--num_examples=4", "--gen_len=6", "--methods=greedy,sampled,beam_4",
    ]  # fmt: skip
    said = run_main("scripts.search_study", *arguments)
    page = (tmp_path / "search_study.md").read_text()
    assert page.strip() in said and "| beam_4 " in page and "score (%)" in page
    results = json.loads((tmp_path / "results.json").read_text())
    greedy, sampled, beam = results["rows"]
    assert greedy["read"] == greedy["forwards"] and sampled["forwards"] > greedy["forwards"]
    assert beam["read"] == 4 * beam["forwards"] and beam["texts"] == sampled["most_texts"] == 2
    assert beam["log_prob"] > sampled["log_prob"]
    assert (tmp_path / "search_study.png").read_bytes().startswith(b"\x89PNG")

    log = (tmp_path / "answers.jsonl").read_text()
    monkeypatch.setattr(measure, "write", None)
    assert page.strip() in run_main("scripts.search_study", *arguments)
    assert (tmp_path / "answers.jsonl").read_text() == log and log.count("\n") == 3


def test_drafts_that_share_a_row_are_judged_each_by_itself(model):
    lm = dlm.load(model)
    task = Countdown(num_numbers=3, num_examples=2)
    prompts = [lm.tokenizer.encode(task[i].prompt) for i in range(2)]
    job = Job(lm, task, [task[i] for i in range(2)], prompts, {}, 4, 1, 2)
    others = {
        "drafts": SearchMethod(Superposed.example(lm.cfg).replace(temperature=1.0), num_return=3)
    }
    (method,) = methods.methods_of(["drafts"], 3, lm, others)[0].values()
    assert [*methods.methods_of(["greedy"], 3, lm, others)[0]] == ["greedy", "drafts"]
    found = measure.write(job, method, 3)
    first, *_ = complete(lm, prompts, method=method, gen_len=4)
    (right,) = causal_log_likelihood(lm, [(prompts[0], first.canvas.tolist())])
    assert found["log_prob"][0] == pytest.approx(right.log_prob, abs=1e-4)
    assert found["log_prob"][0] != pytest.approx(float(first.log_prob.sum()), abs=1e-2)


@pytest.mark.exhaustive(every=4)
def test_texts_that_a_search_did_not_find_are_none(model):
    """A width of more beams than there are texts: what is left has no score."""
    lm = dlm.load(model)
    task = Countdown(num_numbers=3, num_examples=2)
    prompts = [lm.tokenizer.encode(task[i].prompt) for i in range(2)]
    job = Job(lm, task, [task[i] for i in range(2)], prompts, {}, 1, 1, 2)
    V = lm.cfg.vocab_size
    method = SearchMethod(Beam(num_beams=V + 3, ends="safe"), num_return=V + 3)
    found = measure.write(job, method, V + 3)
    assert all(len(texts) <= V for texts in found["texts"])
    drawn = measure.write(job, SpeculativeMethod(sampling=methods.SAMPLING["sampled"]), 3)
    assert [len(texts) for texts in drawn["texts"]] == [3, 3] and drawn["forwards"] == [3, 3]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_translator_of_a_few_steps_by_every_method(tmp_path):
    write_pairs(tmp_path / "multi30k")
    config = translation.get_config("runlocal")
    config.data.task.path = str(tmp_path / "multi30k")
    trained = loop.run(config, tmp_path / "run").model_path
    said = run_main(
        "scripts.search_study", "--task=translation", f"--checkpoint={trained}", "--num_examples=6",
        "--batch_size=4", f"--data={tmp_path}", f"--out={tmp_path / 'out'}", "--gen_len=8",
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == list(methods.NAMES)
    assert results["quality"] == "BLEU" and "is left out" not in said


def test_what_is_wrong_is_said(model, tmp_path):
    flags = [f"--checkpoint={model}", f"--out={tmp_path}", f"--data={tmp_path}"]
    said = run_main("scripts.search_study", *flags, "--task=game24", "--methods=bream", code=1)
    assert "error: there is no method 'bream'; there are greedy" in said
    said = run_main("scripts.search_study", *flags, "--task=translation", code=1)
    assert "error: path=" in said and "has no val.de.gz" in said
