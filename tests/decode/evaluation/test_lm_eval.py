"""The harness itself: toy tasks from end to end, and its own model of the same checkpoint."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

import dlm
from decode.causal_likelihood import causal_log_likelihood
from decode.evaluation.harness import Answerer
from decode.evaluation.requests import rolling_windows
from decode.evaluation.task_files import LOCAL, export_task
from dlm.tasks.presets import TASKS
from tests.lib.likelihoods import expectation
from tests.lib.mains import run_main
from tests.lib.paths import ROOT, SHARED
from tests.lib.untrained import byte_lm, char_lm, untrained


@pytest.mark.exhaustive(every=4)
def test_without_the_extra_one_sentence_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['lm_eval'] = None; import decode.evaluation.lm_eval"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    said = "ImportError: lm-eval is not installed: install the extra, pip install -e '.[eval]'"
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == said


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of both kinds, and task files of every type of request."""
    root = tmp_path_factory.mktemp("lm_eval")
    dlm.save(root / "diffusion", untrained(TASKS["word_problems"].make()))
    lm = char_lm()
    cfg = dataclasses.replace(lm.cfg, max_seq_len=64, mask_token_id=None)
    dlm.save(root / "causal", dataclasses.replace(lm, cfg=cfg))
    export_task("word_problems", root / "tasks", num_examples=6)
    export_task("word_problems", root / "tasks", num_examples=6, num_choices=3)
    texts = ["the quick brown fox jumps over the lazy dog. " * 3, "hello there, you! ", "a"]
    lines = [json.dumps({"text": text, "end": text[-3:]}) for text in texts]
    (root / "tasks" / "texts.jsonl").write_text("\n".join(lines) + "\n")
    shared = {
        "dataset_path": "json", "test_split": "test", "doc_to_text": "{{text}}",
        "dataset_kwargs": {"data_files": {"test": str(root / "tasks" / "texts.jsonl")}},
        "target_delimiter": "", "num_fewshot": 0,
    }  # fmt: skip
    mean = {"aggregation": "mean", "higher_is_better": True}
    for name, config in {
        "rolling": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "last": {
            "output_type": "loglikelihood", "doc_to_target": "{{end}}",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "chat": {
            "output_type": "generate_until", "doc_to_target": "{{end}}", "gen_prefix": "so ",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    }.items():  # fmt: skip
        text = yaml.safe_dump({"task": name, **shared, **config})
        (root / "tasks" / f"{name}.yaml").write_text(text)
    return root


def run(folder, out, checkpoint, tasks, *flags, include=None, code=0):
    """What the command writes: results, and samples by task."""
    include = folder / "tasks" if include is None else include
    said = run_main(
        "scripts.lm_eval", f"--checkpoint={folder / checkpoint}", f"--include={include}",
        f"--tasks={tasks}", f"--out={out}", *flags, code=code,
    )  # fmt: skip
    if code:
        return said
    samples = {
        task: [json.loads(x) for x in (out / f"samples_{task}.jsonl").read_text().splitlines()]
        for task in tasks.split(",")
    }
    return json.loads((out / "results.json").read_text()), samples


def test_tasks_give_what_the_loops_give(lm_eval, folder, tmp_path):
    """Written, scored by the task itself; and one of three choices."""
    tasks = "word_problems,word_problems_choice"
    flags = ("--method=threshold", "--batch_size=4", "--num_samples=8", "--limit=5")
    found, samples = run(folder, tmp_path, "diffusion", tasks, *flags)
    lm, task = dlm.load(folder / "diffusion"), TASKS["word_problems"].make(split="test")
    answerer = Answerer(lm=lm, method="threshold", batch_size=4, num_samples=8)
    settings = {"until": ["\n"], "max_gen_toks": TASKS["word_problems"].gen_len}
    settings |= {"do_sample": False}
    texts = answerer.generate([(task[i].prompt, settings) for i in range(5)])
    assert [sample["filtered_resps"] for sample in samples["word_problems"]] == [[x] for x in texts]
    scores = [task.score(task[i], text)["score"] for i, text in enumerate(texts)]
    assert found["results"]["word_problems"]["score,none"] == np.mean(scores)

    docs = [sample["doc"] for sample in samples["word_problems_choice"]]
    judged = answerer.score([(doc["prompt"], text) for doc in docs for text in doc["choices"]])
    table = np.reshape([log_prob for log_prob, _ in judged], (5, 3))
    said = [[float(x[0]) for x in s["filtered_resps"]] for s in samples["word_problems_choice"]]
    np.testing.assert_allclose(said, table, rtol=1e-6)
    labels = [doc["label"] for doc in docs]
    expected = np.mean(table.argmax(axis=1) == labels)
    assert found["results"]["word_problems_choice"]["acc,none"] == expected
    config = found["config"]
    assert config["loop"] == "decode.generate" and config["method"] == "threshold"
    assert config["likelihood"] == "bound" and config["answers"] == 5 and config["forwards"] > 0

    # The same again takes everything from the record.
    before = (tmp_path / "answers.jsonl").read_bytes()
    again, _ = run(folder, tmp_path, "diffusion", tasks, *flags)
    assert again["results"] == found["results"]
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_bounds_are_within_their_errors_of_what_they_estimate(lm_eval, folder, tmp_path):
    """A LLaDA-format toy: all sets of masks in float64 against copies that a run has drawn."""
    lines = (folder / "tasks" / "word_problems_choice.test.jsonl").read_text().splitlines()
    docs = [json.loads(line) for line in lines]
    short = tmp_path / "short.jsonl"
    lm = dlm.load(folder / "diffusion")
    choices = [" 1+2", " 4", " 12-4"]
    short.write_text("".join(json.dumps({**doc, "choices": choices}) + "\n" for doc in docs[:2]))
    config = yaml.safe_load((folder / "tasks" / "word_problems_choice.yaml").read_text())
    config["task"], config["dataset_kwargs"]["data_files"] = "short", {"test": str(short)}
    config.pop("fewshot_split")
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    flags = ("--num_samples=2048", "--batch_size=64")
    _, samples = run(folder, out, "diffusion", "short", *flags, include=tmp_path)
    answers = map(json.loads, (out / "answers.jsonl").read_text().splitlines())
    for sample, doc in zip(samples["short"], docs, strict=False):
        for choice, said in zip(choices, sample["filtered_resps"], strict=True):
            answer = next(answers)
            tokens = lm.tokenizer.encode(doc["prompt"] + choice)
            prompt = lm.tokenizer.encode(doc["prompt"].rstrip())
            exact = expectation(lm, prompt, tokens[len(prompt) :])
            assert answer["log_prob"] == pytest.approx(float(said[0]))
            assert answer["num_tokens"] == len(tokens) - len(prompt)
            error = answer["standard_error"]
            assert abs(answer["log_prob"] - exact) < 4 * error + 1e-4 * abs(exact)
            assert error < 0.01 * abs(exact)


def test_an_autoregressive_model_answers_every_kind_of_request(lm_eval, folder, tmp_path):
    found, samples = run(folder, tmp_path, "causal", "rolling,last,chat", "--batch_size=2")
    lm = dlm.load(folder / "causal")
    texts = [sample["doc"]["text"] for sample in samples["rolling"]]
    begin = lm.cfg.eos_token_id
    total = sum(
        one.log_prob
        for text in texts
        for one in causal_log_likelihood(
            lm, [*rolling_windows(lm.tokenizer.encode(text), begin, 64)], batch_size=2
        )
    )
    bits = -total / sum(len(text.encode()) for text in texts) / math.log(2)
    assert found["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(bits)
    assert found["config"]["likelihood"] == "exact" if "likelihood" in found["config"] else True
    assert len(samples["last"]) == 3 and found["results"]["last"]["acc,none"] in (
        0,
        1 / 3,
        2 / 3,
        1,
    )

    chatted, of_chat = run(folder, tmp_path / "chat", "causal", "chat", "--chat")
    for sample in of_chat["chat"]:
        context = sample["arguments"][0][0]
        assert context == f"<user>{sample['doc']['text']}<assistant>so "
    assert chatted["config"]["prompts_cut"] == 1 and chatted["config"]["answers"] == 3


def test_data_sets_in_a_folder_are_tasks(lm_eval, folder, tmp_path):
    """All of them, asked of a model that writes nothing right."""
    if not (SHARED / "data" / "gsm8k").is_dir():
        pytest.skip("the data sets lie not beside the repository")
    lm = byte_lm()
    causal = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, mask_token_id=None))
    dlm.save(tmp_path / "causal", causal)
    tasks = [f"{name}_local" for name in LOCAL]
    flags = ("--limit=1", "--gen_len=4", "--batch_size=2", f"--data={SHARED / 'data'}")
    found, samples = run(tmp_path, tmp_path / "out", "causal", ",".join(tasks), *flags, include="")
    assert found["config"]["prompts_cut"] == len(tasks) == 4
    for name in tasks:
        numbers = found["results"][name]
        scores = [v for k, v in numbers.items() if k.startswith(("exact_match,", "pass@1,"))]
        assert scores and not any(scores)
        context = samples[name][0]["arguments"][0][0]
        shots = {"gsm8k_local": 5, "mbpp_local": 3}.get(name, 0)
        assert context.count("Answer: ") + context.count("[DONE]\n\n") == shots


def test_tasks_that_are_none_are_refused(lm_eval, folder, tmp_path):
    said = run(folder, tmp_path, "causal", "word_problem", code=1)
    assert "error: tasks='word_problem' must be among those that there are: chat, last" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("num", "size"), [(0, 4), (1, 4), (4, 4), (5, 4), (7, 3), (9, 4), (40, 7)])
