"""DistillSpec: a small draft model learns the law of the model it drafts for.

    python -m train --config=configs/distill_draft.py:python --workdir=runs/python/distilled \\
        --config.train.init_from=runs/python/target/model \\
        --config.train.trainable.checkpoint=runs/python/draft/model

Both come from `configs/causal_lm.py`. Reference: arXiv:2310.08461; numbers without a source are
ours.
"""

import ml_collections

from configs import causal_lm


def get_config(arg: str = "python") -> ml_collections.ConfigDict:
    """The settings.

    Args:
      arg: "python" or "scan"; with ",runlocal" behind it a smoke test of a few seconds, for models
        made by `causal_lm.py`'s.
    """
    task, _, variant = arg.partition(",")
    if task not in causal_lm.TASKS or variant not in ("", "runlocal"):
        raise ValueError(
            f"config argument {arg!r} must be one of {', '.join(causal_lm.TASKS)}, ...,runlocal"
        )
    config = causal_lm.get_config(arg)
    with config.unlocked():
        config.train.objective = objective = ml_collections.ConfigDict()
        objective.make = "train.objectives.distill_spec:DistillSpec"
        objective.divergence = "kl"  # or reverse_kl, jsd, tv, nla
        objective.beta = 0.5  # of jsd (DistillSpec)
        objective.temperature = 1.0  # of both laws (DistillSpec)
        objective.on_prompt = True
        config.train.trainable = trainable = ml_collections.ConfigDict()
        trainable.make = "dlm.heads.draft_lm:DraftLM"
        trainable.checkpoint = ""  # folder of the draft model; must be given
    config.train.init_from = ""  # folder of the target; must be given
    config.optim.learning_rate = 1e-3  # highest
    if variant == "":
        config.train.num_steps = 500
        config.train.eval_every = 100  # steps between validations
        config.checkpoint.every = 100  # steps
    return config
