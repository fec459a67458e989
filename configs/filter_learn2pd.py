"""Learn2PD's filter for a small model: about a minute on a CPU.

    python -m train.collect.trajectories --config=configs/collect_trajectories.py:waiting_line \\
        --config.oracle=True --config.num_examples=2640 --out=runs/waiting_line/rounds
    python -m train.learn2pd --config=configs/filter_learn2pd.py:waiting_line \\
        --workdir=runs/waiting_line/filter

Then decode with `LearnedFilter(load_filter("runs/waiting_line/filter/filter", lm), 0.9)`.
Reference: arXiv:2509.25188, whose learning rate, steps and number of samples these are.
"""

import ml_collections

from configs.collect_trajectories import parse


def get_config(arg: str = "waiting_line") -> ml_collections.ConfigDict:
    """The settings.

    Args:
      arg: a task, see `dlm.tasks.presets.RECIPES`; with ",runlocal" behind it a smoke test of
        a few seconds.
    """
    task, variant = parse(arg)
    config = ml_collections.ConfigDict()
    config.trajectories = f"runs/{task}/rounds"  # made with oracle=True
    config.num_steps = 40_000 if variant == "" else 40
    config.eval_every = 1_000 if variant == "" else 20  # steps
    config.learning_rate = 3e-3  # constant
    config.weight_decay = 0.01  # decoupled
    # Of decided positions in the loss. Published: 1, for a model that repeats the tokens there.
    # These small ones were never trained on them: 12 to 36 % of their proposals there are others.
    config.decided_weight = 0.0
    config.tau = 0.9  # at which false positives are counted
    config.seed = 0  # of the initial weights
    return config
