"""Runs that end early: asked to, killed, by bad data, by divergence; and that nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.lib import toys
from tests.lib.paths import ROOT
from tests.lib.runs import assert_same, toy_config, without_times
from tests.lib.tiers import more
from train import checkpoint, data, loop
from train.config import ConfigError, from_config_dict
from train.metrics import NonFiniteError, read_metrics
from train.objectives.masked_diffusion import MaskedDiffusion

CONFIG_FILE = "tests/lib/toys.py"


@pytest.mark.parametrize(
    "number",
    [
        *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
        *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
    ],
)
def test_signals_that_ask_a_run_to_stop(number):
    own = signal.signal(number, signal.SIG_DFL)  # `nohup` may have had one ignored
    before = signal.getsignal(number)
    with loop._stop_on_signals(None) as is_stopping:
        assert not is_stopping(1)
        os.kill(os.getpid(), number)
        assert is_stopping(1)
        if number == signal.SIGINT:  # once more: at once
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
    signal.signal(number, own)


def test_signals_that_are_ignored_stay_so():
    """As `nohup` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop._stop_on_signals(None) as is_stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not is_stopping(1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_cannot_and_need_not_handle_signals():
    def check():
        with loop._stop_on_signals(None) as is_stopping:
            results.append(is_stopping(1))

    results = []
    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert results == [False]


def lines_config(mode, **changes):
    """A run on `toys.Lines`, with buckets or packed."""
    config = toy_config(data__prompt_len=7, data__completion_len=7, **changes)
    config.data.task = {"make": "tests.lib.toys:Lines", "has_prompts": mode == "buckets"}
    config.data.train = config.data.valid = {}
    config.train.objective.weight_power = 0.0
    if mode == "buckets":
        config.data.buckets = ((4, 4),)
    else:
        config.data.packing, config.data.prompt_len, config.data.completion_len = True, 0, 8
        config.train.num_eval_batches = 1
    return config


@pytest.mark.slow
@pytest.mark.parametrize("mode", more("buckets", "packing"))
def test_resuming_with_buckets_and_with_packing(mode, tmp_path, monkeypatch):
    """Stopped in the middle and not: the same numbers, and one compilation per shape."""
    traced = []

    def loss(self, params, cfg, batch, context):
        traced.append(batch["completion"].shape)
        return original(self, params, cfg, batch, context)

    original = MaskedDiffusion.loss
    monkeypatch.setattr(MaskedDiffusion, "loss", loss)
    whole = loop.run(lines_config(mode, train__num_steps=12), tmp_path / "whole")
    shapes = {(14, 4), (8, 7)} if mode == "buckets" else {(8, 8)}
    assert set(traced) == shapes
    assert len(traced) <= 2 * len(shapes)  # once for training, once for validation

    changes = {"optim__decay_steps": 12, "checkpoint__every": 0}
    loop.run(lines_config(mode, train__num_steps=7, **changes), tmp_path / "parts")
    changed = lines_config(mode, train__num_steps=12, data__num_threads=0, **changes)
    loop.run(changed, tmp_path / "parts")
    ours, theirs = ({line["step"]: line for line in without_times(tmp_path / name)}
                    for name in ("parts", "whole"))  # fmt: skip
    for step in range(1, 13):
        for name in {"loss", "grad_norm", "nll_bound", "masked_accuracy"}:
            assert ours[step][name] == theirs[step][name]
    weights = "model/model.safetensors"
    assert (tmp_path / "parts" / weights).read_bytes() == (
        tmp_path / "whole" / weights
    ).read_bytes()
    # The bound is that of the published weights, whatever the loss has.
    metrics = whole.metrics
    assert metrics["valid/nll_bound"] > 1.2 * metrics["valid/loss"] > 0
    bound = np.exp(metrics["valid/nll_bound"])
    np.testing.assert_allclose(metrics["valid/perplexity_bound"], bound, rtol=1e-5)


@pytest.mark.exhaustive(every=4)
@pytest.mark.slow
@pytest.mark.parametrize("every", [0, *more(1)])
def test_a_bad_record_is_named_and_costs_nothing_that_was_learned(tmp_path, monkeypatch, every):
    config = lines_config("buckets", checkpoint__every=every)
    del config.data.valid
    monkeypatch.setattr(toys.Lines, "too_long", 40)
    with pytest.raises(ConfigError, match=r"^lines\.txt, line 41: the prompt has"):
        loop.run(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert 1 <= len(lines) < 8
    with checkpoint.open_manager(tmp_path / "run", from_config_dict(config).checkpoint) as manager:
        assert manager.latest_step() == len(lines)
    monkeypatch.undo()  # the record is mended
    with pytest.raises(ConfigError, match=r"the examples of .* are not those"):
        loop.run(config, tmp_path / "run")
    (tmp_path / "run" / "data.json").unlink()
    assert loop.run(config, tmp_path / "run").step == 8
    loop.run(config, tmp_path / "never_bad")
    assert without_times(tmp_path / "run") == without_times(tmp_path / "never_bad")


def test_bad_files_come_before_any_step(tmp_path):
    def run(text, **changes):
        path.write_text(text)
        config = toy_config(data__tokenizer="byte", data__valid=None, **changes)
        config.data.train = {}
        config.data.task = {"make": "dlm.tasks.jsonl:JsonlTask", "path": str(path)}
        config.data.task.prompt, config.data.task.completion = "{q}", "{a}"
        with pytest.raises(ConfigError) as error:
            loop.run(config, tmp_path / "run")
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    path = tmp_path / "some.jsonl"
    short = '{"q": "a", "a": "b"}\n' * 100
    assert run("\n") == f"data.train: {path} holds no records; it must have one JSON value per line"
    assert run(short + '{"q": "a"}\n').startswith(
        f"data.train: {path}, line 101: the record lacks the field 'a' of the template"
    )
    assert run(short + '\n{"q": "abcdef", "a": ""}\n' + short) == (
        f"{path}, line 102: the prompt has 6 tokens, more than data.prompt_len=5: 'abcdef' "
        "(data.too_long='cut' or 'leave_out' lets it pass)"
    )
    assert run(short + '{"q": "", "a": "abcd"}\n' + short).startswith(
        f"{path}, line 101: the completion has 4 tokens and its end, more than"
    )
    # Thirty characters, of four tokens each: short as texts go.
    emoji = json.dumps({"q": "", "a": "🙂" * 30}, ensure_ascii=False) + "\n"
    text = ('{"q": "", "a": "' + "b" * 60 + '"}\n') * 100
    assert run(text + emoji + text + emoji, data__completion_len=64, model__max_seq_len=80) == (
        f"{path}, line 101: the completion has 120 tokens and its end, more than "
        f"data.completion_len=64: '{'🙂' * 30}' (data.too_long='cut' or 'leave_out' lets it pass); "
        "examples that do not fit: 2"
    )
    assert run(short, model__max_seq_len=8) == (
        "max_seq_len=8 of the model must be at least data.prompt_len + data.completion_len = 9"
    )


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("every", [1, *more(0, 4)])
def test_divergence_stops_names_the_batch_and_saves_the_state_before_it(tmp_path, every):
    config = toy_config(train__objective={"make": "tests.lib.toys:Diverging"})
    config.checkpoint.every = every
    config.train.num_steps = 60
    config.train.seed = 2  # the seventh step is the first bad one
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 7, made with") as error:
        loop.run(config, tmp_path)
    text = str(error.value)
    assert f"the state before it is saved as step 6 in {tmp_path / 'checkpoints'}" in text
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 7))
    assert not (tmp_path / "model").exists()
    # The batch is named: the seventh one.
    settings = from_config_dict(config)
    task, _ = loop._build_tasks(settings)
    _, tokenizer, _ = checkpoint.read_model(tmp_path)
    iterator = data.train_iterator(task, tokenizer, settings.data)
    index = [next(iterator)["index"] for _ in range(7)][-1]
    assert f"made with examples {', '.join(map(str, index))} of" in text
    # What is saved is what a run of six steps ends with.
    kept = toy_config(train__objective={"make": "tests.lib.toys:Diverging"})
    kept.train.num_steps, kept.train.seed, kept.optim.decay_steps = 6, 2, 60
    loop.run(kept, tmp_path / "six")
    only_state = ocp.args.Composite(state=ocp.args.StandardRestore())
    states = []
    for folder in (tmp_path, tmp_path / "six"):
        with checkpoint.open_manager(folder, settings.checkpoint) as manager:
            assert manager.latest_step() == 6
            states.append(manager.restore(6, args=only_state)["state"])
    assert_same(*states)
    # It goes on from there, and comes to the same end.
    with pytest.raises(NonFiniteError, match="at step 7, "):
        loop.run(config, tmp_path)


