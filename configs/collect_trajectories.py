"""A model's answers to its own training prompts, and how it came to them.

    python -m train.collect.trajectories --config=configs/collect_trajectories.py:waiting_line \\
        --config.checkpoint=runs/waiting_line/model --out=runs/waiting_line/trajectories

What `distill_dparallel.py`, `distill_d3llm.py` and, with `oracle`, `filter_learn2pd.py` learn from.
One token per step, as all three papers do (arXiv:2509.26488, arXiv:2601.07568, arXiv:2509.25188).
"""

import importlib

from ml_collections import ConfigDict

from configs.common import section
from dlm.tasks.presets import RECIPES, TASKS
from train.collect.config import TrajectoryConfig


def parse(arg: str) -> tuple[str, str]:
    """The task of a config argument, and "" or "runlocal"; ValueError if it is neither."""
    task, _, variant = arg.partition(",")
    if task not in RECIPES or variant not in ("", "runlocal"):
        raise ValueError(
            f"config argument {arg!r} must be one of {', '.join(RECIPES)}, ...,runlocal"
        )
    return task, variant


def get_config(arg: str = "waiting_line") -> ConfigDict:
    """The settings.

    Args:
      arg: a task, see `dlm.tasks.presets.RECIPES`; with ",runlocal" behind it a smoke test of a few
        seconds.
    """
    task, variant = parse(arg)
    base = importlib.import_module(f"configs.mdlm_{task}").get_config()

    config = section(
        TrajectoryConfig,
        {
            "checkpoint": f"runs/{task}/model",  # the teacher
            "task": {**base.data.task.to_dict(), **base.data.train.to_dict()},
            "block_len": TASKS[task].block_len,  # positions per block
            # All positions are decided, those behind the end too: students learn the padding too.
            "changes": {"stopper": "filled"},
            "num_examples": 10_000,
            "prompt_len": base.data.prompt_len,  # tokens
            "gen_len": base.data.completion_len,  # tokens
            "batch_size": 256,  # rows decoded at once
            "examples_per_shard": 2_048,
        },
    )
    if variant == "runlocal":
        config.num_examples, config.batch_size, config.examples_per_shard = 160, 32, 64
    return config
