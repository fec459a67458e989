"""Masked diffusion on word problems: small stories with numbers, solved as GSM8K's are.

    python -m train --config=configs/mdlm_word_problems.py --workdir=runs/word_problems
    python -m train --config=configs/mdlm_word_problems.py:runlocal --workdir=runs/smoke

Task: `dlm.tasks.word_problems`. Model, objective and optimiser are those of
`configs/mdlm_waiting_line.py`, trained for longer: sums take longer to learn than copying.
"""

import ml_collections

from configs import mdlm_waiting_line


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The settings.

    Args:
      arg: "" or "runlocal": a smoke test of a few seconds.
    """
    config = mdlm_waiting_line.get_config(arg)
    data = config.data
    data.task = ml_collections.ConfigDict()
    data.task.make = "dlm.tasks.word_problems:WordProblems"
    data.task.min_steps = 2  # fewest operations
    data.task.max_steps = 3  # most operations
    data.task.max_change = 9  # largest number added or taken away
    data.task.seed = 0  # of the examples
    data.prompt_len = 28  # tokens; the longest prompt has 27
    data.completion_len = 24  # tokens, end included; the longest has 22. A multiple of the block
    if arg == "":
        config.train.num_steps = 3_000
        config.train.eval_every = 500  # steps between validations
        config.checkpoint.every = 500  # steps
    return config
