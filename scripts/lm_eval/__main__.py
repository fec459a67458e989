"""Runs tasks of lm-evaluation-harness on any checkpoint; run again, it goes on where it was.

    python -m scripts.lm_eval --checkpoint=smollm2 --data=path/of/data --tasks=gsm8k_local \\
        --limit=50 --gen_len=128 --method=prompt_lookup --out=runs/gsm8k
    python -m scripts.lm_eval --checkpoint=path/to/LLaDA-8B-Instruct --dtype=bfloat16 \\
        --tasks=gsm8k --method=klass --gen_len=256 --chat --out=runs/llada
    python -m scripts.lm_eval export --task=word_problems --out=runs/tasks

The first needs no network: `--data` is a folder with gsm8k, svamp, humaneval or mbpp, `--include`
one of task files, such as `export` writes of the tasks of `dlm/tasks/presets.py`. Without either,
tasks are the harness's own. Methods are those of `decode/diffusion/points.py` and
`decode/speculative/points.py`. Into `--out` go results.json, a file of samples per task, and
answers.jsonl, from which a later run takes what it has.
"""

from __future__ import annotations

import sys

from absl import app, flags

import dlm
from decode.evaluation.harness import Answerer
from decode.evaluation.task_files import export_task
from scripts.lm_eval.evaluate import evaluate
from train.host import set_up_command


def main(argv: list[str]) -> None:
    is_export = argv[1:] == ["export"]
    set_up_command(argv[:1] if is_export else argv)
    said = flags.FLAGS
    try:
        if is_export:
            export_task(said.task, said.out, num_examples=said.limit or 200,
                        num_choices=said.choices)  # fmt: skip
            print(f"Written: {said.task} in {said.out}")
            return
        options = {"cache": said.cache, "block_len": said.block_len}
        answerer = Answerer(
            lm=dlm.load(said.checkpoint, dtype=said.dtype or None), method=said.method or None,
            options={name: value for name, value in options.items() if value},
            gen_len=said.gen_len, guidance=said.guidance, num_samples=said.num_samples,
            antithetic=said.antithetic, checks_greedy=said.check_greedy,
            batch_size=said.batch_size, seed=said.seed, record=f"{said.out}/answers.jsonl",
        )  # fmt: skip
        print(evaluate(
            answerer, said.tasks, said.out, limit=said.limit, num_fewshot=said.num_fewshot,
            gen_kwargs=said.gen_kwargs, chat=said.chat, data=said.data, include=said.include,
        ))  # fmt: skip
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", "smollm2", "For dlm.load.")
    flags.DEFINE_string("dtype", "", "Of the parameters; default: the checkpoint's.")
    flags.DEFINE_list("tasks", [], "By name.")
    flags.DEFINE_string("data", "", "Folder of data sets for gsm8k_local and others.")
    flags.DEFINE_string("include", "", "Folder of task files.")
    flags.DEFINE_string("out", "runs/lm_eval", "Folder for everything written.")
    flags.DEFINE_integer("limit", None, "Examples per task; default: all.", lower_bound=1)
    flags.DEFINE_integer("num_fewshot", None, "Shots; default: the task's.", lower_bound=0)
    flags.DEFINE_bool("chat", False, "Whether prompts go through the chat template.")
    flags.DEFINE_string("gen_kwargs", "", "Instead of the tasks': do_sample=True,temperature=0.5.")
    flags.DEFINE_string("method", "", "By name; default: that of `generate` or `complete`.")
    flags.DEFINE_integer("gen_len", 0, "Most tokens of an answer; 0: the task's.", lower_bound=0)
    flags.DEFINE_string("cache", "", "Diffusion: as `generate` takes it.")
    flags.DEFINE_integer("block_len", 0, "Diffusion: of a block; 0: the model's.", lower_bound=0)
    flags.DEFINE_float("guidance", None, "Diffusion: classifier-free guidance.", lower_bound=0.0)
    flags.DEFINE_integer("num_samples", 128, "Diffusion: masked copies per judged answer.")
    flags.DEFINE_bool("antithetic", False, "Diffusion: whether these come in pairs.")
    flags.DEFINE_bool("check_greedy", False, "Diffusion: whether greedy texts are compared.")
    flags.DEFINE_integer("batch_size", 32, "Rows at once.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of all random streams.")
    flags.DEFINE_string("task", "", "export: of dlm/tasks/presets.py.")
    flags.DEFINE_integer("choices", 0, "export: choices, of which one is right; 0: to be written.")
    app.run(main)
