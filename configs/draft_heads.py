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

import ml_collections

from configs import causal_lm

HEADS = ("medusa", "hydra", "hydra_plus", "eagle_1", "eagle_3", "dflash")
ARGUMENTS = (*HEADS, "medusa_2")


def get_config(arg: str = "python,medusa") -> ml_collections.ConfigDict:
    """The settings.

    Args:
      arg: "python" or "scan", then one of `ARGUMENTS`, with a comma between them; with ",runlocal"
        behind them a smoke test of a few seconds, for a model made by `causal_lm.py`'s.
    """
    task, heads, *rest = (*arg.split(","), "")
    if (
        task not in causal_lm.TASKS
        or heads not in ARGUMENTS
        or rest not in ([""], ["runlocal", ""])
    ):
        raise ValueError(
            f"config argument {arg!r} must be one of {', '.join(causal_lm.TASKS)}, then one of "
            f"{', '.join(ARGUMENTS)}, and perhaps runlocal, with commas between them"
        )
    config = causal_lm.get_config(f"{task},runlocal" if rest[0] else task)
    with config.unlocked():
        config.train.objective = objective = ml_collections.ConfigDict()
        objective.on_prompt = True
        config.train.trainable = trainable = ml_collections.ConfigDict()
    if heads in ("medusa", "medusa_2", "hydra", "hydra_plus"):
        objective.decay = 0.8  # of the weight from head to head (Medusa)
        trainable.num_heads = 4  # tokens that are drafted (Hydra)
        trainable.num_blocks = 4 if heads == "hydra_plus" else 1  # per head (Medusa, Hydra++)
    if heads == "medusa":
        objective.make = "train.objectives.medusa:MedusaLoss"
        trainable.make = "dlm.heads.medusa:MedusaHeads"
    elif heads == "medusa_2":
        objective.make = "train.objectives.medusa_2:Medusa2Loss"
        objective.weight = 0.2  # of the heads (Medusa-2)
        objective.from_itself = False  # the model learns the text, not what it used to say
        trainable.make = "dlm.heads.medusa_2:MedusaJoint"
        trainable.heads = ""  # folder of Medusa-1's heads to start from; empty: fresh ones
        trainable.model_rate = 0.25  # learning rate of the model over that of the heads (Medusa-2)
    elif heads in ("hydra", "hydra_plus"):
        objective.make = "train.objectives.hydra:HydraLoss"
        objective.teacher = heads == "hydra_plus"  # learn the model's law, not the text (Hydra++)
        trainable.has_prefix = heads == "hydra_plus"  # a layer over the hidden states (Hydra++)
        trainable.make = "dlm.heads.hydra:HydraHeads"
    elif heads == "eagle_1":
        objective.make = "train.objectives.eagle_1:Eagle1Loss"
        objective.weight = 0.1  # of the cross-entropy beside the features' (EAGLE)
        objective.noise = 0.1  # half its width, at 512 positions (EAGLE)
        trainable.make = "dlm.heads.eagle_1:Eagle1Heads"
    elif heads == "eagle_3":
        objective.make = "train.objectives.eagle_3:Eagle3Loss"
        objective.num_steps = 4  # tokens that are drafted; EAGLE-3: 7
        objective.decay = 0.8  # of the weight from step to step (EAGLE-3)
        trainable.make = "dlm.heads.eagle_3:Eagle3Heads"
        trainable.layers = ()  # read at their entrance; empty: low, middle, high
        trainable.vocab = ""  # JSON file of scripts/draft_vocab.py; empty: all tokens
    else:
        objective.make = "train.objectives.dflash:DFlashLoss"  # or DPaceLoss (D-PACE)
        objective.num_anchors = 16  # blocks per row; DFlash: up to 512
        objective.reach = 4.0  # slots after which a token counts 1/e; public codes, blocks of 8
        objective.teacher = False  # learn the text, not the model's law
        trainable.make = "dlm.heads.dflash:DFlashHeads"
        trainable.n_layers = 2  # DFlash: 5
        trainable.block_len = 8  # with the root; DFlash: 16
        trainable.layers = ()  # read at their entrance; empty: spread evenly
        trainable.mask_id = -1  # the model's own
    config.train.init_from = ""  # folder of the model; must be given
    config.optim.learning_rate = 2e-3  # highest
    config.optim.weight_decay = 0.0  # (Medusa)
    if not rest[0]:
        config.data.batch_size //= 2  # rows; heads learn faster than their target
        config.train.num_steps = 400
        config.train.eval_every = 100  # steps between validations
        config.checkpoint.every = 100  # steps
    return config
