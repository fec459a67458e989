"""What `gcloud` is told, to have a slice of TPU VMs and to run a command on it."""

from __future__ import annotations

import shlex

FOLDER = "parallel-decoding"  # on every host


TPUS = ["gcloud", "compute", "tpus"]


def steps(
    command: list[str],
    name: str,
    zone: str,
    accelerator: str,
    version: str,
    *,
    queued: bool,
    spot: bool,
    exists: bool,
) -> list[list[str]]:
    """The commands to run here, in order.

    Args:
      command: to run on every host.
      name, zone: of the slice.
      accelerator: its type, as gcloud calls it.
      version: of the runtime.
      queued: whether to queue for it.
      spot: whether it may be taken away.
      exists: whether it is there already.
    """
    where = [name, f"--zone={zone}"]
    kind = [f"--accelerator-type={accelerator}", *(["--spot"] if spot else [])]
    make = [[*TPUS, "tpu-vm", "create", *where, f"--version={version}", *kind]]
    if queued:
        queue = [*TPUS, "queued-resources"]
        state = shlex.join([*queue, "describe", *where, "--format=value(state.state)"])
        make = [
            [
                *queue,
                "create",
                *where,
                f"--node-id={name}",
                f"--runtime-version={version}",
                *kind,
            ],
            ["sh", "-c", f"until {state} | grep -q ACTIVE; do sleep 30; done"],
        ]
    archive = "repository.tar.gz"
    unpack = (
        f"mkdir -p {FOLDER} && tar -xzf {archive} -C {FOLDER} && cd {FOLDER} && "
        "python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu]'"
    )
    run = f"cd {FOLDER} && PATH=$PWD/.venv/bin:$PATH {shlex.join(command)}"
    on_all = [*TPUS, "tpu-vm", "ssh", *where, "--worker=all", "--command"]
    return [
        *([] if exists else make),
        ["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"],
        [*TPUS, "tpu-vm", "scp", archive, f"{name}:", f"--zone={zone}", "--worker=all"],
        [*on_all, unpack],
        [*on_all, run],
    ]


def deletion(name: str, zone: str) -> list[str]:
    """The command that gives the slice back."""
    return [*TPUS, "tpu-vm", "delete", name, f"--zone={zone}", "--quiet"]
