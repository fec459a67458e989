"""Pseudo-trajectory distillation (d3LLM) of a small model, on its own right answers.

    python -m train --config=configs/distill_d3llm.py:waiting_line --workdir=runs/d3llm

Needs `collect_trajectories.py` first. Objective: arXiv:2601.07568, with its ratios, temperature and
beta. All parameters are trained, the model being small; the published recipe trains LoRA of rank
256.
"""

import ml_collections

from configs import distill_dparallel
from configs.collect_trajectories import TASKS, parse


def get_config(arg: str = "waiting_line") -> ml_collections.ConfigDict:
    """The settings: those of `distill_dparallel.py` with another objective.

    Args:
      arg: a task, see `collect_trajectories.TASKS`; with ",runlocal" behind it a smoke test of a
        few seconds.
    """
    task, _ = parse(arg)
    config = distill_dparallel.get_config(arg)
    with config.unlocked():
        config.train.objective = objective = ml_collections.ConfigDict()
        objective.make = "train.objectives.pseudo_trajectory:PseudoTrajectory"
        # Positions per block, rising; published: 16 to 32.
        objective.block_lens = (TASKS[task] // 2, TASKS[task])
        objective.ratios = (0.0, 0.8)  # lowest mask ratio at first, highest at all times
        objective.beta = 2.0  # weight of the entropy
        objective.temperature = 0.5  # of the entropy
        objective.remat = True  # recompute activations: less memory to move
    return config
