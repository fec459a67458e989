import dataclasses
import json
import pathlib
import re
import sys

import jax.numpy as jnp
import pytest

from tests.lib import toys
from train import metrics
from train.config import ConfigError, from_config_dict
from train.metrics import FILE_NAME, NonFiniteError, Reporter, is_due, read_metrics


def make_settings(**log):
    settings = from_config_dict(toys.get_config())
    return dataclasses.replace(settings, log=dataclasses.replace(settings.log, **log))


def values(loss=1.0, grad_norm=2.0):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(grad_norm)}


def test_is_due():
    assert [step for step in range(1, 9) if is_due(step, 3, 8)] == [3, 6, 8]
    assert [step for step in range(1, 9) if is_due(step, 0, 8)] == [8]


def test_lines_are_written_one_step_late_and_only_when_due(tmp_path):
    with Reporter(make_settings(every=2), tmp_path, 0, "test") as reporter:
        for step in range(1, 9):
            reporter.flush()
            assert [line["step"] for line in read_metrics(tmp_path)] == list(range(2, step, 2))
            reporter.add(step, values(loss=step), [], 10)
        reporter.flush()
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 2), (4, 4), (6, 6), (8, 8)]
    assert all(line["tokens_per_s"] > 0 for line in lines)


def test_tokens_per_second_count_what_the_batches_hold(tmp_path, monkeypatch):
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    with Reporter(make_settings(every=3), tmp_path, 0, "test") as reporter:
        for step, num_tokens in enumerate([1_000, 10, 20, 30, 40, 50, 60, 70], start=1):
            reporter.add(step, values(), [], num_tokens)
            reporter.flush()
    # Two seconds from one reading of the clock to the next; the first step only compiles.
    lines = {line["step"]: line["tokens_per_s"] for line in read_metrics(tmp_path)}
    assert lines == {3: (10 + 20) / 2, 6: (30 + 40 + 50) / 2, 8: (60 + 70) / 2}


def test_validation_is_part_of_the_line(tmp_path):
    with Reporter(make_settings(every=100), tmp_path, 0, "test") as reporter:
        reporter.add(3, values(), [], 10)
        reporter.flush(lambda: {"loss": jnp.float32(0.5)})
    (line,) = read_metrics(tmp_path)
    assert line["step"] == 3 and line["valid/loss"] == 0.5


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"grad_norm": float("inf")}])
def test_non_finite_steps_are_not_written_nor_validated(tmp_path, bad):
    with Reporter(make_settings(), tmp_path, 0, "test") as reporter:
        reporter.add(1, values(**bad), [], 10)
        with pytest.raises(NonFiniteError, match=f"{next(iter(bad))} is .* at step 1"):
            reporter.flush(lambda: pytest.fail("validated"))
    assert read_metrics(tmp_path) == []


def test_lines_are_read_while_they_are_written(tmp_path):
    path = tmp_path / FILE_NAME
    for rest in (b"", b'{"step": 2, "lo', b'{"step": 2', b"\xff"):
        path.write_bytes(b'{"step": 1}\n' + rest)
        assert read_metrics(tmp_path) == [{"step": 1}]
    for damage in (b'{"step": 2, "lo\n', b"\xff\n", b"[" * 100_000 + b"\n"):
        path.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 3}\n')
        with pytest.raises(ConfigError, match=r"metrics.jsonl, line 2 is damaged .*: delete the"):
            read_metrics(tmp_path)


def test_a_full_disk_is_told_with_the_file(tmp_path):
    full = pathlib.Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    message = r"^/dev/full cannot be written \(No space left on device"
    with (
        pytest.raises(OSError, match=message),
        Reporter(make_settings(), tmp_path, 0, "test") as reporter,
    ):
        reporter._writer._file = full.open("a")
        reporter.add(1, values(), [], 10)
        reporter.flush()


def test_resuming_drops_later_and_broken_lines(tmp_path, caplog):
    path = tmp_path / FILE_NAME
    lines = [json.dumps({"step": step, "loss": step / 3}) for step in range(1, 6)]
    rest = b'\n\xff\n\0\0\n[]\n{"step": 6, "lo'
    path.write_bytes("\n".join(lines).encode() + rest)
    with Reporter(make_settings(), tmp_path, 3, "test") as reporter:
        reporter.add(4, values(loss=0.25), [], 10)
        reporter.flush()
    assert path.read_text().splitlines()[:3] == lines[:3]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert read_metrics(tmp_path)[-1]["loss"] == 0.25
    assert re.search("Dropped 4 broken lines of .*metrics.jsonl", caplog.text)


def test_missing_extras_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"tensorboardX: pip install .*\[log\]"):
        Reporter(make_settings(tensorboard=True), tmp_path, 0, "test")
    with pytest.raises(ConfigError, match=r"wandb: pip install .*\[log\]"):
        Reporter(make_settings(wandb_project="x"), tmp_path, 0, "test")


def test_tensorboard_and_wandb_get_the_same_numbers(tmp_path, monkeypatch):
    class Sink:
        def __init__(self, *args, **kwargs):
            self.rows = []

        def add_scalar(self, name, value, step):
            self.rows.append((step, name, value))

        def log(self, row, step):
            self.rows += [(step, name, value) for name, value in row.items()]

        def close(self):
            pass

        finish = close

    board, run = Sink(), Sink()
    tensorboard = type("tensorboardX", (), {"SummaryWriter": lambda *args, **kwargs: board})
    told = []
    wandb = type("wandb", (), {"init": lambda **kwargs: told.append(kwargs) or run})
    monkeypatch.setitem(sys.modules, "tensorboardX", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = make_settings(tensorboard=True, wandb_project="x")
    with Reporter(settings, tmp_path, 0, "test") as reporter:
        reporter.add(1, values(), [], 10)
        reporter.flush()
    assert sorted(board.rows) == sorted(run.rows) == [(1, "grad_norm", 2.0), (1, "loss", 1.0)]
    for folder in (tmp_path, tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        with Reporter(settings, folder, 0, "test"):
            pass
    same, again, other = [kwargs["id"] for kwargs in told]
    assert same == again != other and all(kwargs["resume"] == "allow" for kwargs in told)
    (tmp_path / "other" / "wandb_id.txt").unlink()  # the same folder is not the same run
    with Reporter(settings, tmp_path / "other", 0, "test"):
        pass
    assert told[-1]["id"] not in (same, other)
