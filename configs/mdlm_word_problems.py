"""Masked diffusion on word problems: small stories with numbers, solved as GSM8K's are.

    python -m train --config=configs/mdlm_word_problems.py --workdir=runs/word_problems
    python -m train --config=configs/mdlm_word_problems.py:runlocal --workdir=runs/smoke

Task: `dlm.tasks.word_problems`. Model, objective and optimiser are those of
`configs/mdlm_waiting_line.py`, trained for longer: sums take longer to learn than copying.
"""

from ml_collections import ConfigDict

from configs import mdlm_waiting_line
from dlm.tasks.presets import TASKS


def get_config(arg: str = "") -> ConfigDict:
    """The settings.

    Args:
      arg: "" or "runlocal": a smoke test of a few seconds.
    """
    config = mdlm_waiting_line.get_config(arg)
    config.data.task = ConfigDict(
        {
            "make": "dlm.tasks.word_problems:WordProblems",
            "min_steps": 2,  # fewest operations
            "max_steps": 3,  # most operations
            "max_change": 9,  # largest number added or taken away
            "seed": 0,  # of the examples
        }
    )
    config.data.prompt_len = TASKS["word_problems"].prompt_len  # tokens
    config.data.completion_len = TASKS["word_problems"].gen_len  # tokens, end included
    if arg == "":
        config.train.num_steps = 3_000
        config.train.eval_every = 500  # steps between validations
        config.checkpoint.every = 500  # steps
    return config
