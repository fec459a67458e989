"""Masked diffusion on waiting lines: the quickstart's recipe, about a minute and a half on a CPU.

    python -m train --config=configs/mdlm_waiting_line.py --workdir=runs/waiting_line
    python -m train --config=configs/mdlm_waiting_line.py:runlocal --workdir=runs/smoke

Task: `dlm.tasks.waiting_line` (ten operations on lists of names). Objective: LLaDA's,
arXiv:2502.09992. Numbers are ours unless a source is given.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The settings.

    Args:
      arg: "" or "runlocal": a smoke test of a few seconds.
    """
    if arg not in ("", "runlocal"):
        raise ValueError(f"config argument {arg!r} must be '' or 'runlocal'")
    config = ml_collections.ConfigDict()

    config.model = model = ml_collections.ConfigDict()
    model.d_model = 96  # width of the residual stream
    model.n_layers = 3
    model.n_heads = 4  # query heads
    model.n_kv_heads = 4  # key/value heads; as many: plain multi-head attention (LLaDA)
    model.head_dim = 24  # d_model / n_heads, as the published format demands
    model.d_ff = 256  # hidden width of the gated MLP
    model.max_seq_len = 128  # tokens; room for longer lists than those trained on
    model.rope_theta = 10_000.0  # base of the rotary frequencies
    model.norm_eps = 1e-5  # inside RMSNorm (LLaDA)
    model.tie_embeddings = True  # one matrix for input and output
    model.dtype = "float32"  # of matrix products; CPUs are slow at bfloat16

    config.data = data = ml_collections.ConfigDict()
    data.task = ml_collections.ConfigDict()
    data.task.make = "dlm.tasks.waiting_line:WaitingLine"
    learnable = ("copy", "reverse", "insert_index", "remove_index", "replace_index")
    others = ("sort", "shuffle", "insert_random", "remove_random", "replace_random")
    # What a model of this size learns in minutes, twice as often as what it does not.
    data.task.operations = (*learnable, *others, *learnable)
    data.task.min_people = 3  # shortest list (ParallelBench, arXiv:2510.04767)
    data.task.max_people = 6  # longest list (ParallelBench)
    data.task.num_first_names = 32  # of 64
    data.task.num_last_names = 32  # of 64
    data.task.num_shots = 0  # answered examples in the prompt; ParallelBench has 1
    data.task.seed = 0  # of the examples
    data.train = ml_collections.ConfigDict({"split": "train", "num_examples": 1_000_000})
    data.valid = ml_collections.ConfigDict({"split": "test", "num_examples": 1_000})
    data.tokenizer = "word"  # one token per name, sentence part or list sign
    data.prompt_len = 28  # tokens; the longest prompt has 27
    data.completion_len = 24  # tokens, end included; the longest has 23. A multiple of the block
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
    train.objective.remat = True  # recompute activations: less memory to move is faster on CPUs too
    train.num_steps = 1_500
    train.seed = 0  # of parameters and masks
    train.master_dtype = "float32"  # in which parameters are kept
    train.init_from = ""  # folder of a model to start from
    train.eval_every = 250  # steps between validations
    train.num_eval_batches = 4  # held-out batches of a validation

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every = 250  # steps
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
