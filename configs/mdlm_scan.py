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

from ml_collections import ConfigDict

from configs import mdlm_waiting_line
from configs.common import check_argument
from dlm.tasks.presets import TASKS


def get_config(arg: str = "") -> ConfigDict:
    """The settings: those of `mdlm_waiting_line.py` on another task, and for longer.

    Args:
      arg: ""; "length": train on short action sequences, validate on long ones; "runlocal": a
        smoke test of a few seconds.
    """
    check_argument(arg, "", "length", "runlocal")
    config = mdlm_waiting_line.get_config("" if arg == "length" else arg)
    config.model.max_seq_len = 64  # tokens
    data = config.data
    data.task = ConfigDict({"make": "dlm.tasks.scan:Scan"})
    data.task.partition = "length" if arg == "length" else "simple"
    data.train = ConfigDict({"split": "train"})
    data.valid = ConfigDict({"split": "test"})
    data.prompt_len = TASKS["scan"].prompt_len  # tokens
    data.completion_len = TASKS["scan"].gen_len  # tokens, end included
    if arg != "runlocal":
        config.train.num_steps = 3_000
        config.train.eval_every = 500  # steps between validations
        config.checkpoint.every = 500  # steps
    return config
