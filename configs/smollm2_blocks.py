"""A block-diffusion model made from SmolLM2-135M-Instruct, on its own answers.

    python -m scripts.smollm2 --steps=answers --data=path/of/data       once
    python -m train --config=configs/smollm2_blocks.py:4 --workdir=runs/smollm2/blocks_4

A low-rank change teaches it to write blocks of four, or of eight behind those of four: blocks of
one are what it does already. Each token is masked in one of two copies; the clean copy is read from
left to right and goes on learning the next token, so the same weights judge what they draft
(`SelfSpeculation`). Decode with `causal_context`. References of each choice:
`train/objectives/block_diffusion.py`; numbers are ours. Two and a half hours on two CPU cores.
"""

from ml_collections import ConfigDict

from configs.common import training
from configs.smollm2 import DATA


def get_config(arg: str = "4") -> ConfigDict:
    """The settings.

    Args:
      arg: positions per block, 4 or 8.
    """
    if arg not in ("4", "8"):
        raise ValueError(f"config argument {arg!r} must be 4 or 8")
    block_len = int(arg)
    return training(
        model={"dtype": "bfloat16"},  # of matrix products, twice as fast on CPUs that have it
        data={**DATA, "batch_size": 4},
        optim={
            "learning_rate": 1e-3,  # highest
            "warmup_steps": 30,  # steps from 0 to the highest
            "end_factor": 0.1,  # last learning rate over the highest
        },
        train={
            "objective": {
                "make": "train.objectives.block_diffusion:BlockDiffusion",
                "block_len": block_len,
                "schedule": (4,) if block_len > 4 else (),
                "eps": 0.05,  # of so few positions hardly fewer are masked
                "weight_power": 0.0,  # every masked token counts the same (Fast-dLLM v2)
                "complementary": True,
                "causal_context": True,
                "next_token": 1.0,
            },
            "trainable": {"make": "dlm.lora:Lora", "rank": 16, "alpha": 32.0},
            "init_from": "smollm2",
            "with_mask": {"mask_token": "<reponame>"},  # which no text of a chat has
            "num_steps": 450,
            "eval_every": 150,  # steps between validations
            "num_eval_batches": 8,
        },
        checkpoint={"every": 25},  # steps
    )
