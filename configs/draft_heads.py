"""Draft heads for a small autoregressive model, which stays as it is.

    python -m train --config=configs/draft_heads.py:python,medusa --workdir=runs/python/medusa \\
        --config.train.init_from=runs/python/target/model

Instead of medusa: hydra, hydra_plus, eagle_1, eagle_3, dflash, or medusa_2, which changes the model
too. Then decode with, for example, `Medusa(load("runs/python/medusa/model", lm)[1])`. References:
arXiv:2401.10774 (Medusa-1 and -2),
arXiv:2402.05109 (Hydra, Hydra++), arXiv:2401.15077 (EAGLE-1), arXiv:2503.01840 (EAGLE-3),
arXiv:2602.06036 (DFlash). The published learning rates (1e-3, 5e-4, 3e-5, 5e-5, 6e-4) are for
models of billions; these numbers are ours.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import causal_lm

DECAY = 0.8  # of the weight from head to head (Medusa), from step to step (EAGLE-3)
NUM_HEADS = 4  # tokens that are drafted (Hydra)


def _hydra(is_plus: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    objective = {
        "make": "train.objectives.hydra:HydraLoss",
        "decay": DECAY,
        "teacher": is_plus,  # learn the model's distribution, not the text (Hydra++)
    }
    trainable = {
        "make": "dlm.heads.hydra:HydraHeads",
        "num_heads": NUM_HEADS,
        "num_blocks": 4 if is_plus else 1,  # per head (Hydra++)
        "has_prefix": is_plus,  # a layer over the hidden states (Hydra++)
    }
    return objective, trainable


RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # objective, trainable
    "medusa": (
        {"make": "train.objectives.medusa:MedusaLoss", "decay": DECAY},
        {"make": "dlm.heads.medusa:MedusaHeads", "num_heads": NUM_HEADS, "num_blocks": 1},
    ),
    "hydra": _hydra(is_plus=False),
    "hydra_plus": _hydra(is_plus=True),
    "eagle_1": (
        {
            "make": "train.objectives.eagle_1:Eagle1Loss",
            "weight": 0.1,  # of the cross-entropy beside the features' (EAGLE)
            "noise": 0.1,  # half its width, at 512 positions (EAGLE)
        },
        {"make": "dlm.heads.eagle_1:Eagle1Heads"},
    ),
    "eagle_3": (
        {
            "make": "train.objectives.eagle_3:Eagle3Loss",
            "num_steps": 4,  # tokens that are drafted; EAGLE-3: 7
            "decay": DECAY,
        },
        {
            "make": "dlm.heads.eagle_3:Eagle3Heads",
            "layers": (),  # read at their entrance; empty: low, middle, high
            "vocab": "",  # JSON file of scripts/draft_vocab.py; empty: all tokens
        },
    ),
    "dflash": (
        {
            "make": "train.objectives.dflash:DFlashLoss",  # or DPaceLoss (D-PACE)
            "num_anchors": 16,  # blocks per row; DFlash: up to 512
            "reach": 4.0,  # slots after which a token counts 1/e; public codes, blocks of 8
            "teacher": False,  # learn the text, not the model's distribution
        },
        {
            "make": "dlm.heads.dflash:DFlashHeads",
            "n_layers": 2,  # DFlash: 5
            "block_len": 8,  # with the root; DFlash: 16
            "layers": (),  # read at their entrance; empty: spread evenly
            "mask_id": -1,  # the model's own
        },
    ),
    "medusa_2": (
        {
            "make": "train.objectives.medusa_2:Medusa2Loss",
            "weight": 0.2,  # of the heads (Medusa-2)
            "decay": DECAY,
            "from_itself": False,  # the model learns the text, not what it used to say
        },
        {
            "make": "dlm.heads.medusa_2:MedusaJoint",
            "num_heads": NUM_HEADS,
            "num_blocks": 1,  # per head (Medusa)
            "heads": "",  # folder of Medusa-1's heads to start from; empty: fresh ones
            "model_rate": 0.25,  # learning rate of the model over that of the heads (Medusa-2)
        },
    ),
}
HEADS = tuple(name for name in RECIPES if name != "medusa_2")  # the model stays as it is


def get_config(arg: str = "python,medusa") -> ConfigDict:
    """The settings.

    Args:
      arg: "python" or "scan", then one of `RECIPES`, with a comma between them; with ",runlocal"
        behind them a smoke test of a few seconds, for a model made by `causal_lm.py`'s.
    """
    task, heads, *rest = (*arg.split(","), "")
    if task not in causal_lm.TASKS or heads not in RECIPES or rest not in ([""], ["runlocal", ""]):
        raise ValueError(
            f"config argument {arg!r} must be one of {', '.join(causal_lm.TASKS)}, then one of "
            f"{', '.join(RECIPES)}, and perhaps runlocal, with commas between them"
        )
    config = causal_lm.get_config(f"{task},runlocal" if rest[0] else task)
    objective, trainable = RECIPES[heads]
    config.train.objective = ConfigDict({**objective, "on_prompt": True})
    config.train.trainable = ConfigDict(trainable)
    config.train.init_from = ""  # folder of the model; must be given
    config.optim.learning_rate = 2e-3  # highest
    config.optim.weight_decay = 0.0  # (Medusa)
    if not rest[0]:
        config.data.batch_size //= 2  # rows; heads learn faster than their target
        config.train.num_steps = 400
        config.train.eval_every = 100  # steps between validations
        config.checkpoint.every = 100  # steps
    return config
