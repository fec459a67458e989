"""A small autoregressive model, on Python's standard library or on SCAN: a target to draft for.

    python -m train --config=configs/causal_lm.py:python --workdir=runs/python/target
    python -m train --config=configs/causal_lm.py:python,draft --workdir=runs/python/draft
    python -m train --config=configs/causal_lm.py:scan --workdir=runs/scan_causal/target

Next-token cross-entropy over the whole text. Numbers are ours; those without a comment are
explained in `configs/mdlm_waiting_line.py`.
"""

from ml_collections import ConfigDict

from configs import mdlm_waiting_line
from dlm.tasks.presets import TASKS as PRESETS

TASKS = ("python", "scan")
SIZES = {  # width, layers, heads, MLP
    "target": (128, 4, 4, 384),
    "draft": (64, 1, 2, 192),
    "runlocal": (32, 2, 2, 64),
}


def get_config(arg: str = "python") -> ConfigDict:
    """The settings.

    Args:
      arg: "python" or "scan"; with ",draft" behind it a smaller model that drafts for it, with
        ",runlocal" a smoke test of a few seconds.
    """
    task, _, size = arg.partition(",")
    if task not in TASKS or (size or "target") not in SIZES:
        raise ValueError(
            f"config argument {arg!r} must be one of {', '.join(TASKS)}, ...,draft, ...,runlocal"
        )
    config = mdlm_waiting_line.get_config("runlocal" if size == "runlocal" else "")
    model, data = config.model, config.data
    model.d_model, model.n_layers, model.n_heads, model.d_ff = SIZES[size or "target"]
    model.n_kv_heads = 2
    model.head_dim = model.d_model // model.n_heads
    model.max_seq_len = 1024  # tokens; longer than any text it is trained on
    model.shifted_logits = True  # the output at a token is about the next one
    data.train = ConfigDict({"split": "train"})
    data.valid = ConfigDict({"split": "test"})
    if task == "python":
        data.task = ConfigDict(
            {
                "make": "dlm.tasks.python_source:PythonSource",
                "prompt_chars": 64,
                "completion_chars": 191,
            }
        )
        data.tokenizer = "byte"
        data.prompt_len, data.completion_len = 64, 192  # tokens
        data.batch_size = 16 if size != "runlocal" else 2
    else:
        data.task = ConfigDict({"make": "dlm.tasks.scan:Scan"})
        data.prompt_len = PRESETS["scan"].prompt_len  # tokens
        data.completion_len = PRESETS["scan"].gen_len  # tokens
    config.train.objective = ConfigDict(
        {
            "make": "train.objectives.causal:Causal",
            "on_prompt": True,  # the whole text is learned
            "remat": True,
        }
    )
    if size != "runlocal":
        config.train.num_steps = {"python": 1_200, "scan": 1_000}[task]
        config.train.eval_every = 200  # steps between validations
        config.checkpoint.every = 200  # steps
    return config
