"""Pseudo-trajectory distillation (d3LLM) of a small model, on its own right answers.

    python -m train --config=configs/distill_d3llm.py:waiting_line --workdir=runs/d3llm

Needs `collect_trajectories.py` first. Objective: arXiv:2601.07568, with its ratios, temperature and
beta. All parameters are trained, the model being small; the published recipe trains LoRA of rank
256.
"""

from ml_collections import ConfigDict

from configs import distill_dparallel
from configs.collect_trajectories import parse
from dlm.tasks.presets import TASKS


def get_config(arg: str = "waiting_line") -> ConfigDict:
    """The settings: those of `distill_dparallel.py` with another objective.

    Args:
      arg: a task, see `dlm.tasks.presets.RECIPES`; with ",runlocal" behind it a smoke test of a
        few seconds.
    """
    task, _ = parse(arg)
    config = distill_dparallel.get_config(arg)
    block_len = TASKS[task].block_len
    config.train.objective = ConfigDict(
        {
            "make": "train.objectives.pseudo_trajectory:PseudoTrajectory",
            # Positions per block, rising; published: 16 to 32.
            "block_lens": (block_len // 2, block_len),
            "ratios": (0.0, 0.8),  # lowest mask ratio at first, highest at all times
            "beta": 2.0,  # weight of the entropy
            "temperature": 0.5,  # of the entropy
            "remat": True,  # recompute activations: less memory to move
        }
    )
    return config
