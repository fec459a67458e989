"""A small draft model learns the distribution of the model it drafts for (DistillSpec, AdaSPEC).

    python -m train --config=configs/distill_draft.py:python --workdir=runs/python/distilled \\
        --config.train.init_from=runs/python/target/model \\
        --config.train.trainable.checkpoint=runs/python/draft/model

Both come from `configs/causal_lm.py`. With ",adaspec" behind the task it learns only the tokens
that another one, distilled like this, has learned better; that one is named by
`--config.train.trainable.reference`. References: arXiv:2310.08461, arXiv:2510.19779 (AdaSPEC);
numbers without a source are ours.
"""

from ml_collections import ConfigDict

from configs import causal_lm


def get_config(arg: str = "python") -> ConfigDict:
    """The settings.

    Args:
      arg: "python" or "scan", perhaps with ",adaspec" behind it; with ",runlocal" at the end a
        smoke test of a few seconds, for models made by `causal_lm.py`'s.
    """
    task, *rest = arg.split(",")
    is_smoke = rest[-1:] == ["runlocal"]
    variants = rest[:-1] if is_smoke else rest
    if task not in causal_lm.TASKS or variants not in ([], ["adaspec"]):
        raise ValueError(
            f"config argument {arg!r} must be one of {', '.join(causal_lm.TASKS)}, ...,adaspec, "
            "and perhaps ...,runlocal"
        )
    config = causal_lm.get_config(f"{task},runlocal" if is_smoke else task)
    objective = {
        "make": "train.objectives.distill_spec:DistillSpec",
        "divergence": "kl",  # or reverse_kl, jsd, tv, nla
        "beta": 0.5,  # of jsd (DistillSpec)
        "temperature": 1.0,  # of both distributions (DistillSpec)
    }
    trainable = {
        "make": "dlm.heads.draft_lm:DraftLM",
        "checkpoint": "",  # folder of the draft model; must be given
    }
    if variants:
        objective = {
            "make": "train.objectives.adaspec:AdaSpec",
            "share": 0.4,  # of the tokens (AdaSPEC)
        }
        trainable["reference"] = ""  # folder of a distilled one; must be given
    config.train.objective = ConfigDict({**objective, "on_prompt": True})
    config.train.trainable = ConfigDict(trainable)
    config.train.init_from = ""  # folder of the target; must be given
    config.optim.learning_rate = 1e-3  # highest
    if not is_smoke:
        config.train.num_steps = 500
        config.train.eval_every = 100  # steps between validations
        config.checkpoint.every = 100  # steps
    return config
