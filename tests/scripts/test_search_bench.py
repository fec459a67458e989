"""Searches beside another library: what is compared with what, and the talk with its process."""

import json
import shutil
import sys
import textwrap

import numpy as np
import pytest

import dlm
from decode.search.components import METHODS, Beam, DiverseBeam
from decode.search.loop import SearchMethod
from dlm.tasks.countdown import Countdown
from dlm.tokenizer import word_tokenizer
from scripts.bench import search
from tests.lib.mains import run_main
from tests.lib.untrained import tiny

TORCH = """
    import contextlib
    __version__, float32 = "0.0", "float32"
    inference_mode = contextlib.nullcontext
    ones_like = lambda x: x

    class tensor:
        def __init__(self, rows):
            self.rows = rows
        def __getitem__(self, place):
            row, part = place
            return tensor(self.rows[row][part])
        def tolist(self):
            return self.rows
"""
# Writes the prompt's length and how many beams it was asked for, in two forwards.
TRANSFORMERS = """
    import torch
    __version__ = "9.9"
    print("this is no answer")

    class GenerationMixin:
        def _beam_search(self): ...
        def _sample(self): ...

    class AutoModelForCausalLM(GenerationMixin):
        @classmethod
        def from_pretrained(cls, folder):
            assert "model" in folder
            return cls()
        def register_forward_hook(self, hook):
            self.hook = hook
        def to(self, dtype):
            assert dtype == "float32"
            return self
        def eval(self):
            return self
        def generate(self, tokens, *, num_beams, **options):
            assert options["max_new_tokens"] == 6 and not options["do_sample"]
            assert options["early_stopping"] is False and options["length_penalty"] == 1.0
            self.hook(), self.hook()
            return torch.tensor([[*tokens.rows[0], len(tokens.rows[0]), num_beams]])
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An interpreter that has something like transformers."""
    (tmp_path / "torch.py").write_text(textwrap.dedent(TORCH))
    (tmp_path / "transformers.py").write_text(textwrap.dedent(TRANSFORMERS))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return sys.executable


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("search_bench") / "model"
    dlm.save(path, tiny(word_tokenizer(Countdown().pieces), 128))
    return path


def test_what_is_the_same_search():
    same = lambda name: search.counterpart(METHODS[name])
    assert same("beam_4") == (
        "_beam_search", {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False}
    )  # fmt: skip
    function, options = same("diverse_beam_6")
    assert function == "_group_beam_search"
    assert (options["num_beams"], options["num_beam_groups"]) == (6, 3)
    assert options["diversity_penalty"] == 0.5
    assert same("contrastive") == ("_contrastive_search", {"penalty_alpha": 0.6, "top_k": 4})
    assert same("momentum") is None
    for beam in (Beam(ends="safe"), Beam(length_offset=5.0), Beam(min_len=2)):
        for strategy in (beam, DiverseBeam(beam)):
            assert search.counterpart(SearchMethod(strategy)) is None
    _, options = search.counterpart(SearchMethod(Beam(ends="first")))
    assert options["early_stopping"] is True
    with pytest.raises(ValueError, match=r"there is no search 'bream_4'; there are .*beam_4"):
        search.methods_of(["beam_4", "bream_4"])


def test_the_median_of_each_prompt_counts():
    """Ours: 4 tokens in 1 s, then in 3 s, each median; theirs twice as many in as long."""
    times = {"ours": iter([9, 1, 5, 1, 3, 3, 3.0]), "theirs": iter([9, 1, 1, 8, 3, 2, 4.0])}
    decoders = {
        name: lambda prompt, name=name, n=n: ([1] * n, n, next(times[name]))
        for name, n in (("ours", 4), ("theirs", 8))
    }
    tallies = search.in_turn(decoders, [[1], [2]], 3)
    assert tallies["ours"].seconds == [1, 3] and tallies["theirs"].seconds == [1, 3]
    lm = tiny(word_tokenizer(Countdown().pieces), 32)
    result = search._result(lm, "beam_4", 8, 3, "theirs", tallies)
    assert (result["tokens_per_s"], result["over"], result["same_text"]) == (4, 0.5, "0/2")
    assert result["interval"] == "0.50 to 0.50" and result["forwards"] == 8


@pytest.mark.exhaustive(every=4)
def test_a_run_with_a_process_of_another_interpreter(model, installed):
    said = run_main(
        "scripts.bench", "search", f"--checkpoint={model}", "--task=countdown_3", "--gen_len=6",
        "--num_prompts=2", "--repeats=5", "--methods=beam_4,momentum", f"--pythons={installed}",
    )  # fmt: skip
    results = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [(r["method"], r["library"]) for r in results] == [
        ("beam_4", "ours"), ("beam_4", "transformers 9.9"), ("momentum", "ours")
    ]  # fmt: skip
    ours, theirs, _ = results
    assert (ours["over"], ours["same_text"]) == (1, "2/2") and theirs["same_text"] == "0/2"
    assert theirs["forwards"] == 2 and np.isfinite(theirs["over"])
    assert "| beam_4 | transformers 9.9 |" in said


def test_interpreters_that_lack_it_are_named(model):
    flags = ["search", f"--checkpoint={model}", "--task=countdown_3", "--num_prompts=1"]
    said = run_main("scripts.bench", *flags, "--pythons=/nowhere/python", code=1)
    assert "error: " in said and "/nowhere/python" in said
    said = run_main("scripts.bench", *flags, "--methods=bream", code=1)
    assert "error: there is no search 'bream'" in said
    with pytest.raises(ValueError, match=r"false ended with code 1: .* must have torch and"):
        search.Theirs(shutil.which("false"), model)
