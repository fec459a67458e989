"""What `gcloud` is told, to have a slice of TPU VMs and to run a command on it."""

from __future__ import annotations

import shlex

FOLDER = "parallel-decoding"  # on every host


TPUS = ["gcloud", "compute", "tpus"]

# Until the slice is there; a request that came to nothing ends it.
WAIT = (
    'while :; do state=$({state}); case "$state" in ACTIVE) exit 0;; FAILED|SUSPENDED) '
    'echo "the request is $state" >&2; exit 1;; esac; sleep 30; done'
)


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
            ["sh", "-c", WAIT.format(state=state)],
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


def deletion(name: str, zone: str, *, queued: bool) -> list[str]:
    """The command that gives the slice back, and the request if there was one."""
    kind = ["queued-resources", "delete", "--force"] if queued else ["tpu-vm", "delete"]
    return [*TPUS, *kind, name, f"--zone={zone}", "--quiet"]
