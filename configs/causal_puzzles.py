"""A small autoregressive model on countdown or the game of 24, whose answers can be checked.

    python -m train --config=configs/causal_puzzles.py:countdown_3 --workdir=runs/countdown_3
    python -m train --config=configs/causal_puzzles.py:game24 --workdir=runs/game24

It learns to write one right chain of equations, whatever other ones there are; what it does not see
at once a search with a verifier may find. Tasks: `dlm.tasks.countdown` (three numbers, or four),
`dlm.tasks.game24`; a token is a digit or a sign.

Steps fit into 20 minutes of two CPU cores: at 150 GFLOP/s, of 2.7 M parameters used four times with
recomputing, 64 rows of 36 to 51 tokens take 0.3 to 0.5 s. Numbers are ours; those without a comment
are explained in `configs/mdlm_waiting_line.py`.
"""

from ml_collections import ConfigDict

from configs import mdlm_waiting_line
from configs.common import TINY_MODEL
from dlm.tasks.presets import TASKS

STEPS = {"countdown_3": 2_600, "countdown": 1_900, "game24": 2_100}  # by task


def get_config(arg: str = "") -> ConfigDict:
    """The settings.

    Args:
      arg: "countdown_3" (three numbers; or ""), "countdown" (four) or "game24"; with ",runlocal"
        behind it, or "runlocal" alone, a smoke test of a few seconds.
    """
    task, _, size = (f"countdown_3,{arg}" if arg in ("", "runlocal") else arg).partition(",")
    if task not in STEPS or size not in ("", "runlocal"):
        raise ValueError(
            f"config argument {arg!r} must be one of {', '.join(STEPS)}, and perhaps ...,runlocal"
        )
    config = mdlm_waiting_line.get_config(size)
    model, data = config.model, config.data
    if size:
        model.update(TINY_MODEL)
    else:
        model.d_model, model.n_layers, model.n_heads, model.d_ff = 192, 6, 6, 512
        model.n_kv_heads, model.head_dim = 6, 32
    model.max_seq_len = 128  # tokens; longer than any text it is trained on
    model.shifted_logits = True  # the output at a token is about the next one
    if task == "game24":
        data.task = ConfigDict({"make": "dlm.tasks.game24:Game24"})
    else:
        num_numbers = 3 if task == "countdown_3" else 4
        data.task = ConfigDict(
            {"make": "dlm.tasks.countdown:Countdown", "num_numbers": num_numbers}
        )
    data.task.seed = 0  # of the examples
    data.prompt_len, data.completion_len = TASKS[task].prompt_len, TASKS[task].gen_len  # tokens
    config.train.objective = ConfigDict({"make": "train.objectives.causal:Causal", "remat": True})
    if not size:
        config.optim.learning_rate = 2e-3  # highest
        config.train.num_steps = STEPS[task]
        config.train.eval_every = 200  # steps between validations
        config.checkpoint.every = 200  # steps
    return config
