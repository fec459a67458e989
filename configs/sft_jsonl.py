"""Supervised fine-tuning of a masked-diffusion model on prompts and completions of a JSONL file.

    python -m train --config=configs/sft_jsonl.py --workdir=runs/sft \\
        --config.train.init_from=path/of/a/model \\
        --config.data.task.path=train.jsonl --config.data.valid.path=held_out.jsonl \\
        --config.data.task.prompt="Question: {question}\\nAnswer:" \\
        --config.data.task.completion=" {answer}"
    python -m train --config=configs/sft_jsonl.py:runlocal --workdir=runs/smoke

The file has one JSON object per line, as `configs/example.jsonl`; the templates name its fields.
For a TFDS data set in ArrayRecord format, which is not held in memory, copy this file and make
`data.task` a `dlm.tasks.tfds_source:TfdsTask`.

Recipe: LLaDA's, arXiv:2502.09992, Sec. 2.3 and App. B.1 (4.5 M pairs, 3 epochs): completions are
filled up with EOS, which is learned like any other token. There the learning rate is constant until
it falls in the last tenth, here it is a cosine; averaged parameters and buckets are ours. So are
numbers without a source.
"""

from ml_collections import ConfigDict, config_dict

from configs.common import EXAMPLE, MASKED_DIFFUSION, TINY_MODEL, check_argument, shrink, training


def get_config(arg: str = "") -> ConfigDict:
    """The settings.

    Args:
      arg: "" or "runlocal": a smoke test of a few seconds, from fresh parameters.
    """
    check_argument(arg, "", "runlocal")
    config = training(
        model={"dtype": "bfloat16"},  # of matrix products; all else is the model's that is given
        data={
            "task": {
                "make": "dlm.tasks.jsonl:JsonlTask",
                "path": config_dict.placeholder(str),  # what is learned; must be given
                "prompt": "{question}\n",  # templates over the fields of a record
                "completion": "{answer}",
            },
            "valid": {"path": config_dict.placeholder(str)},  # held out; must be given
            "tokenizer": "byte",  # that of the model is used instead
            "prompt_len": 512,  # tokens of the longest prompt
            "completion_len": 512,  # tokens of the longest completion, end included
            # Shorter shapes (prompt, completion), each compiled once; their batches have as many
            # more rows.
            "buckets": ((64, 128), (128, 160), (128, 256), (256, 320)),
            "batch_size": 64,  # rows per step of the longest shape; by accumulate: 256 (LLaDA)
            "num_threads": 2,  # that make batches ahead
        },
        optim={
            "learning_rate": 2.5e-5,  # highest (LLaDA)
            "warmup_steps": 200,  # steps from 0 to the highest: 50 updates (LLaDA)
            "end_factor": 0.1,  # last learning rate over the highest (LLaDA)
            "weight_decay": 0.1,  # decoupled (LLaDA)
            "accumulate": 4,  # steps per update
            "ema_decay": 0.999,  # of averaged parameters, which are the ones exported
        },
        train={
            "objective": MASKED_DIFFUSION,
            "num_steps": 4_000,  # a quarter as many updates
            "init_from": config_dict.placeholder(str),  # folder of a model; must be given
            "eval_every": 400,  # steps between validations
        },
        checkpoint={"every": 400, "keep": 2},  # steps; latest ones
    )
    if arg == "runlocal":
        config.model = ConfigDict({**TINY_MODEL, "max_seq_len": 128, "dtype": "float32"})
        data = config.data
        data.task.path = data.valid.path = EXAMPLE
        data.prompt_len, data.completion_len = 48, 64
        data.buckets = ((40, 32),)
        config.optim.update(learning_rate=3e-3, warmup_steps=4, accumulate=2, ema_decay=0.9)
        config.train.init_from = ""
        shrink(config, batch_size=4, num_eval_batches=2)
    return config
