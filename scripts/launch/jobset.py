"""A TPU slice of a GKE cluster, as a JobSet."""

from __future__ import annotations

import math
from typing import Any


def manifest(
    command: list[str],
    name: str,
    image: str,
    accelerator: str,
    topology: str,
    *,
    chips_per_host: int,
    restarts: int,
) -> dict[str, Any]:
    """A JobSet that runs a command on every host of a slice.

    Args:
      command: what to run.
      name: of the JobSet.
      image: of the container.
      accelerator: as GKE calls it.
      topology: of the slice, such as "4x4".
      chips_per_host: of that accelerator.
      restarts: after failures or preemptions.
    """
    chips = math.prod(map(int, topology.split("x")))
    hosts = max(chips // chips_per_host, 1)
    container = {
        "name": "worker",
        "image": image,
        "command": command,
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"limits": {"google.com/tpu": min(chips, chips_per_host)}},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 300,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": topology,
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
            "name": name,
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {"maxRestarts": restarts},
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
        },
    }
