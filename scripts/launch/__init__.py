"""Starting one command on many machines: TPU VMs, GKE, Slurm, or several processes of this one.

Each module prints what it would run (`--dry_run`), needs no secret, and starts the same command in
every process; JAX finds out by itself which process it is. A run that was told to stop (SIGTERM,
preemption) saves and ends with `train.host.STOPPED`, upon which every launcher starts it again.
"""
