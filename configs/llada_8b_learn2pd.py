"""Learn2PD's filter for LLaDA-8B-Instruct: the rounds it learns from, and how to train it on them.

    python -m train.collect.trajectories --config=configs/llada_8b_learn2pd.py \\
        --out=runs/llada_8b/rounds --config.checkpoint=path/of/LLaDA-8B-Instruct \\
        --config.task.path=prompts.jsonl
    python -m train --config=configs/filter_learn2pd.py --workdir=runs/llada_8b/filter \\
        --config.data.task.path=runs/llada_8b/rounds --config.data.completion_len=32 \\
        --config.train.init_from=path/of/LLaDA-8B-Instruct \\
        --config.train.objective.decided_weight=1

The file has one JSON object per line with "question" and "answer", as `configs/example.jsonl`; the
answers are only scored, what is learned is the model's own. Published: 40 prompts of each of FLAN's
66 kinds of task. Then decode with `LearnedFilter(load_filter("runs/llada_8b/filter/model", lm),
0.96)` and blocks of 32, perhaps with `Eotp()`.

Recipe: arXiv:2509.25188, Sec. 3.2, and its public code. Numbers without a source are ours.
A model is split over four chips: v5e:2x2 is enough (`docs/training.md`). More hosts share the
prompts: each of them writes shards of its own.
"""

from ml_collections import ConfigDict, config_dict

from configs.common import EXAMPLE, LLADA_PROMPT, check_argument, section
from train.collect.config import TrajectoryConfig


def get_config(arg: str = "") -> ConfigDict:
    """The settings.

    Args:
      arg: ""; "trajectories": without rounds, what `llada_8b_dparallel.py` learns from; "runlocal":
        a smoke test of a few seconds on a tiny model, given as the large one.
    """
    check_argument(arg, "", "trajectories", "runlocal")
    config = section(
        TrajectoryConfig,
        {
            "checkpoint": config_dict.placeholder(str),  # folder of the model; must be given
            "task": {
                "make": "dlm.tasks.jsonl:JsonlTask",
                "path": config_dict.placeholder(str),  # prompts; must be given
                "prompt": LLADA_PROMPT,
                "completion": "{answer}",
            },
            "block_len": 32,  # positions per block (Learn2PD)
            "changes": {"stopper": "filled"},
            "oracle": arg != "trajectories",  # decode a second time for the filter
            "num_examples": 0,  # all prompts of the file; 2,640 (Learn2PD)
            "prompt_len": 768,  # tokens of the longest prompt
            "gen_len": 256,  # tokens per answer (Learn2PD)
            "examples_per_shard": 128,
            "dtype": "bfloat16",  # of the parameters
            "tensor": 4,  # devices that share the model
        },
    )
    if arg == "runlocal":
        config.task.path = EXAMPLE
        config.prompt_len, config.gen_len, config.block_len = 192, 16, 8
        config.batch_size = config.examples_per_shard = 16
        config.dtype, config.tensor = "float32", 1
    return config
