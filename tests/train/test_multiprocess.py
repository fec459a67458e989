"""Two processes on one machine, as on a pod: the same numbers as one process.

Each process shuffles its own half of the examples. Here a batch is the whole training set and the
objective draws nothing, so that the order of rows does not matter. With buckets both processes read
all examples, and batches have the same rows whatever the training set.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import dlm
from tests.train import toy
from train import loop, trajectories
from train.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]

# What `python -m train` does on a cluster that JAX recognises.
PROGRAM = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from tests.train.test_multiprocess import get_config
from train import loop
config = get_config(sys.argv[5])
config.mesh.fsdp = 2
config.train.num_steps = int(sys.argv[4])
loop.run(config, sys.argv[3])
"""


def get_config(mode):
    config = toy.get_config()
    config.train.objective = {"make": "train.objectives.causal:Causal"}
    if mode == "buckets":
        config.data.task = {"make": "tests.train.toy:Lines"}
        config.data.train = config.data.valid = {}
        config.data.prompt_len = config.data.completion_len = 7
        config.data.buckets = ((4, 4),)
    else:
        config.data.train.num_examples = config.data.batch_size
    config.optim.decay_steps = 8
    return config


def start_processes(program, *arguments):
    """Two processes of a cluster on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, address, str(i), *arguments],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def run_two_processes(workdir, num_steps, mode):
    for process in start_processes(PROGRAM, str(workdir), str(num_steps), mode):
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", ["buckets", pytest.param("examples", marks=pytest.mark.exhaustive)]
)
def test_two_processes_train_and_resume_as_one(tmp_path, mode):
    run_two_processes(tmp_path / "two", 4, mode)
    run_two_processes(tmp_path / "two", 8, mode)
    loop.run(get_config(mode), tmp_path / "one")

    ours, theirs = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [*range(1, 9)]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() ^ other.keys() <= {"tokens_per_s"}
        for name in one.keys() - {"tokens_per_s"}:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3, err_msg=name)
    models = (dlm.load(tmp_path / name / "model").params for name in ("one", "two"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), *models)


COLLECT = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from tests.train.test_multiprocess import collect
collect(sys.argv[3], sys.argv[4])
"""


def collect(checkpoint, out):
    config = trajectories.TrajectoryConfig(
        checkpoint=checkpoint, task={"make": "tests.train.toy:Copy"}, block_len=3, num_examples=24,
        prompt_len=5, gen_len=6, batch_size=2, examples_per_shard=2,
    )  # fmt: skip
    trajectories.run(config, out)


@pytest.mark.slow
def test_a_data_set_decoded_by_two_processes_of_which_one_is_killed(tmp_path):
    """Any number of processes goes on; the file is complete, and has every example once."""
    config = toy.get_config()
    config.train.num_steps = 2
    checkpoint = str(loop.run(config, tmp_path / "run").model_path)
    out = tmp_path / "two"
    processes = start_processes(COLLECT, checkpoint, str(out))
    deadline = time.monotonic() + 200
    while len(list(out.glob("*array_record*"))) < 3:  # some are written, others are not
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.02)
    processes[1].kill()
    processes[1].communicate()
    processes[0].kill()  # it would wait for the other one
    processes[0].communicate()
    assert not (out / "results.jsonl").exists()
    for process in start_processes(COLLECT, checkpoint, str(out)):
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
    collect(checkpoint, str(tmp_path / "one"))
    lines = (out / "results.jsonl").read_text()
    assert lines == (tmp_path / "one" / "results.jsonl").read_text()
    assert [json.loads(line)["index"] for line in lines.splitlines()] == [*range(24)]
