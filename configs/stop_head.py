"""SpecDec++'s head says when a draft model should stop: it learns which drafts are accepted.

    python -m train --config=configs/stop_head.py:python --workdir=runs/python/stop \\
        --config.train.init_from=runs/python/draft/model \\
        --config.train.trainable.target=runs/python/target/model

Both come from `configs/causal_lm.py`. Reference: arXiv:2405.19715; numbers without a source are
ours.
"""

from ml_collections import ConfigDict

from configs import causal_lm


def get_config(arg: str = "python") -> ConfigDict:
    """The settings.

    Args:
      arg: "python" or "scan"; with ",runlocal" behind it a smoke test of a few seconds, for models
        made by `causal_lm.py`'s.
    """
    task, _, smoke = arg.partition(",")
    if task not in causal_lm.TASKS or smoke not in ("", "runlocal"):
        raise ValueError(
            f"config argument {arg!r} must be one of {', '.join(causal_lm.TASKS)}, ...,runlocal"
        )
    config = causal_lm.get_config(f"{task},runlocal" if smoke else task)
    config.train.objective = ConfigDict(
        {
            "make": "train.objectives.specdec_pp:StopLoss",
            "weight": 6.0,  # of rejection (SpecDec++)
            "share": 0.15,  # of tokens that are the text's own (SpecDec++)
            "temperature": 0.0,  # drafts are the most probable tokens; SpecDec++: 1
            "on_prompt": True,
        }
    )
    config.train.trainable = ConfigDict(
        {
            "make": "dlm.heads.specdec_pp:StopHead",
            "target": "",  # folder of the model that judges; must be given
            "num_blocks": 3,  # (SpecDec++)
        }
    )
    config.train.init_from = ""  # folder of the draft model; must be given
    config.optim.learning_rate = 1e-3  # highest; SpecDec++: 5e-5, for models of billions
    if not smoke:
        config.train.num_steps = 300
        config.train.eval_every = 100  # steps between validations
        config.checkpoint.every = 100  # steps
    return config
