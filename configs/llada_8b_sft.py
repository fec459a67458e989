"""Supervised fine-tuning of LLaDA-8B-Base, all parameters, as it became LLaDA-8B-Instruct.

    python -m train --config=configs/llada_8b_sft.py --workdir=runs/llada_8b/sft \\
        --config.train.init_from=path/of/LLaDA-8B-Base \\
        --config.data.task.path=train.jsonl --config.data.valid.path=held_out.jsonl \\
        --config.train.num_steps=...  # 3 epochs: 3 * pairs / 256
    python -m train --config=configs/llada_8b_sft.py:runlocal --workdir=runs/smoke

The files have one JSON object per line with "question" and "answer", as `configs/example.jsonl`;
`data.task.prompt` and `data.task.completion` take other fields.

Recipe: arXiv:2502.09992, Sec. 2.3 and App. B.1, on 4.5 M pairs. There the last tenth of the
learning rate's schedule is linear, here it is half a cosine. Numbers without a source are ours.

The mesh is 32 chips: v5p:2x4x4, or v6e:4x8 with little to spare (`docs/training.md`). Texts that
are much shorter than 4,096 tokens want a smaller `data.prompt_len` and `data.completion_len`, or
`data.buckets`.
"""

from ml_collections import ConfigDict, config_dict

from configs.common import (
    EXAMPLE,
    LLADA_PROMPT,
    MASKED_DIFFUSION,
    TINY_MODEL,
    check_argument,
    shrink,
    training,
)


def get_config(arg: str = "") -> ConfigDict:
    """The settings.

    Args:
      arg: "" or "runlocal": a smoke test of a few seconds, from fresh parameters of a tiny model.
    """
    check_argument(arg, "", "runlocal")
    config = training(
        model={"dtype": "bfloat16"},  # of matrix products; all else is the model's that is given
        data={
            "task": {
                "make": "dlm.tasks.jsonl:JsonlTask",
                "path": config_dict.placeholder(str),  # what is learned; must be given
                "prompt": LLADA_PROMPT,
                "completion": "{answer}<|eot_id|>",
            },
            "valid": {"path": config_dict.placeholder(str)},  # held out; must be given
            "tokenizer": "byte",  # that of the model is used instead
            "prompt_len": 2048,  # tokens of the longest prompt; 4,096 in all (LLaDA)
            "completion_len": 2048,  # tokens of the longest completion, end included
            "batch_size": 256,  # rows per step (LLaDA)
            "num_threads": 2,  # that make batches ahead
        },
        optim={
            "learning_rate": 2.5e-5,  # highest (LLaDA)
            "warmup_steps": 50,  # steps from 0 to the highest (LLaDA)
            "end_factor": 0.1,  # last learning rate over the highest (LLaDA)
            "decay_share": 0.1,  # share of the steps in which it falls (LLaDA)
            "weight_decay": 0.1,  # decoupled (LLaDA)
        },
        train={
            "objective": MASKED_DIFFUSION,
            "num_steps": 52_734,  # 3 epochs of the published 4.5 M pairs (LLaDA)
            "init_from": config_dict.placeholder(str),  # folder of the model; must be given
            "eval_every": 500,  # steps between validations
        },
        checkpoint={"every": 500, "keep": 2},  # steps; latest ones
        log={"every": 10},  # steps between lines of metrics.jsonl
        mesh={"fsdp": 32},  # shards of batch and parameters
    )
    if arg == "runlocal":
        config.model = ConfigDict({**TINY_MODEL, "max_seq_len": 384, "dtype": "float32"})
        config.data.task.path = config.data.valid.path = EXAMPLE
        config.data.prompt_len, config.data.completion_len = 192, 96
        config.optim.update(learning_rate=3e-3, warmup_steps=4)
        config.train.init_from = ""
        shrink(config, batch_size=4, num_eval_batches=1)
        config.mesh.fsdp = 1
    return config
