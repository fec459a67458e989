"""A small corrector of English sentences, from bytes: what input-guided decoding is tried on.

    python -m train --config=configs/corrector.py --workdir=runs/corrector \\
        --config.data.task.path=path/of/texts
    python -m train --config=configs/corrector.py:runlocal --workdir=runs/smoke \\
        --config.data.task.path=path/of/texts

`path/of/texts` is a text file or a folder of `*.txt` in good English, such as novels in the public
domain, of which `dlm.tasks.corrupted` makes sentences with mistakes. The prompts are those of JFLEG
(`dlm.tasks.rewriting`), whose sentences are held back: its licence does not allow to train on them.

Next-token cross-entropy over the whole text, as `configs/causal_lm.py`. Numbers are ours; those
without a comment are explained in `configs/mdlm_waiting_line.py`.
"""

from ml_collections import ConfigDict, config_dict

from configs import mdlm_waiting_line
from configs.common import check_argument


def get_config(arg: str = "") -> ConfigDict:
    """The settings.

    Args:
      arg: "": at most 20 minutes on two CPU cores; "runlocal": a smoke test of a few seconds.
    """
    check_argument(arg, "", "runlocal")
    config = mdlm_waiting_line.get_config(arg)
    model, data = config.model, config.data
    if arg != "runlocal":
        model.d_model, model.n_layers, model.n_heads, model.d_ff = 192, 4, 6, 512
        model.n_kv_heads, model.head_dim = 2, 32
    model.max_seq_len = 1024  # bytes; longer than any text it is trained on
    model.shifted_logits = True  # the output at a token is about the next one
    data.task = ConfigDict(
        {
            "make": "dlm.tasks.corrupted:Corrupted",
            "path": config_dict.placeholder(str),  # of clean texts; must be given
            "max_mistakes": 3,  # in a sentence; a quarter has none
            "most_chars": 128,  # of a sentence; most of JFLEG's are shorter
            "seed": 0,  # of the examples
        }
    )
    data.train = ConfigDict({"split": "train", "num_examples": 1_000_000})
    data.valid = ConfigDict({"split": "test", "num_examples": 1_000})
    data.tokenizer = "byte"
    data.prompt_len, data.completion_len = 208, 129  # bytes; mistakes take at most some more
    data.buckets = ((128, 64), (160, 96))  # shorter (prompt, completion)
    data.batch_size = 16 if arg != "runlocal" else 2  # rows of the longest
    config.train.objective = ConfigDict(
        {
            "make": "train.objectives.causal:Causal",
            "on_prompt": True,  # the whole text is learned
            "remat": True,
        }
    )
    if arg != "runlocal":
        config.optim.learning_rate = 2e-3  # highest
        config.train.num_steps = 1_400
        config.train.eval_every = 250  # steps between validations
        config.checkpoint.every = 250  # steps
    return config
