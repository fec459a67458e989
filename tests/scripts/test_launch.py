"""Launchers: processes of one machine for real, everything else as it would be run."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.lib.mains import run_main
from tests.lib.paths import ROOT

COMMAND = ["python", "-m", "train", "--config=configs/x.py:a b", "--workdir=/mnt/bucket/x"]


def launch(name, *arguments, code=0):
    return run_main(f"scripts.launch.{name}", *arguments, code=code)


def launch_apart(name, *arguments, code=0):
    """In a process of its own, whose children write where it writes."""
    done = subprocess.run(
        [sys.executable, "-m", f"scripts.launch.{name}", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def local(tmp_path, program, *flags, num=2, code=0):
    """Runs a Python program in every process; who writes where."""
    flags = (f"--processes={num}", f"--logs={tmp_path}", *flags)
    out = launch_apart(
        "local", *flags, "--", sys.executable, "-c", program, str(tmp_path), code=code
    )
    return out, [p.read_text() for p in sorted(tmp_path.glob("process_*.log"))]


def test_every_process_knows_who_it_is(tmp_path):
    out, logs = local(
        tmp_path,
        "import os; print(*(os.environ[f'JAX_{n}'] for n in "
        "('PROCESS_ID', 'NUM_PROCESSES', 'COORDINATOR_ADDRESS')))",
        num=3,
    )
    lines = [text.split() for text in (out, *logs)]
    assert [line[:2] for line in lines] == [["0", "3"], ["1", "3"], ["2", "3"]]
    assert len({line[2] for line in lines}) == 1 and lines[0][2].startswith("localhost:")


@pytest.mark.exhaustive(every=4)
def test_processes_are_a_cluster_of_jax(tmp_path):
    out, _ = local(
        tmp_path,
        "from train.host import join_cluster; join_cluster()\n"
        "import jax; from jax.experimental import multihost_utils as m\n"
        "print(m.process_allgather(jax.numpy.int32(jax.process_index() + 5)).tolist())",
    )
    assert "[5, 6]" in out  # on a line of its own, unless what Gloo says of its peers runs into it


@pytest.mark.exhaustive(every=4)
def test_one_that_fails_ends_the_others(tmp_path):
    program = (
        "import os, sys, time\nif os.environ['JAX_PROCESS_ID'] == '1': sys.exit(3)\ntime.sleep(100)"
    )
    assert local(tmp_path, program, code=3)[0] == ""


@pytest.mark.exhaustive
def test_those_that_stopped_are_started_again(tmp_path):
    """Each process counts its starts; at the third one it is done."""
    program = """
import os, pathlib, sys
count = pathlib.Path(sys.argv[1], os.environ["JAX_PROCESS_ID"])
count.write_text(count.read_text() + "." if count.exists() else ".")
sys.exit(0 if len(count.read_text()) == 3 else 75)
"""
    local(tmp_path, program, "--restarts=1", code=75)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == ".."
    local(tmp_path, program, "--restarts=1")
    assert (tmp_path / "1").read_text() == "..."


@pytest.mark.exhaustive(every=4)
def test_ctrl_c_reaches_every_process_once(tmp_path):
    """Also that of a terminal, which goes to the whole group; and nothing is started again."""
    program = """
import os, pathlib, signal, sys, time
file, told = pathlib.Path(sys.argv[1], os.environ["JAX_PROCESS_ID"]), []
signal.signal(signal.SIGINT, lambda *_: told.append(1))
file.write_text("ready")
while not told: time.sleep(0.01)
time.sleep(0.5)
is_apart = os.getpgrp() == os.getpid()  # two signals at once may be seen as one
file.write_text(f"{len(told)} {is_apart}")
sys.exit(75)
"""
    flags = ["--processes=2", f"--logs={tmp_path}", "--restarts=3", "--"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "scripts.launch.local", *flags, sys.executable, "-c", program,
         str(tmp_path)],
        cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    files = [tmp_path / "0", tmp_path / "1"]
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(timeout=60) == 75
    assert [file.read_text() for file in files] == ["1 True", "1 True"]


def test_dry_runs_say_what_would_be_run():
    out = launch("local", "--processes=2", "--dry_run", "--", *COMMAND)
    assert [shlex.split(line)[-5:] for line in out.splitlines()] == [COMMAND, COMMAND]

    flags = ["--name=a", "--zone=z", "--type=v5litepod-16", "--dry_run"]
    lines = launch("tpu_vm", *flags, "--", *COMMAND).splitlines()
    steps = [shlex.split(line) for line in lines]
    assert steps[0][:5] == ["gcloud", "compute", "tpus", "tpu-vm", "create"]
    assert "--accelerator-type=v5litepod-16" in steps[0] and "--worker=all" in steps[-1]
    assert steps[-1][-1].endswith(shlex.join(COMMAND))  # quoted once more for the hosts
    queued = launch("tpu_vm", *flags, "--queued", "--spot", "--delete", "--", *COMMAND)
    assert "queued-resources create a --zone=z" in queued and "--spot" in queued
    last = "gcloud compute tpus queued-resources delete --force a --zone=z --quiet"
    assert queued.splitlines()[-1] == last
    made = launch("tpu_vm", *flags, "--delete", "--", *COMMAND)
    assert made.splitlines()[-1].startswith("gcloud compute tpus tpu-vm delete a")
    assert "create" not in launch("tpu_vm", *flags, "--exists", "--", *COMMAND)

    script = launch("slurm", "--nodes=2", "--gpus_per_node=4", "--dry_run", "--", *COMMAND)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "#SBATCH --nodes=2\n" in script and "#SBATCH --ntasks-per-node=4\n" in script
    assert f"srun --kill-on-bad-exit=1 {shlex.join(COMMAND)}\n" in script
    assert '-eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"' in script

    flags = ["--name=a", "--image=i:1", "--topology=4x4", "--dry_run"]
    jobset = yaml.safe_load(launch("gke", *flags, "--", *COMMAND))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 4
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == COMMAND
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


@pytest.mark.parametrize(("state", "code"), [("ACTIVE", 0), ("FAILED", 1), ("SUSPENDED", 1)])
def test_a_request_is_waited_for_and_a_slice_given_back(tmp_path, state, code):
    """With a `gcloud` that notes what it is told; requests that came to nothing end the wait."""
    log = tmp_path / "log"
    (tmp_path / "gcloud").write_text(
        f'#!/bin/sh\necho "$3 $4 $5" >> {log}\n[ "$4" = describe ] && echo {state}\nexit 0\n'
    )
    (tmp_path / "gcloud").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "scripts.launch.tpu_vm", "--name=a", "--zone=z", "--queued",
         "--delete", "--", "true"],
        cwd=ROOT, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    told = log.read_text().splitlines()
    assert done.returncode == code and told[-1] == "queued-resources delete --force"
    assert told[:2] == ["queued-resources create a", "queued-resources describe a"]
    assert sum(line.startswith("tpu-vm ssh") for line in told) == (2 if code == 0 else 0)
    (ROOT / "repository.tar.gz").unlink(missing_ok=True)


def test_a_launcher_without_a_command_says_so():
    assert "there is no command" in launch("local", code=1)
    assert "there is no command" in launch("gke", "--name=a", "--image=i", code=1)
