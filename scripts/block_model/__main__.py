"""A block-diffusion model beside the autoregressive one that it was made from.

    python -m train --config=configs/smollm2_blocks.py:4 --workdir=runs/smollm2/blocks_4
    python -m scripts.block_model --checkpoint=runs/smollm2/blocks_4/model --of=smollm2 \\
        --records=runs/smollm2/answers/valid.jsonl --out=docs

On held-out records, prompts with answers of the model before: how well both predict the answers,
read from left to right, and the bound of its blocks. Then both write answers of their own: plainly,
by self-speculation, which must write what blocks of one do, and several tokens at once. `--out`
gets block_model.md, with texts, and block_model.json. `scripts/block_model/measure.py` says what
columns mean.
"""

from __future__ import annotations

import json
import pathlib
import sys

import jax
from absl import app, flags

import dlm
from decode.evaluation.run import device
from decode.evaluation.tables import markdown
from scripts.block_model import measure
from train.config import ConfigError
from train.host import set_up_command


def main(argv: list[str]) -> None:
    set_up_command(argv)
    said = flags.FLAGS
    try:
        lm = dlm.load(said.checkpoint, dtype=said.dtype)
        before = dlm.load(said.of, dtype=said.dtype)
        held_out = measure.read(lm, said.records, said.prompt_len, said.answer_len)
        judged = measure.perplexities(lm, before, held_out, said.block_len, said.num_copies)
        asked = measure.prompts_of(held_out)[: said.num_prompts]
        texts = measure.write(lm, before, asked, said.block_len, said.gen_len, said.batch_size)
        written = measure.compare(before, asked, texts)
    except (ConfigError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    page = [
        "# A block-diffusion model and the one before",
        "Written by `python -m scripts.block_model`; its docstring says how the model was made, "
        "`scripts/block_model/measure.py` what the columns mean.",
        f"Made from {said.of}: blocks of {said.block_len}. {said.dtype}, {device()}, jax "
        f"{jax.__version__}. Perplexities of {len(measure.answers_of(held_out))} held-out answers:",
        markdown(judged),
        f"{len(asked)} of their prompts, at most {said.gen_len} new tokens, "
        f"{said.batch_size} rows, greedy:",
        markdown(written),
        *measure.samples(lm, asked, texts, said.num_shown),
    ]
    print("\n\n".join(page))
    out = pathlib.Path(said.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "block_model.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    rows = {"perplexities": judged, "texts": written}
    (out / "block_model.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Of the block-diffusion model.", required=True)
    flags.DEFINE_string("of", "smollm2", "The model that it was made from, for dlm.load.")
    flags.DEFINE_string("records", None, "JSON lines with prompt and completion.", required=True)
    flags.DEFINE_integer("prompt_len", 192, "Most tokens of a prompt; its last.", lower_bound=1)
    flags.DEFINE_integer("answer_len", 192, "Most tokens of a judged answer.", lower_bound=1)
    flags.DEFINE_string("dtype", "float32", "Of both models.")
    flags.DEFINE_string("out", "docs", "Folder of the page.")
    flags.DEFINE_integer("block_len", 4, "As trained.", lower_bound=2)
    flags.DEFINE_integer("num_copies", 4, "Pairs of masked copies per answer.", lower_bound=1)
    flags.DEFINE_integer("num_prompts", 32, "That are answered.", lower_bound=1)
    flags.DEFINE_integer("gen_len", 64, "Most new tokens of an answer.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 8, "Rows at once.", lower_bound=1)
    flags.DEFINE_integer("num_shown", 3, "Prompts whose answers are shown.", lower_bound=0)
    app.run(main)
