"""A TPU slice of a GKE cluster: writes the JobSet, and applies it.

    python -m scripts.launch.gke --name=llada --image=REGION-docker.pkg.dev/PROJECT/images/dlm:1 \\
        --accelerator=tpu-v5-lite-podslice --topology=4x4 --dry_run -- \\
        python -m train --config=configs/llada_8b_dparallel.py --workdir=gs://bucket/llada

The image holds this repository, installed with the `tpu` extra. The cluster has the JobSet
controller (xpk clusters do) and a node pool of the slice. Pods that were told to stop have saved,
and are started again.
"""

from __future__ import annotations

import math
import subprocess
from typing import Any

import yaml
from absl import app, flags


def manifest(command: list[str]) -> dict[str, Any]:
    """The JobSet."""
    F = flags.FLAGS
    chips = math.prod(map(int, F.topology.split("x")))
    hosts = max(chips // F.chips_per_host, 1)
    container = {
        "name": "worker",
        "image": F.image,
        "command": command,
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"limits": {"google.com/tpu": min(chips, F.chips_per_host)}},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 300,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": F.accelerator,
            "cloud.google.com/gke-tpu-topology": F.topology,
        },
        "containers": [container],
    }
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": F.name,
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {"maxRestarts": F.restarts},
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
        },
    }


def main(argv: list[str]) -> None:
    command = argv[1:]
    if not command:
        raise app.UsageError("there is no command: put one behind --")
    text = yaml.safe_dump(manifest(command), sort_keys=False)
    if flags.FLAGS.dry_run:
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
