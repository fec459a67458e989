"""Pre-training of a masked-diffusion model on the texts of a JSONL file, one token per byte.

    python -m train --config=configs/pretrain_jsonl.py --workdir=runs/pretrain \\
        --config.data.task.path=train.jsonl --config.data.valid.path=held_out.jsonl
    python -m train --config=configs/pretrain_jsonl.py:runlocal --workdir=runs/smoke

The file has one JSON object per line with a field "text" (or name another one with
`--config.data.task.completion="{body}"`). A text may be of any length: texts are joined, each with
its end, and cut into rows (`train.batching.Packed`). Rows of one text come one after another, so
that long texts are better cut into several records. Files are held in memory; for more than that,
copy this file and make `data.task` a `dlm.tasks.tfds_source:TfdsTask`.

Objective: LLaDA's, arXiv:2502.09992, Sec. 2.2. `valid/nll_bound` is in nats per byte. Numbers are
ours unless a source is given.
"""

import pathlib

import ml_collections
from ml_collections import config_dict

EXAMPLE = str(pathlib.Path(__file__).with_name("example.jsonl"))


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The settings.

    Args:
      arg: "" or "runlocal": a smoke test of a few seconds.
    """
    if arg not in ("", "runlocal"):
        raise ValueError(f"config argument {arg!r} must be '' or 'runlocal'")
    config = ml_collections.ConfigDict()

    config.model = model = ml_collections.ConfigDict()
    model.d_model = 256  # width of the residual stream
    model.n_layers = 6
    model.n_heads = 8  # query heads
    model.n_kv_heads = 8  # key/value heads; as many: plain multi-head attention (LLaDA)
    model.head_dim = 32  # d_model / n_heads, as the published format demands
    model.d_ff = 768  # hidden width of the gated MLP
    model.max_seq_len = 256  # tokens
    model.rope_theta = 10_000.0  # base of the rotary frequencies
    model.norm_eps = 1e-5  # inside RMSNorm (LLaDA)
    model.tie_embeddings = True  # one matrix for input and output
    model.dtype = "float32"  # of matrix products; CPUs are slow at bfloat16

    config.data = data = ml_collections.ConfigDict()
    data.task = ml_collections.ConfigDict()
    data.task.make = "dlm.tasks.jsonl:JsonlTask"
    data.task.path = config_dict.placeholder(str)  # what is learned; must be given
    data.task.prompt = ""  # none in pre-training
    data.task.completion = "{text}"  # template over the fields of a record
    data.train = ml_collections.ConfigDict()
    data.valid = ml_collections.ConfigDict()
    data.valid.path = config_dict.placeholder(str)  # held out; must be given
    data.tokenizer = "byte"
    data.prompt_len = 0
    data.completion_len = 256  # tokens per row
    data.buckets = ()
    data.packing = True  # no padding
    data.batch_size = 32  # rows per step
    data.seed = 0  # of the order
    data.num_threads = 1  # that make batches ahead
    data.prefetch = 4  # batches kept ready

    config.optim = optim = ml_collections.ConfigDict()
    optim.learning_rate = 1e-3  # highest
    optim.warmup_steps = 200  # steps from 0 to the highest
    optim.decay_steps = 0  # step at which the cosine ends; 0: train.num_steps
    optim.end_factor = 0.1  # last learning rate over the highest
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
    train.objective.remat = True  # recompute activations: less memory to move
    train.num_steps = 10_000
    train.seed = 0  # of parameters and masks
    train.master_dtype = "float32"  # in which parameters are kept
    train.init_from = ""  # folder of a model to start from
    train.eval_every = 500  # steps between validations
    train.num_eval_batches = 8  # held-out batches of a validation

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every = 500  # steps
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
        data.task.path = data.valid.path = EXAMPLE
        data.task.completion = "{question} {answer}"
        data.completion_len = 64
        data.batch_size = 8
        optim.learning_rate, optim.warmup_steps = 3e-3, 5
        train.num_steps = 20
        train.eval_every = 10
        train.num_eval_batches = 2
        checkpoint.every = 10
        log.every = 5
    return config