@pytest.mark.exhaustive(every=4)
def test_no_batch_is_lost_if_the_one_behind_a_bad_step_cannot_be_used(tmp_path, monkeypatch):
    """The seventh step diverges, which is known when the eighth batch fails."""
    config = toy_config(train__objective={"make": "tests.lib.toys:Diverging"})
    config.train.num_steps, config.train.seed = 60, 2
    said = []
    for num_good in (7, 100):
        open_data, drawn = loop._open_data, []

        def opened(*args, open_data=open_data, drawn=drawn, num_good=num_good):
            feed = open_data(*args)
            kind = type(feed.iterator)
            following = kind.__next__

            def draw(self):
                drawn.append(1)
                if len(drawn) > num_good:
                    raise ConfigError("an example that cannot be used")
                return following(self)

            monkeypatch.setattr(kind, "__next__", draw)
            return feed

        with monkeypatch.context() as patches:
            patches.setattr(loop, "_open_data", opened)
            with pytest.raises(NonFiniteError, match="at step 7, ") as error:
                loop.run(config, tmp_path)
        monkeypatch.undo()
        said.append(str(error.value))
    assert said[0] == said[1]  # the same examples


def command(workdir, num_steps):
    return [
        sys.executable, "-m", "train", f"--config={CONFIG_FILE}", f"--workdir={workdir}",
        f"--config.train.num_steps={num_steps}", "--config.train.eval_every=50",
        "--config.checkpoint.every=25",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.exhaustive
def test_kill_9_and_the_same_command_is_as_if_nothing_had_happened(tmp_path):
    num_steps = 300
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUMPY_RANK_PROMOTION": "raise"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

    def start(name):
        log = (tmp_path / f"{name}.log").open("a")
        return subprocess.Popen(
            command(tmp_path / name, num_steps), cwd=ROOT, env=environment, stderr=log
        )

    killed, whole = start("killed"), start("whole")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 60:
        assert killed.poll() is None, (tmp_path / "killed.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    num_lines = metrics.read_bytes().count(b"\n")
    assert 60 <= num_lines < num_steps
    assert not (tmp_path / "killed" / "checkpoints" / str(num_steps)).exists()

    assert start("killed").wait(timeout=240) == 0, (tmp_path / "killed.log").read_text()
    assert whole.wait(timeout=240) == 0, (tmp_path / "whole.log").read_text()
    assert "Resuming" in (tmp_path / "killed.log").read_text()
    lines = without_times(tmp_path / "killed")
    assert [line["step"] for line in lines] == list(range(1, num_steps + 1))
    assert lines == without_times(tmp_path / "whole")
    weights = "model/model.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (
        tmp_path / "whole" / weights
    ).read_bytes()
