"""Several processes on one machine, as on a pod: the same numbers as one process.

A batch is the same whatever the number of processes that divide its rows, so runs that are killed
go on with another number.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import dlm
from tests.lib import toys
from tests.lib.paths import GOLDEN, ROOT
from tests.lib.tiers import more
from train import loop
from train.collect import trajectories
from train.collect.config import TrajectoryConfig
from train.metrics import read_metrics

# What `python -m train` does on a cluster that JAX recognises.
PROGRAM = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=int(sys.argv[2]), process_id=int(sys.argv[3]))
from tests.train.test_multiprocess import get_config
from train import loop
config = get_config(sys.argv[6])
config.mesh.fsdp = int(sys.argv[2])
config.train.num_steps = int(sys.argv[5])
loop.run(config, sys.argv[4])
"""


NUM_STEPS = 20


def get_config(mode):
    config = toys.get_config()
    if mode == "buckets":  # batches of 8 and 16 rows, which any number of processes here divides
        config.data.task = {"make": "tests.lib.toys:Lines"}
        config.data.train = config.data.valid = {}
        config.data.prompt_len = config.data.completion_len = 7
        config.data.buckets = ((3, 4),)
    config.checkpoint.every = 2
    config.optim.decay_steps = config.train.num_steps = NUM_STEPS
    return config


def start_processes(program, count, *arguments):
    """Processes of a cluster on this machine."""
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
            [sys.executable, "-c", program, address, str(count), str(i), *arguments],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes):
    for process in processes:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]


def kill_one(processes):
    """And then the others, which would wait for it; a cluster does so, too."""
    processes[-1].kill()
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(is_there, processes):
    deadline = time.monotonic() + 200
    while not is_there():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "first", "then"), more(("examples", 2, 0), ("examples", 4, 2), ("buckets", 4, 2))
)
def test_processes_are_killed_fewer_go_on_and_one_finishes(tmp_path, mode, first, then):
    """The same loss curve and model as of a run in one process that nothing happened to."""
    folder = tmp_path / "several"
    processes = start_processes(PROGRAM, first, str(folder), "12", mode)
    wait_for((folder / "checkpoints" / "2").exists, processes)
    kill_one(processes)
    if then:
        finish(start_processes(PROGRAM, then, str(folder), "16", mode))
    loop.run(get_config(mode), folder)
    loop.run(get_config(mode), tmp_path / "one")

    ours, theirs = read_metrics(folder), read_metrics(tmp_path / "one")
    assert [line["step"] for line in ours] == [*range(1, NUM_STEPS + 1)]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() ^ other.keys() <= {"tokens_per_s"}
        for name in one.keys() - {"tokens_per_s"}:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3, err_msg=name)
    models = (dlm.load(path / "model").params for path in (tmp_path / "one", folder))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), *models)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    processes = start_processes(PROGRAM, 2, str(tmp_path), "1000000", "examples")
    wait_for((tmp_path / "checkpoints" / "2").exists, processes)
    processes[1].send_signal(signal.SIGUSR1)
    finish(processes)
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == [*range(1, len(steps) + 1)] and not (tmp_path / "lock.json").exists()
    assert (tmp_path / "checkpoints" / str(steps[-1])).exists()


COLLECT = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=int(sys.argv[2]), process_id=int(sys.argv[3]))
from tests.train.test_multiprocess import collect
from tests.lib.paths import GOLDEN, ROOT
collect(sys.argv[4], sys.argv[5])
"""


def collect(checkpoint, out):
    config = TrajectoryConfig(
        checkpoint=checkpoint, task={"make": "tests.lib.toys:Copy"}, block_len=3, num_examples=24,
        prompt_len=5, gen_len=6, batch_size=2, examples_per_shard=2,
    )  # fmt: skip
    trajectories.run(config, out)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_data_set_decoded_by_two_processes_of_which_one_is_killed(tmp_path):
    """Any number of processes goes on; the file is complete, and has every example once."""
    config = toys.get_config()
    config.train.num_steps = 2
    checkpoint = str(loop.run(config, tmp_path / "run").model_path)
    out = tmp_path / "two"
    processes = start_processes(COLLECT, 2, checkpoint, str(out))
    wait_for(lambda: len(list(out.glob("*array_record*"))) >= 3, processes)
    kill_one(processes)
    assert not (out / "results.jsonl").exists()
    finish(start_processes(COLLECT, 2, checkpoint, str(out)))
    collect(checkpoint, str(tmp_path / "one"))
    lines = (out / "results.jsonl").read_text()
    assert lines == (tmp_path / "one" / "results.jsonl").read_text()
    assert [json.loads(line)["index"] for line in lines.splitlines()] == [*range(24)]


FINGERPRINT = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=int(sys.argv[2]), process_id=int(sys.argv[3]))
import dlm
from dlm.sharding import make_mesh
lm = dlm.load(sys.argv[4], mesh=make_mesh(fsdp=2))
assert not lm.params["embed"].is_fully_addressable
assert dlm.fingerprint(lm) == sys.argv[5], dlm.fingerprint(lm)
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_model_has_one_fingerprint_however_it_is_spread():
    path = str(GOLDEN / "llada_small")
    finish(start_processes(FINGERPRINT, 2, path, dlm.fingerprint(dlm.load(path))))
