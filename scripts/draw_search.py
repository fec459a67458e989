"""What searches explore: one prompt's tree for every strategy, as numbers and as pictures.

    python -m scripts.draw_search --checkpoint=smollm2 --out=docs

`search.json` gets the trees, and `search_NAME.png` are drawn from it, here and by
`python -m scripts.figures`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from absl import app, flags

import dlm
from decode.core.explored import Node
from decode.explored import watch_search
from decode.pictures import draw_search
from decode.search.astar import AStar
from decode.search.components import STRATEGIES
from decode.search.pg_td import PGTD
from train.host import only_flags

FILE = "search.json"
PROMPT = "The cat sat on the mat. The dog sat on the"


def new_words(prompt: str, text: str) -> float:
    """The share of a text's words that the prompt does not have: a reward that is easily seen."""
    said, words = set(prompt.lower().split()), text.lower().split()
    return sum(word not in said for word in words) / len(words) if words else 0.0


PLANNERS = {  # searches on the host, whose steps are words and tokens
    "a_star": AStar(delimiter=" ", num_samples=3, step_len=4, max_expansions=8),
    "pg_td": PGTD(reward=new_words, num_rollouts=12),
}


def explore(lm: dlm.LanguageModel, prompt: str, gen_len: int) -> dict[str, Any]:
    """The trees of the first point of every strategy, and of the planners, by its name."""
    names = [name for kind in STRATEGIES for name in list(kind.points())[:1]]
    methods: dict[str, Any] = {**{name: name for name in names}, **PLANNERS}
    trees = {}
    for name, method in methods.items():
        nodes = watch_search(lm, prompt, method=method, gen_len=gen_len)
        trees[name] = [_rounded(dataclasses.asdict(node)) for node in nodes]
    return {"prompt": prompt, "gen_len": gen_len, "trees": trees}


def _rounded(value: Any) -> Any:
    """Numbers with four digits behind the point."""
    if isinstance(value, Mapping):
        return {name: _rounded(x) for name, x in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def pictures(numbers: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Callable[[], None]]:
    """What draws each tree, by the figure's name."""

    def draw(name: str, path: pathlib.Path) -> None:
        nodes = [Node(**node) for node in numbers["trees"][name]]
        title = f"{name}: what was tried behind \u201c{numbers['prompt']}\u201d"
        draw_search(nodes, title).savefig(path)

    return {
        f"search_{name}": functools.partial(draw, name, folder / f"search_{name}.png")
        for name in numbers["trees"]
    }


def main(argv: list[str]) -> None:
    only_flags(argv)
    given, out = flags.FLAGS, pathlib.Path(flags.FLAGS.out)
    dlm.keep_programs()
    numbers = explore(dlm.load(given.checkpoint), given.prompt, given.gen_len)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(numbers, ensure_ascii=False).replace("}, {", "},\n{")
    (out / FILE).write_text(text + "\n", encoding="utf-8")
    for draw in pictures(numbers, out).values():
        draw()


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", "smollm2", "A folder, a file or a name, see dlm.load.")
    flags.DEFINE_string("prompt", PROMPT, "What is searched behind.")
    flags.DEFINE_integer("gen_len", 6, "Most tokens.")
    flags.DEFINE_string("out", "docs", "Folder for numbers and pictures.")
    app.run(main)
