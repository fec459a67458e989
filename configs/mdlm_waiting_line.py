"""Masked diffusion on waiting lines: the quickstart's recipe, about a minute and a half on a CPU.

    python -m train --config=configs/mdlm_waiting_line.py --workdir=runs/waiting_line
    python -m train --config=configs/mdlm_waiting_line.py:runlocal --workdir=runs/smoke

Task: `dlm.tasks.waiting_line` (ten operations on lists of names). Objective: LLaDA's,
arXiv:2502.09992. Numbers are ours unless a source is given.
"""

from ml_collections import ConfigDict

from configs.common import (
    MASKED_DIFFUSION,
    SMALL_MODEL,
    TINY_MODEL,
    check_argument,
    shrink,
    training,
)
from dlm.tasks.presets import TASKS

LEARNABLE = ("copy", "reverse", "insert_index", "remove_index", "replace_index")
OTHERS = ("sort", "shuffle", "insert_random", "remove_random", "replace_random")


def get_config(arg: str = "") -> ConfigDict:
    """The settings.

    Args:
      arg: "" or "runlocal": a smoke test of a few seconds.
    """
    check_argument(arg, "", "runlocal")
    config = training(
        model={
            **SMALL_MODEL,
            "max_seq_len": 128,  # tokens; room for longer lists than those trained on
        },
        data={
            "task": {
                "make": "dlm.tasks.waiting_line:WaitingLine",
                # What a model of this size learns in minutes, twice as often as what it does not.
                "operations": (*LEARNABLE, *OTHERS, *LEARNABLE),
                "min_people": 3,  # shortest list (ParallelBench, arXiv:2510.04767)
                "max_people": 6,  # longest list (ParallelBench)
                "num_first_names": 32,  # of 64
                "num_last_names": 32,  # of 64
                "num_shots": 0,  # answered examples in the prompt; ParallelBench has 1
                "seed": 0,  # of the examples
            },
            "train": {"split": "train", "num_examples": 1_000_000},
            "valid": {"split": "test", "num_examples": 1_000},
            "tokenizer": "word",  # one token per name, sentence part or list sign
            "prompt_len": TASKS["waiting_line"].prompt_len,  # tokens
            "completion_len": TASKS["waiting_line"].gen_len,  # tokens, end included
            "batch_size": 64,  # rows per step
            "prefetch": 8,  # batches kept ready
        },
        optim={
            "learning_rate": 3e-3,  # highest
            "warmup_steps": 100,  # steps from 0 to the highest
            "weight_decay": 0.1,  # decoupled (LLaDA)
        },
        train={
            # Every masked token counts the same (LLaDA: 1.0).
            "objective": {**MASKED_DIFFUSION, "weight_power": 0.0},
            "num_steps": 1_500,
            "eval_every": 250,  # steps between validations
        },
        checkpoint={"every": 250, "keep": 2},  # steps; latest ones
    )
    if arg == "runlocal":
        config.model.update(TINY_MODEL)
        config.optim.warmup_steps = 5
        shrink(config, batch_size=8, num_eval_batches=2)
    return config
