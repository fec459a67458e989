"""dParallel for LLaDA-8B-Instruct: LoRA that makes it sure of many of its own tokens at once.

    python -m train.trajectories --config=... --out=runs/llada_8b/trajectories
    python -m train --config=configs/llada_8b_dparallel.py --workdir=runs/llada_8b/dparallel \\
        --config.train.init_from=path/of/LLaDA-8B-Instruct \\
        --config.data.task.path=runs/llada_8b/trajectories \\
        --config.train.num_steps=...  # 6 epochs: 6 * trajectories / 64

Recipe: arXiv:2509.26488 and its public code. Trajectories are the model's own answers, decoded one
token per step in blocks of 32 (`train.trajectories`), here only right ones. Numbers without a
source are ours. The published run had eight devices with one row each and accumulated eight steps;
here the 64 rows of an update are one step. Decode the result, `model` or `adapter` in the workdir,
with `--methods=entropy` and blocks of 32.

The mesh is eight chips: v5e:2x4 is enough (`docs/training.md`). On fewer, accumulate: half the
`data.batch_size`, twice `optim.accumulate` and `train.num_steps`.
"""

import ml_collections
from ml_collections import config_dict


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The settings.

    Args:
      arg: ""; "released": adapts only the four weights that the public code's names ("q_proj",
        "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj") meet in LLaDA;
        "runlocal": a smoke test of a few seconds on a tiny model, given as the large one.
    """
    if arg not in ("", "released", "runlocal"):
        raise ValueError(f"config argument {arg!r} must be '', 'released' or 'runlocal'")
    config = ml_collections.ConfigDict()

    config.model = model = ml_collections.ConfigDict()
    model.dtype = "bfloat16"  # of matrix products; all else is the model's that is given

    config.data = data = ml_collections.ConfigDict()
    data.task = ml_collections.ConfigDict()
    data.task.make = "train.trajectories:Trajectories"
    data.task.path = config_dict.placeholder(str)  # what the model said; must be given
    data.task.only_right = True  # answers that the task's scorer calls right
    data.train = ml_collections.ConfigDict({"split": "train"})
    data.valid = ml_collections.ConfigDict({"split": "valid"})
    data.tokenizer = "byte"  # that of the model is used instead
    data.prompt_len = 640  # tokens of the longest prompt; 1,024 positions in all
    data.completion_len = 384  # tokens, EOS padding included (published)
    data.batch_size = 64  # rows per step, each seen twice; 64 per update (published)
    data.seed = 0  # of the order
    data.num_threads = 2  # that make batches ahead
    data.prefetch = 4  # batches kept ready

    config.optim = optim = ml_collections.ConfigDict()
    optim.learning_rate = 2e-5  # constant (published)
    optim.warmup_steps = 0  # steps from 0 to the highest
    optim.decay_steps = 0  # step at which the schedule ends; 0: train.num_steps
    optim.end_factor = 1.0  # last learning rate over the highest; 1: constant
    optim.decay_share = 1.0  # share of the steps in which it falls
    optim.beta1 = 0.9  # Adam
    optim.beta2 = 0.999  # Adam
    optim.eps = 1e-8  # Adam
    optim.weight_decay = 0.01  # decoupled (published)
    optim.clip_norm = 1.0  # global norm of the gradient (published)
    optim.accumulate = 1  # steps per update
    optim.ema_decay = 0.0  # of averaged parameters; 0: none

    config.train = train = ml_collections.ConfigDict()
    train.objective = objective = ml_collections.ConfigDict()
    objective.make = "train.objectives.certainty_forcing:CertaintyForcing"
    objective.block_len = 32  # positions per block (published)
    objective.beta = 2.0  # weight of the entropy (published)
    objective.temperature = 0.5  # of the entropy (published)
    objective.eps = 1e-3  # masks are drawn with probability (1 - eps) / 2 + eps (published)
    objective.remat = True  # recompute activations: less memory
    train.trainable = lora = ml_collections.ConfigDict()
    lora.make = "dlm.lora:Lora"
    lora.rank = 128  # (published)
    lora.alpha = 128.0  # the change counts alpha / rank (published)
    lora.targets = ("q", "k", "v", "up") if arg == "released" else (
        "q", "k", "v", "o", "gate", "up", "down",
    )  # fmt: skip
    train.num_steps = config_dict.placeholder(int)  # 6 epochs (published); must be given
    train.seed = 0  # of LoRA's first values, blocks and masks
    train.master_dtype = "float32"  # in which LoRA's parameters are kept
    train.init_from = config_dict.placeholder(str)  # folder of the model; must be given
    train.eval_every = 200  # steps between validations
    train.num_eval_batches = 4  # held-out batches of a validation

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every = 200  # steps
    checkpoint.keep = 2  # latest ones

    config.log = log = ml_collections.ConfigDict()
    log.every = 10  # steps between lines of metrics.jsonl
    log.progress = True  # bar on terminals
    log.tensorboard = False  # needs the extra `log`
    log.wandb_project = ""  # needs the extra `log`

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = 1  # shards of the batch
    mesh.fsdp = 8  # shards of batch and parameters
    mesh.tensor = 1  # shards of heads, MLP width and vocabulary

    if arg == "runlocal":
        model.dtype = "float32"
        data.prompt_len, data.completion_len = 28, 24
        data.batch_size = 4
        objective.block_len = 8
        lora.rank, lora.alpha = 4, 4.0
        train.num_steps = 20
        train.eval_every = 10
        train.num_eval_batches = 1
        checkpoint.every = 10
        log.every = 5
        mesh.fsdp = 1
    return config
