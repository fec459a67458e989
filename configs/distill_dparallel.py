"""Certainty-forcing distillation (dParallel) of a small model, on its own right answers.

    python -m train --config=configs/distill_dparallel.py:waiting_line --workdir=runs/dparallel

Needs `collect_trajectories.py` first. Objective: arXiv:2509.26488, with its temperature, eps and
beta (LLaDA). All parameters are trained, the model being small; the published recipe trains LoRA
(`llada_8b_dparallel.py`).
"""

import importlib

from ml_collections import ConfigDict

from configs.collect_trajectories import parse
from dlm.tasks.presets import TASKS

# Per task, the highest learning rate, and steps. On SCAN 1e-3 costs one model (94 %) 8 points even
# one token per step, 3e-4 none; 2,400 steps at 3e-4 cost two of three models 5 points more than
# 600. On word problems 600 steps, at rates from 1e-4 to 1e-3, leave one model (89 %) at 71 %: sums
# are forgotten at first and must be learned again; 2,400 leave 86 %.
LEARNING_RATES = {"waiting_line": 1e-3, "scan": 3e-4, "word_problems": 1e-3}
NUM_STEPS = {"waiting_line": 600, "scan": 600, "word_problems": 2_400}


def get_config(arg: str = "waiting_line") -> ConfigDict:
    """The settings.

    Args:
      arg: a task, see `dlm.tasks.presets.RECIPES`; with ",runlocal" behind it a smoke test of
        a few seconds.
    """
    task, variant = parse(arg)
    config = importlib.import_module(f"configs.mdlm_{task}").get_config(variant)
    config.data.task = ConfigDict(
        {
            "make": "train.collect.records:Trajectories",
            "path": f"runs/{task}/trajectories",
            "only_right": True,  # wrong answers are not worth being sure of
        }
    )
    config.data.train = ConfigDict({"split": "train"})
    config.data.valid = ConfigDict({"split": "valid"})
    config.train.objective = ConfigDict(
        {
            "make": "train.objectives.certainty_forcing:CertaintyForcing",
            "block_len": TASKS[task].block_len,  # positions per block; published: 32
            "beta": 2.0,  # weight of the entropy (LLaDA)
            "temperature": 0.5,  # of the entropy
            "eps": 1e-3,  # masks are drawn with probability (1 - eps) / 2 + eps
            "remat": True,  # recompute activations: less memory to move
        }
    )
    config.train.init_from = f"runs/{task}/model"  # the teacher is where the student starts
    config.train.num_steps = NUM_STEPS[task] if variant == "" else 20
    config.train.eval_every = 0 if variant == "" else 10
    config.train.num_eval_batches = 2 if variant == "" else 1  # held-out batches of a validation
    config.optim.learning_rate = LEARNING_RATES[task]
    config.optim.weight_decay = 0.01  # decoupled (published)
    return config
