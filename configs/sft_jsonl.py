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

import pathlib

import ml_collections
from ml_collections import config_dict

EXAMPLE = str(pathlib.Path(__file__).with_name("example.jsonl"))


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The settings.

    Args:
      arg: "" or "runlocal": a smoke test of a few seconds, from fresh parameters.
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
    data.task.prompt = "{question}\n"  # templates over the fields of a record
    data.task.completion = "{answer}"
    data.train = ml_collections.ConfigDict()
    data.valid = ml_collections.ConfigDict()
    data.valid.path = config_dict.placeholder(str)  # held out; must be given
    data.tokenizer = "byte"  # that of the model is used instead
    data.prompt_len = 512  # tokens of the longest prompt
    data.completion_len = 512  # tokens of the longest completion, end included
    # Shorter shapes (prompt, completion), each compiled once; their batches have as many more rows.
    data.buckets = ((64, 128), (128, 160), (128, 256), (256, 320))
    data.batch_size = 64  # rows per step of the longest shape; by accumulate: 256 (LLaDA, all rows)
    data.packing = False
    data.seed = 0  # of the order
    data.num_threads = 2  # that make batches ahead
    data.prefetch = 4  # batches kept ready

    config.optim = optim = ml_collections.ConfigDict()
    optim.learning_rate = 2.5e-5  # highest (LLaDA)
    optim.warmup_steps = 200  # steps from 0 to the highest: 50 updates (LLaDA)
    optim.decay_steps = 0  # step at which the cosine ends; 0: train.num_steps
    optim.end_factor = 0.1  # last learning rate over the highest (LLaDA)
    optim.beta1 = 0.9  # Adam
    optim.beta2 = 0.95  # Adam
    optim.eps = 1e-8  # Adam
    optim.weight_decay = 0.1  # decoupled (LLaDA)
    optim.clip_norm = 1.0  # global norm of the gradient
    optim.accumulate = 4  # steps per update
    optim.ema_decay = 0.999  # of averaged parameters, which are the ones exported

    config.train = train = ml_collections.ConfigDict()
    train.objective = ml_collections.ConfigDict()
    train.objective.make = "train.objectives.masked_diffusion:MaskedDiffusion"
    train.objective.eps = 1e-3  # smallest masking probability (LLaDA)
    train.objective.stratified = True  # spread masking levels over the batch (not in LLaDA)
    train.objective.weight_power = 1.0  # the published bound (LLaDA)
    train.objective.remat = True  # recompute activations: less memory
    train.num_steps = 4_000  # a quarter as many updates
    train.seed = 0  # of masks
    train.master_dtype = "float32"  # in which parameters are kept
    train.init_from = config_dict.placeholder(str)  # folder of a model to start from; must be given
    train.eval_every = 400  # steps between validations
    train.num_eval_batches = 4  # held-out batches of a validation

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every = 400  # steps
    checkpoint.keep = 2  # latest ones

    config.log = log = ml_collections.ConfigDict()
    log.every = 20  # steps between lines of metrics.jsonl
    log.progress = True  # bar on terminals
    log.tensorboard = False  # needs the extra `log`
    log.wandb_project = ""  # needs the extra `log`

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = 1  # shards of the batch
    mesh.fsdp = 1  # shards of batch and parameters
    mesh.tensor = 1  # shards of heads, MLP width and vocabulary

    if arg == "runlocal":
        model.d_model, model.n_layers, model.n_heads, model.n_kv_heads = 32, 2, 2, 2
        model.head_dim, model.d_ff, model.max_seq_len = 16, 64, 128
        model.dtype = "float32"
        data.task.path = data.valid.path = EXAMPLE
        data.prompt_len, data.completion_len = 48, 64
        data.buckets = ((40, 32),)
        data.batch_size = 4
        optim.learning_rate, optim.warmup_steps, optim.accumulate = 3e-3, 4, 2
        optim.ema_decay = 0.9
        train.init_from = ""
        train.num_steps = 20
        train.eval_every = 10
        train.num_eval_batches = 2
        checkpoint.every = 10
        log.every = 5
    return config
