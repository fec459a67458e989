"""A Slurm cluster of GPU machines: writes the batch script, and submits it.

    python -m scripts.launch.slurm --nodes=4 --gpus_per_node=8 --dry_run -- \\
        python -m train --config=configs/llada_8b_dparallel.py --workdir=/shared/llada \\
        --config.mesh.fsdp=32

One process per GPU; JAX reads who it is from Slurm's own variables. Before its time is up Slurm
tells the job to stop; it saves, and is queued again.
"""

from __future__ import annotations

import pathlib
import shlex
import subprocess

from absl import app, flags

from train.host import STOPPED


def script(command: list[str]) -> str:
    """The batch script."""
    F = flags.FLAGS
    options = {
        "job-name": F.name,
        "nodes": F.nodes,
        "ntasks-per-node": F.gpus_per_node,
        "gpus-per-node": F.gpus_per_node,
        "time": F.time,
        "output": f"{F.name}-%j.log",
        "open-mode": "append",
        "signal": "TERM@300",
    }
    if F.partition:
        options["partition"] = F.partition
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items()]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            f"cd {shlex.quote(F.folder or str(pathlib.Path.cwd()))}",
            f"srun --kill-on-bad-exit=1 {shlex.join(command)}",
            "code=$?",
            f'if [ "$code" -eq {STOPPED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$code"',
            "",
        ]
    )


def main(argv: list[str]) -> None:
    command = argv[1:]
    if not command:
        raise app.UsageError("there is no command: put one behind --")
    text = script(command)
    if flags.FLAGS.dry_run:
        print(text, end="")
        return
    subprocess.run(["sbatch"], input=text, text=True, check=True)


if __name__ == "__main__":
    flags.DEFINE_string("name", "parallel-decoding", "Of the job.")
    flags.DEFINE_integer("nodes", 1, "Machines.", lower_bound=1)
    flags.DEFINE_integer("gpus_per_node", 8, "GPUs, and processes, per machine.", lower_bound=1)
    flags.DEFINE_string("time", "24:00:00", "Limit.")
    flags.DEFINE_string("partition", "", "Of the cluster.")
    flags.DEFINE_string("folder", "", "Of this repository there; this folder if empty.")
    flags.DEFINE_bool("dry_run", False, "Only print the script.")
    app.run(main)
