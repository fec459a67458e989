"""Pre-training of a masked-diffusion model on the texts of a JSONL file, one token per byte.

    python -m train --config=configs/pretrain_jsonl.py --workdir=runs/pretrain \\
        --config.data.task.path=train.jsonl --config.data.valid.path=held_out.jsonl
    python -m train --config=configs/pretrain_jsonl.py:runlocal --workdir=runs/smoke

The file has one JSON object per line with a field "text" (or name another one with
`--config.data.task.completion="{body}"`). A text may be of any length: texts are joined, each with
its end, and cut into rows (`train.data.rows.Packed`). Rows of one text come one after another, so
that long texts are better cut into several records. Files are held in memory; for more than that,
copy this file and make `data.task` a `dlm.tasks.tfds_source:TfdsTask`.

Objective: LLaDA's, arXiv:2502.09992, Sec. 2.2. `valid/nll_bound` is in nats per byte. Numbers are
ours unless a source is given.
"""

from ml_collections import ConfigDict, config_dict

from configs.common import (
    EXAMPLE,
    MASKED_DIFFUSION,
    SMALL_MODEL,
    TINY_MODEL,
    check_argument,
    shrink,
    training,
)


def get_config(arg: str = "") -> ConfigDict:
    """The settings.

    Args:
      arg: "" or "runlocal": a smoke test of a few seconds.
    """
    check_argument(arg, "", "runlocal")
    config = training(
        model={
            **SMALL_MODEL,
            "d_model": 256,  # width of the residual stream
            "n_layers": 6,
            "n_heads": 8,  # query heads
            "n_kv_heads": 8,  # key/value heads
            "head_dim": 32,  # d_model / n_heads
            "d_ff": 768,  # hidden width of the gated MLP
            "max_seq_len": 256,  # tokens
        },
        data={
            "task": {
                "make": "dlm.tasks.jsonl:JsonlTask",
                "path": config_dict.placeholder(str),  # what is learned; must be given
                "prompt": "",  # none in pre-training
                "completion": "{text}",  # template over the fields of a record
            },
            "valid": {"path": config_dict.placeholder(str)},  # held out; must be given
            "tokenizer": "byte",
            "prompt_len": 0,
            "completion_len": 256,  # tokens per row
            "packing": True,  # no padding
            "batch_size": 32,  # rows per step
        },
        optim={
            "learning_rate": 1e-3,  # highest
            "warmup_steps": 200,  # steps from 0 to the highest
            "end_factor": 0.1,  # last learning rate over the highest
            "weight_decay": 0.1,  # decoupled (LLaDA)
        },
        train={
            "objective": MASKED_DIFFUSION,
            "num_steps": 10_000,
            "eval_every": 500,  # steps between validations
            "num_eval_batches": 8,  # held-out batches of a validation
        },
        checkpoint={"every": 500, "keep": 2},  # steps; latest ones
    )
    if arg == "runlocal":
        config.model.update(TINY_MODEL, max_seq_len=128)
        config.data.task.path = config.data.valid.path = EXAMPLE
        config.data.task.completion = "{question} {answer}"
        config.data.completion_len = 64
        config.optim.update(learning_rate=3e-3, warmup_steps=5)
        shrink(config, batch_size=8, num_eval_batches=2)
    return config
