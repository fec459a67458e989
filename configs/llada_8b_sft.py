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

import pathlib

import ml_collections
from ml_collections import config_dict

EXAMPLE = str(pathlib.Path(__file__).with_name("example.jsonl"))


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The settings.

    Args:
      arg: "" or "runlocal": a smoke test of a few seconds, from fresh parameters of a tiny model.
    """
    if arg not in ("", "runlocal"):
        raise ValueError(f"config argument {arg!r} must be '' or 'runlocal'")
    config = ml_collections.ConfigDict()

    config.model = model = ml_collections.ConfigDict()
    model.dtype = "bfloat16"  # of matrix products; all else is the model's that is given

    config.data = data = ml_collections.ConfigDict()
    data.task = ml_collections.ConfigDict()
    data.task.make = "dlm.tasks.jsonl:JsonlTask"
    data.task.path = config_dict.placeholder(str)  # what is learned; must be given
    # Templates over the fields of a record, as LLaDA's chat template writes one turn.
    data.task.prompt = (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    data.task.completion = "{answer}<|eot_id|>"
    data.train = ml_collections.ConfigDict()
    data.valid = ml_collections.ConfigDict()
    data.valid.path = config_dict.placeholder(str)  # held out; must be given
    data.tokenizer = "byte"  # that of the model is used instead
    data.prompt_len = 2048  # tokens of the longest prompt
    data.completion_len = (
        2048  # tokens of the longest completion, end included; 4,096 in all (LLaDA)
    )
    data.batch_size = 256  # rows per step (LLaDA)
    data.buckets = ()  # shorter (prompt, completion), each compiled once, with more rows
    data.packing = False
    data.seed = 0  # of the order
    data.num_threads = 2  # that make batches ahead
    data.prefetch = 4  # batches kept ready

    config.optim = optim = ml_collections.ConfigDict()
    optim.learning_rate = 2.5e-5  # highest (LLaDA)
    optim.warmup_steps = 50  # steps from 0 to the highest (LLaDA)
    optim.decay_steps = 0  # step at which the schedule ends; 0: train.num_steps
    optim.end_factor = 0.1  # last learning rate over the highest (LLaDA)
    optim.decay_share = 0.1  # share of the steps in which it falls (LLaDA)
    optim.beta1 = 0.9  # Adam
    optim.beta2 = 0.95  # Adam
    optim.eps = 1e-8  # Adam
    optim.weight_decay = 0.1  # decoupled (LLaDA)
    optim.clip_norm = 1.0  # global norm of the gradient
    optim.accumulate = 1  # steps per update
    optim.ema_decay = 0.0  # of averaged parameters; 0: none

    config.train = train = ml_collections.ConfigDict()
    train.objective = ml_collections.ConfigDict()
    train.objective.make = "train.objectives.masked_diffusion:MaskedDiffusion"
    train.objective.eps = 1e-3  # smallest masking probability (LLaDA)
    train.objective.stratified = True  # spread masking levels over the batch (not in LLaDA)
    train.objective.weight_power = 1.0  # the published bound (LLaDA)
    train.objective.remat = True  # recompute activations: less memory
    train.trainable = None  # all parameters
    train.num_steps = 52_734  # 3 epochs of the published 4.5 M pairs (LLaDA)
    train.seed = 0  # of masks
    train.master_dtype = "float32"  # in which parameters are kept
    train.init_from = config_dict.placeholder(str)  # folder of the model; must be given
    train.eval_every = 500  # steps between validations
    train.num_eval_batches = 4  # held-out batches of a validation

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every = 500  # steps
    checkpoint.keep = 2  # latest ones

    config.log = log = ml_collections.ConfigDict()
    log.every = 10  # steps between lines of metrics.jsonl
    log.progress = True  # bar on terminals
    log.tensorboard = False  # needs the extra `log`
    log.wandb_project = ""  # needs the extra `log`

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = 1  # shards of the batch
    mesh.fsdp = 32  # shards of batch and parameters
    mesh.tensor = 1  # shards of heads, MLP width and vocabulary

    if arg == "runlocal":
        model.d_model, model.n_layers, model.n_heads, model.n_kv_heads = 32, 2, 2, 2
        model.head_dim, model.d_ff, model.max_seq_len = 16, 64, 384
        model.dtype = "float32"
        data.task.path = data.valid.path = EXAMPLE
        data.prompt_len, data.completion_len = 192, 96
        data.batch_size = 4
        optim.learning_rate, optim.warmup_steps = 3e-3, 4
        train.init_from = ""
        train.num_steps = 20
        train.eval_every = 10
        train.num_eval_batches = 1
        checkpoint.every = 10
        log.every = 5
        mesh.fsdp = 1
    return config
