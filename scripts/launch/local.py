"""Several processes on this machine, as on a pod: to try a multi-host run, or one GPU per process.

    python -m scripts.launch.local --processes=4 -- \\
        python -m train --config=configs/mdlm_waiting_line.py:runlocal --workdir=runs/four \\
        --config.mesh.fsdp=4

Process 0 writes to this terminal, the others to `--logs`. If one fails, the others are ended,
and the launcher ends with its exit code; if they were told to stop and have saved, they are started
again, up to `--restarts` times. Ctrl-C, SIGTERM and SIGHUP are passed on; after these
they are not.
"""

from __future__ import annotations

import pathlib
import shlex
import sys

from absl import app, flags

from scripts.launch.processes import environments, run_once
from train.host import STOPPED


def main(argv: list[str]) -> None:
    command = argv[1:]
    if not command:
        raise app.UsageError("there is no command: put one behind --")
    num = flags.FLAGS.processes
    if flags.FLAGS.dry_run:
        for own in environments(num, "localhost:<free port>"):
            print(" ".join(f"{k}={v}" for k, v in own.items()), shlex.join(command))
        return
    for left in range(flags.FLAGS.restarts, -1, -1):
        code, was_told = run_once(command, num, pathlib.Path(flags.FLAGS.logs))
        if code != STOPPED or was_told or not left:
            sys.exit(code)
        print("Stopped and saved; starting again.", file=sys.stderr)


if __name__ == "__main__":
    flags.DEFINE_integer("processes", 2, "How many.", lower_bound=1)
    flags.DEFINE_integer("restarts", 0, "After runs that were told to stop.", lower_bound=0)
    flags.DEFINE_string("logs", "runs/logs", "Where processes but the first one write.")
    flags.DEFINE_bool("dry_run", False, "Only print the commands.")
    app.run(main)
