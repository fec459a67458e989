"""A slice of TPU VMs: makes it (or queues for it), and runs one command on all of its hosts.

    python -m scripts.launch.tpu_vm --name=llada --zone=us-west4-a --type=v5litepod-16 \\
        --dry_run -- python -m train --config=configs/llada_8b_dparallel.py \\
        --workdir=/mnt/bucket/llada --config.train.init_from=/mnt/bucket/LLaDA-8B-Instruct

Steps: queue for the slice and wait until it is there (`--queued`), or make it at once; copy what is
committed here to every host; install it with the `tpu` extra; run the command on every host at
once. Folders must be the same ones on every host: a bucket that is mounted (gcsfuse), or a file
share. The account, the project and permissions are those of `gcloud`. A command that was told to
stop is run again. `--delete` gives the slice back at the end, also if a step failed.
"""

from __future__ import annotations

import shlex
import subprocess
import sys

from absl import app, flags

from scripts.launch.gcloud import deletion, steps
from train.host import STOPPED


def main(argv: list[str]) -> None:
    command = argv[1:]
    if not command:
        raise app.UsageError("there is no command: put one behind --")
    F = flags.FLAGS
    *before, run = steps(
        command, F.name, F.zone, F.type, F.version, queued=F.queued, spot=F.spot, exists=F.exists
    )
    delete = deletion(F.name, F.zone, queued=F.queued)
    if F.dry_run:
        for step in (*before, run, *([delete] if F.delete else [])):
            print(shlex.join(step))
        return
    try:
        code = next((code for step in before if (code := _run(step))), STOPPED)
        while code == STOPPED:
            code = _run(run)
    finally:
        if F.delete:  # whatever went wrong: it costs as long as it is there
            _run(delete)
    sys.exit(code)


def _run(step: list[str]) -> int:
    """Shows a command and runs it: its exit code."""
    print("+", shlex.join(step), file=sys.stderr)
    return subprocess.run(step).returncode


if __name__ == "__main__":
    flags.DEFINE_string("name", None, "Of the slice.", required=True)
    flags.DEFINE_string("zone", None, "Where.", required=True)
    flags.DEFINE_string("type", "v5litepod-16", "Accelerator type, as gcloud calls it.")
    flags.DEFINE_string("version", "v2-alpha-tpuv5-lite", "Runtime version.")
    flags.DEFINE_bool("queued", False, "Queue for it (queued resources).")
    flags.DEFINE_bool("spot", False, "Cheaper, and may be taken away.")
    flags.DEFINE_bool("exists", False, "The slice is there already.")
    flags.DEFINE_bool("delete", False, "Give it back at the end.")
    flags.DEFINE_bool("dry_run", False, "Only print the commands.")
    app.run(main)
