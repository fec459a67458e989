"""A TPU slice of a GKE cluster: writes the JobSet, and applies it.

    python -m scripts.launch.gke --name=llada --image=REGION-docker.pkg.dev/PROJECT/images/dlm:1 \\
        --accelerator=tpu-v5-lite-podslice --topology=4x4 --dry_run -- \\
        python -m train --config=configs/llada_8b_dparallel.py --workdir=/mnt/bucket/llada

The image holds this repository, installed with the `tpu` extra, and mounts what all pods share,
such as a bucket (gcsfuse). The cluster has the JobSet
controller (xpk clusters do) and a node pool of the slice. Pods that were told to stop have saved,
and are started again.
"""

from __future__ import annotations

import subprocess

import yaml
from absl import app, flags

from scripts.launch.jobset import manifest


def main(argv: list[str]) -> None:
    command = argv[1:]
    if not command:
        raise app.UsageError("there is no command: put one behind --")
    F = flags.FLAGS
    jobset = manifest(
        command, F.name, F.image, F.accelerator, F.topology,
        chips_per_host=F.chips_per_host, restarts=F.restarts,
    )  # fmt: skip
    text = yaml.safe_dump(jobset, sort_keys=False)
    if F.dry_run:
        print(text, end="")
        return
    subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True, check=True)


if __name__ == "__main__":
    flags.DEFINE_string("name", None, "Of the JobSet.", required=True)
    flags.DEFINE_string("image", None, "Container image.", required=True)
    flags.DEFINE_string("accelerator", "tpu-v5-lite-podslice", "As GKE calls it.")
    flags.DEFINE_string("topology", "4x4", "Of the slice.")
    flags.DEFINE_integer("chips_per_host", 4, "Of that accelerator.", lower_bound=1)
    flags.DEFINE_integer("restarts", 100, "After failures or preemptions.", lower_bound=0)
    flags.DEFINE_bool("dry_run", False, "Only print the manifest.")
    app.run(main)