def test_windows_are_those_of_the_harness(lm_eval, num, size):
    from lm_eval import utils

    tokens = list(range(num))
    theirs = utils.get_rolling_token_windows(tokens, 99, size, 1)
    assert list(rolling_windows(tokens, 99, size)) == [*map(utils.make_disjoint_window, theirs)]


@pytest.mark.slow
def test_the_harness_says_the_same_of_its_own_model(lm_eval, folder):
    """transformers' model of the same checkpoint, through the harness's `hf`."""
    pytest.importorskip("torch", reason="the extra `parity` is not installed")
    pytest.importorskip("transformers", reason="the extra `parity` is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from decode.evaluation.lm_eval import HarnessModel

    path = folder / "causal"
    theirs = HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=1)
    ours = HarnessModel(Answerer(lm=dlm.load(path), batch_size=2))

    def both(kind, *requests):
        made = [Instance(kind, {}, request, i) for i, request in enumerate(requests)]
        return [getattr(model, kind)(made, disable_tqdm=True) for model in (ours, theirs)]

    long = "the quick brown fox jumps over the lazy dog. " * 3
    pairs = [("hello", " you"), ("hello ", "you"), ("", "so"), (long, "it is"), ("what?", " b")]
    one, other = both("loglikelihood", *pairs)
    np.testing.assert_allclose([x for x, _ in one], [x for x, _ in other], atol=1e-4)
    assert [flag for _, flag in one] == [flag for _, flag in other]
    texts = both("generate_until", *[(x, {"until": [], "max_gen_toks": 12}) for x, _ in pairs[:2]])
    assert texts[0] == texts[1] and all(texts[0])
    written = texts[0][0]
    for until in ([written[4:6]], ["zz", "", written[2:3]]):
        short = both("generate_until", ("hello", {"until": until, "max_gen_toks": 12}))
        assert short[0] == short[1] != [written]
    cut = both("generate_until", (long, {"until": ["."], "max_gen_toks": 12}))
    assert cut[0] == cut[1] and ours.answerer.num_cut == 2
    greedy = both("loglikelihood", ("hello", written))
    assert greedy[0][0][1] and greedy[1][0][1]
    one, other = both("loglikelihood_rolling", (long,), ("hello",))
    np.testing.assert_allclose(one, other, atol=2e-4)
