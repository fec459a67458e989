"""A head foresees how long a model's text still gets, for conditional beam search.

    python -m scripts.own_texts --checkpoint=runs/python/target/model --prompts=prompts.jsonl \\
        --out=runs/python/own --num_samples=4
    python -m train --config=configs/length_head.py --workdir=runs/python/length \\
        --config.train.init_from=runs/python/target/model \\
        --config.data.task.path=runs/python/own/train.jsonl \\
        --config.data.valid.path=runs/python/own/valid.jsonl

Then search with `ConditionalBeam(Length(least=20, own=length.load("runs/python/length/model",
lm)[1]))`, of `dlm.heads.length`. Reference: arXiv:2311.08817; numbers without a source are ours.
"""

from ml_collections import ConfigDict, config_dict

from configs.common import check_argument, shrink, training


def get_config(arg: str = "") -> ConfigDict:
    """The settings.

    Args:
      arg: "" or "runlocal": a smoke test of a few seconds, for a model that is given, too.
    """
    check_argument(arg, "", "runlocal")
    config = training(
        model={"dtype": "float32"},  # of matrix products; all else is the model's that is given
        data={
            "task": {
                "make": "dlm.tasks.own_texts:OwnTexts",
                "path": config_dict.placeholder(str),  # what is learned; must be given
            },
            "valid": {"path": config_dict.placeholder(str)},  # held out; must be given
            "tokenizer": "byte",  # that of the model is used instead
            "prompt_len": 64,  # tokens of the longest prompt
            "completion_len": 192,  # tokens that were drawn at most (--gen_len), and not more
            "too_long": "cut",
            "batch_size": 16,  # rows per step
        },
        optim={
            "learning_rate": 1e-3,  # highest
            "warmup_steps": 30,  # steps from 0 to the highest
            "end_factor": 0.1,  # last learning rate over the highest
        },
        train={
            "objective": {"make": "train.objectives.length:LengthLoss"},
            "trainable": {
                "make": "dlm.heads.length:LengthHead",
                "d_hidden": 256,
                "num_buckets": 20,  # the last one begins at 1024 tokens
            },
            "init_from": config_dict.placeholder(str),  # folder of the model; must be given
            "num_steps": 400,
            "eval_every": 100,  # steps between validations
            "num_eval_batches": 8,
        },
        checkpoint={"every": 100},  # steps
    )
    if arg == "runlocal":
        shrink(config, batch_size=2, num_eval_batches=1)
    return config
