"""A small autoregressive translator, German to English: what searches are measured on.

    python -m train --config=configs/translation.py --workdir=runs/translation \\
        --config.data.task.path=path/of/multi30k
    python -m train --config=configs/translation.py:runlocal --workdir=runs/smoke \\
        --config.data.task.path=path/of/multi30k

`path/of/multi30k` has the files that `dlm.tasks.translation` names; the captions are for research
only. The prompt is a German sentence, the completion an English one, of which alone the
cross-entropy counts. Tokens are pieces of words of both languages, learned from the training pairs.

Size and steps fit into 20 minutes of two CPU cores: at 150 GFLOP/s, of 4.8 M parameters (3.2 M in
layers, used four times with recomputing, 1.6 M in the vocabulary) a pair of 43 tokens, padding
included, takes 1.3 GFLOP, so 1,600 steps of 63 pairs, three and a half epochs, 15 minutes. Numbers
without a source are ours.
"""

from ml_collections import ConfigDict, config_dict

from configs.common import SMALL_MODEL, TINY_MODEL, check_argument, shrink, training


def get_config(arg: str = "") -> ConfigDict:
    """The settings.

    Args:
      arg: "", "en_de" (English to German), or "runlocal": a smoke test of a few seconds.
    """
    check_argument(arg, "", "en_de", "runlocal")
    config = training(
        model={
            **SMALL_MODEL,
            "d_model": 256,  # width of the residual stream
            "n_layers": 4,
            "head_dim": 64,  # d_model / n_heads
            "d_ff": 704,  # hidden width of the gated MLP
            "max_seq_len": 256,  # tokens
            "shifted_logits": True,  # the output at a token is about the next one
        },
        data={
            "task": {
                "make": "dlm.tasks.translation:Translation",
                "path": config_dict.placeholder(str),  # folder of the files; must be given
                "source": "en" if arg == "en_de" else "de",  # language of the prompts
            },
            "train": {"split": "train"},
            "valid": {"split": "test"},
            "tokenizer": "bpe:6144",  # pieces of words of both languages
            "prompt_len": 64,  # tokens; the longest source has 58
            "completion_len": 64,  # tokens, end included
            "buckets": ((16, 16), (20, 20), (28, 28)),  # shorter (prompt, completion)
            "batch_size": 21,  # rows of the longest shape; 63 pairs of all
            "num_threads": 2,  # that make batches ahead
        },
        optim={
            "learning_rate": 1e-3,  # highest
            "warmup_steps": 200,  # steps from 0 to the highest
            "weight_decay": 0.1,  # decoupled
        },
        train={
            "objective": {
                "make": "train.objectives.causal:Causal",
                "remat": True,  # recompute activations: less memory to move is faster on CPUs too
            },
            "num_steps": 1_600,
            "eval_every": 200,  # steps between validations
            "num_eval_batches": 8,  # held-out batches of a validation
        },
        checkpoint={"every": 200, "keep": 2},  # steps; latest ones
    )
    if arg == "runlocal":
        config.model.update(TINY_MODEL)
        config.data.tokenizer = "bpe:300"
        config.data.prompt_len = config.data.completion_len = 128
        config.data.buckets = ()
        config.optim.warmup_steps = 5
        shrink(config, batch_size=4, num_eval_batches=2)
    return config
