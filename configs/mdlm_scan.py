"""Masked diffusion on SCAN, simple split: navigation commands to action sequences.

    python -m train --config=configs/mdlm_scan.py --workdir=runs/scan
    python -m train --config=configs/mdlm_scan.py:length --workdir=runs/scan_length
    python -m train --config=configs/mdlm_scan.py:runlocal --workdir=runs/smoke

Task: `dlm.tasks.scan`, arXiv:1711.00350. Objective: LLaDA's, arXiv:2502.09992. Numbers are ours
unless a source is given.

Exact match on 512 held-out commands, and forwards per answer (`python -m scripts.compare
--task=scan --checkpoint=runs/scan/model --num_examples=512 --methods=threshold --block_len=...`;
two shared CPU cores, float32):

    block   one per step   threshold 0.9
        4   91.2 %, 16.7   90.8 %, 5.1
       52   86.9 %, 52.0   92.0 %, 1.6

Training took 10 minutes there.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The settings.

    Args:
      arg: ""; "length": train on short action sequences, validate on long ones; "runlocal": a
        smoke test of a few seconds.
    """
    if arg not in ("", "length", "runlocal"):
        raise ValueError(f"config argument {arg!r} must be '', 'length' or 'runlocal'")
    config = ml_collections.ConfigDict()

    config.model = model = ml_collections.ConfigDict()
    model.d_model = 96  # width of the residual stream
    model.n_layers = 3
    model.n_heads = 4  # query heads
    model.n_kv_heads = 4  # key/value heads; as many: plain multi-head attention (LLaDA)
    model.head_dim = 24  # d_model / n_heads, as the published format demands
    model.d_ff = 256  # hidden width of the gated MLP
    model.max_seq_len = 64  # tokens
    model.rope_theta = 10_000.0  # base of the rotary frequencies
    model.norm_eps = 1e-5  # inside RMSNorm (LLaDA)
    model.tie_embeddings = True  # one matrix for input and output
    model.dtype = "float32"  # of matrix products; CPUs are slow at bfloat16

    config.data = data = ml_collections.ConfigDict()
    data.task = ml_collections.ConfigDict()
    data.task.make = "dlm.tasks.scan:Scan"
    data.task.partition = "length" if arg == "length" else "simple"
    data.train = ml_collections.ConfigDict({"split": "train"})
    data.valid = ml_collections.ConfigDict({"split": "test"})
    data.tokenizer = "word"  # one token per word or action
    data.prompt_len = 12  # tokens; the longest prompt has 11
    data.completion_len = 52  # tokens, end included; the longest has 49
    data.batch_size = 64  # rows per step
    data.seed = 0  # of the order
    data.num_threads = 1  # that make batches ahead
    data.prefetch = 8  # batches kept ready

    config.optim = optim = ml_collections.ConfigDict()
    optim.learning_rate = 3e-3  # highest
    optim.warmup_steps = 100  # steps from 0 to the highest
    optim.decay_steps = 0  # step at which the cosine ends; 0: train.num_steps
    optim.end_factor = 0.0  # last learning rate over the highest
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
    train.objective.weight_power = 0.0  # every masked token counts the same (LLaDA: 1.0)
    train.objective.remat = True  # recompute activations: less memory to move, faster on CPUs too
    train.num_steps = 3_000
    train.seed = 0  # of parameters and masks
    train.master_dtype = "float32"  # in which parameters are kept
    train.init_from = ""  # folder of a model to start from
    train.eval_every = 500  # steps between validations
    train.num_eval_batches = 4  # held-out batches of a validation

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
        model.head_dim, model.d_ff = 16, 64
        data.batch_size = 8
        optim.warmup_steps = 5
        train.num_steps = 20
        train.eval_every = 10
        train.num_eval_batches = 2
        checkpoint.every = 10
        log.every = 5
    return config
