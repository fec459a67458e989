"""dParallel for LLaDA-8B-Instruct: LoRA that makes it sure of many of its own tokens at once.

    python -m train.collect.trajectories --config=... --out=runs/llada_8b/trajectories
    python -m train --config=configs/llada_8b_dparallel.py --workdir=runs/llada_8b/dparallel \\
        --config.train.init_from=path/of/LLaDA-8B-Instruct \\
        --config.data.task.path=runs/llada_8b/trajectories \\
        --config.train.num_steps=...  # 6 epochs: 6 * trajectories / 64

Recipe: arXiv:2509.26488 and its public code. Trajectories are the model's own answers, decoded one
token per step in blocks of 32 (`train.collect.trajectories`), here only right ones. Numbers without
a source are ours. The published run had eight devices with one row each and accumulated eight
steps; here the 64 rows of an update are one step. Decode the result, `model` or `adapter` in the
workdir, with `--methods=entropy` and blocks of 32.

The mesh is eight chips: v5e:2x4 is enough (`docs/training.md`). On fewer, accumulate: half the
`data.batch_size`, twice `optim.accumulate` and `train.num_steps`.
"""

from ml_collections import ConfigDict, config_dict

from configs.common import check_argument, shrink, training


def get_config(arg: str = "") -> ConfigDict:
    """The settings.

    Args:
      arg: ""; "released": adapts only the four weights that the public code's names ("q_proj",
        "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj") meet in LLaDA;
        "runlocal": a smoke test of a few seconds on a tiny model, given as the large one.
    """
    check_argument(arg, "", "released", "runlocal")
    targets = ("q", "k", "v", "o", "gate", "up", "down")
    config = training(
        model={"dtype": "bfloat16"},  # of matrix products; all else is the model's that is given
        data={
            "task": {
                "make": "train.collect.records:Trajectories",
                "path": config_dict.placeholder(str),  # what the model said; must be given
                "only_right": True,  # answers that the task's scorer calls right
            },
            "train": {"split": "train"},
            "valid": {"split": "valid"},
            "tokenizer": "byte",  # that of the model is used instead
            "prompt_len": 640,  # tokens of the longest prompt; 1,024 positions in all
            "completion_len": 384,  # tokens, EOS padding included (published)
            "batch_size": 64,  # rows per step, each seen twice; 64 per update (published)
            "num_threads": 2,  # that make batches ahead
        },
        optim={
            "learning_rate": 2e-5,  # constant (published)
            "end_factor": 1.0,  # last learning rate over the highest; 1: constant
            "beta2": 0.999,  # Adam
            "weight_decay": 0.01,  # decoupled (published)
            "clip_norm": 1.0,  # global norm of the gradient (published)
        },
        train={
            "objective": {
                "make": "train.objectives.certainty_forcing:CertaintyForcing",
                "block_len": 32,  # positions per block (published)
                "beta": 2.0,  # weight of the entropy (published)
                "temperature": 0.5,  # of the entropy (published)
                "eps": 1e-3,  # masks are drawn with probability (1 - eps) / 2 + eps (published)
                "remat": True,  # recompute activations: less memory
            },
            "trainable": {
                "make": "dlm.lora:Lora",
                "rank": 128,  # (published)
                "alpha": 128.0,  # the change counts alpha / rank (published)
                "targets": ("q", "k", "v", "up") if arg == "released" else targets,
            },
            "num_steps": config_dict.placeholder(int),  # 6 epochs (published); must be given
            "init_from": config_dict.placeholder(str),  # folder of the model; must be given
            "eval_every": 200,  # steps between validations
        },
        checkpoint={"every": 200, "keep": 2},  # steps; latest ones
        log={"every": 10},  # steps between lines of metrics.jsonl
        mesh={"fsdp": 8},  # shards of batch and parameters
    )
    if arg == "runlocal":
        config.model.dtype = "float32"
        config.data.prompt_len, config.data.completion_len = 28, 24
        config.train.objective.block_len = 8
        config.train.trainable.update(rank=4, alpha=4.0)
        shrink(config, batch_size=4, num_eval_batches=1)
        config.mesh.fsdp = 1
    return config
