"""Everything that is trained for one seed of the study."""

from __future__ import annotations

import importlib
import pathlib

from configs import collect_trajectories, distill_d3llm, distill_dparallel, filter_learn2pd
from train import loop
from train.collect import trajectories

# `--size=large`: sections of the configs; ours.
LARGE = {
    "model": {"d_model": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "head_dim": 64,
              "d_ff": 1408, "dtype": "bfloat16"},
    "base": {"optim": {"learning_rate": 6e-4, "warmup_steps": 200}, "train": {"num_steps": 4_000},
             "data": {"batch_size": 128}},
    "student": {"optim": {"learning_rate": 2e-4}, "train": {"num_steps": 600}},
}  # fmt: skip


def make(task: str, size: str, seed: int, folder: pathlib.Path, smoke: bool) -> None:
    """Trains everything of one seed that is not there yet."""
    variant = "runlocal" if smoke else ""
    arg = f"{task},{variant}" if smoke else task
    print(f"\n{task}, seed {seed}: {folder}")

    config = importlib.import_module(f"configs.mdlm_{task}").get_config(variant)
    config.train.seed = config.data.seed = seed
    if size == "large":
        config.model.update(LARGE["model"])
        config.update(LARGE["base"])
    loop.run(config, folder / "base", "base")
    base = str(folder / "base" / "model")

    for name, oracle, num in (("trajectories", False, 0), ("rounds", True, 2_640)):
        config = collect_trajectories.get_config(arg)
        config.checkpoint, config.oracle = base, oracle
        if num and not smoke:
            config.num_examples = num
        trajectories.run(config, folder / name)

    config = filter_learn2pd.get_config(arg)
    config.data.task.path, config.train.init_from = str(folder / "rounds"), base
    config.train.seed = seed
    loop.run(config, folder / "learn2pd", "filter")

    for name, recipe in (("dparallel", distill_dparallel), ("d3llm", distill_d3llm)):
        config = recipe.get_config(arg)
        config.data.task.path = str(folder / "trajectories")
        config.data.task.only_right = not smoke  # a model of a few steps has no right answer
        config.train.init_from = base
        config.train.seed = config.data.seed = seed
        if size == "large":
            config.update(LARGE["student"])
        loop.run(config, folder / name, name)
