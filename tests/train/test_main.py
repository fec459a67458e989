import os
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from tests.lib import toys
from tests.lib.paths import ROOT
from train import __main__ as main
from train.metrics import read_metrics

CONFIG = "--config=tests/lib/toys.py"


@pytest.fixture
def parse(monkeypatch):
    """Parses a command line and gives the error it ends with, if it does."""

    def parse(*arguments):
        flags.FLAGS.unparse_flags()
        monkeypatch.setattr(sys, "argv", ["train", *arguments])  # config_flags looks there too
        try:
            main._parse_flags(sys.argv)
        except SystemExit as exit:
            return str(exit.code)
        return None

    monkeypatch.chdir(ROOT)
    yield parse
    flags.FLAGS.unparse_flags()


def test_overrides_reach_the_config(parse):
    assert parse(CONFIG, "--workdir=x", "--config.optim.learning_rate=0.5") is None
    config = flags.FLAGS.config
    assert config.optim.learning_rate == 0.5
    config.optim.learning_rate = toys.get_config().optim.learning_rate
    assert config.to_dict() == toys.get_config().to_dict()
    assert config.is_locked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([CONFIG, "--config.optim.learing_rate=1"], 'such field: Did you mean "learning_rate"'),
        ([CONFIG, "--config.optimiser.x=1"], "the config has no such field: optimiser"),
        ([CONFIG, "--config.train.num_steps=abc"], "invalid literal for int() with base 10: 'abc'"),
        (["--config=configs/mdlm_waiting_line.py:nope"], "config argument 'nope' must be"),
        (["--config=nowhere.py"], "No such file or directory: 'nowhere.py'"),
        ([CONFIG, "--stpes=3"], "stpes"),
    ],
)
def test_wrong_flags_are_one_sentence(parse, arguments, message):
    text = parse("--workdir=x", *arguments)
    assert text.startswith("error: ") and message in text and "\n" not in text


@pytest.mark.slow
def test_command_line_end_to_end(tmp_path):
    """Trains, refuses, and stops cleanly on Ctrl-C: as a user meets it."""

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "train", CONFIG, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    workdir = tmp_path / "run"
    process = start(f"--workdir={workdir}", "--config.train.num_steps=1000000")
    try:
        while not (workdir / "metrics.jsonl").exists() or len(read_metrics(workdir)) < 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75 and "the same command goes on from here" in err
    assert ", as SIGINT asked" in err
    assert "Starting from fresh parameters" in err and out == ""
    assert "orbax" not in err  # other packages' notes are left out

    process = start(f"--workdir={workdir}", "--config.optim.learning_rate=7.0")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "optim.learning_rate was 0.01 and is 7.0" in last
