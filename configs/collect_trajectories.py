"""A model's answers to its own training prompts, and how it came to them.

    python -m train.collect.trajectories --config=configs/collect_trajectories.py:waiting_line \\
        --config.checkpoint=runs/waiting_line/model --out=runs/waiting_line/trajectories

What `distill_dparallel.py`, `distill_d3llm.py` and, with `oracle`, `filter_learn2pd.py` learn from.
One token per step, as all three papers do (arXiv:2509.26488, arXiv:2601.07568, arXiv:2509.25188).
"""

import importlib

from ml_collections import ConfigDict

from dlm.tasks.presets import RECIPES, TASKS


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

    config = ConfigDict()
    config.checkpoint = f"runs/{task}/model"  # the teacher
    config.task = base.data.task.copy_and_resolve_references()
    config.task.update(base.data.train)
    config.method = "one_per_step"
    config.block_len = TASKS[task].block_len  # positions per block
    # All positions are decided, those behind the end too: students learn the padding as well.
    config.changes = ConfigDict({"stopper": "filled"})
    config.oracle = False  # decode a second time for Learn2PD's filter
    config.num_examples = 10_000
    config.prompt_len = base.data.prompt_len  # tokens
    config.gen_len = base.data.completion_len  # tokens
    config.batch_size = 256  # rows decoded at once
    config.examples_per_shard = 2_048
    config.seed = 0  # of sampled methods
    config.dtype = ""  # of the parameters; "": the checkpoint's
    config.tensor = 1  # devices that share the model
    if variant == "runlocal":
        config.num_examples, config.batch_size, config.examples_per_shard = 160, 32, 64
    return config
