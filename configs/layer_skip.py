"""A small autoregressive model whose layers can all be exits: it drafts for itself (LayerSkip).

    python -m train --config=configs/layer_skip.py:python --workdir=runs/python/layer_skip

Data, sizes and steps are those of `configs/causal_lm.py`, but for twice as many layers. Decode with
`DynamicExit(exits=(2, 4, 6))`, or with `layer_skip(params, cfg, keep=(0, 1))`. Reference:
arXiv:2404.16710; numbers without a source are ours.
"""

from ml_collections import ConfigDict

from configs import causal_lm


def get_config(arg: str = "python") -> ConfigDict:
    """The settings.

    Args:
      arg: "python" or "scan"; with ",runlocal" behind it a smoke test of a few seconds.
    """
    task, _, size = arg.partition(",")
    if task not in causal_lm.TASKS or size not in ("", "runlocal"):
        raise ValueError(
            f"config argument {arg!r} must be one of {', '.join(causal_lm.TASKS)}, ...,runlocal"
        )
    config = causal_lm.get_config(arg)
    config.model.n_layers *= 2
    config.train.objective = ConfigDict(
        {
            "make": "train.objectives.layer_skip:LayerSkip",
            "exit_scale": 0.2,  # of early exits (LayerSkip: 0.1 to 1)
            "max_dropout": 0.1,  # of the last layer (LayerSkip, from scratch: 0.1)
            "rotation": 2,  # of so many exits one learns in a step
            "ramp": 0.5,  # share of the run after which all exits learn
            "dropout_grows": True,  # from scratch (LayerSkip)
            "on_prompt": True,
            "remat": True,
        }
    )
    return config
