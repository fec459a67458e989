"""Learn2PD's filter for a small model: minutes on a CPU.

    python -m train.collect.trajectories --config=configs/collect_trajectories.py:waiting_line \\
        --config.oracle=True --config.num_examples=2640 --out=runs/waiting_line/rounds
    python -m train --config=configs/filter_learn2pd.py:waiting_line \\
        --workdir=runs/waiting_line/filter

Then decode with `LearnedFilter(load_filter("runs/waiting_line/filter/model", lm), 0.9)`, and see
what it accepts with `python -m scripts.acceptance`.
Reference: arXiv:2509.25188, whose learning rate, steps and number of samples these are.
"""

import ml_collections

from configs.collect_trajectories import parse
from configs.common import training
from dlm.tasks.presets import TASKS


def get_config(arg: str = "waiting_line") -> ml_collections.ConfigDict:
    """The settings.

    Args:
      arg: a task, see `dlm.tasks.presets.RECIPES`; with ",runlocal" behind it a smoke test of
        a few seconds.
    """
    task, variant = parse(arg)
    every = 1_000 if variant == "" else 20  # steps
    return training(
        model={"dtype": "float32"},  # of the filter; of the model only the configuration is read
        data={
            "task": {"make": "train.collect.records:Rounds", "path": f"runs/{task}/rounds"},
            "train": {"split": "train"},
            "valid": {"split": "valid"},
            "prompt_len": 0,
            "completion_len": TASKS[task].block_len,  # positions per block; published: 32
            "batch_size": 0,  # all rounds in every step (published)
        },
        optim={
            "learning_rate": 3e-3,  # constant
            "end_factor": 1.0,
            "beta2": 0.999,
            "weight_decay": 0.01,  # decoupled
            "clip_norm": 0.0,
            "keep_best": True,
        },
        train={
            "objective": {
                "make": "train.objectives.learn2pd:Learn2PDLoss",
                # Of decided positions. Published: 1, for a model that repeats the tokens there.
                # These small ones were never trained on them: 12 to 36 % of their proposals there
                # are others.
                "decided_weight": 0.0,
                "tau": 0.9,  # at which false positives are counted
            },
            "trainable": {"make": "train.objectives.learn2pd:FilterOfRounds"},
            "init_from": f"runs/{task}/model",  # what decoded the rounds
            "num_steps": 40_000 if variant == "" else 40,
            "eval_every": every,
            "num_eval_batches": 1,  # it has all rounds
        },
        checkpoint={"every": every},
        log={"every": every},
    )
