"""What searches try behind one prompt, as numbers and as pictures: see `scripts.draw_search`."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import dlm
from decode.core.datastore import build_datastore, load_datastore
from decode.core.explored import Node
from decode.explored import watch_search
from decode.pictures import draw_search
from decode.search.astar import AStar
from decode.search.components import STRATEGIES, Superposed
from decode.search.loop import SearchMethod
from decode.search.pg_td import PGTD

FILE = "search.json"
PROMPT = "The cat sat on the mat. The dog sat on the"

SENTENCES = (  # of which superposed decoding has the n-grams
    "The dog sat on the mat. The cat sat on the bed.",
    "The dog sat on the bed and the cat sat on the chair.",
    "The bird sat on the fence. The dog looked at the bird.",
    "The cat sat on the table. Then the dog sat on the floor and looked at the cat.",
    "A cat is on the mat, and a dog is on the floor. In the garden, a bird sings.",
)


def new_words(prompt: str, text: str) -> float:
    """The share of a text's words that the prompt does not have: a reward that is easily seen."""
    said, words = set(prompt.lower().split()), text.lower().split()
    return sum(word not in said for word in words) / len(words) if words else 0.0


PLANNERS = {  # searches on the host, whose steps are words and tokens
    "a_star": AStar(delimiter=" ", num_samples=3, step_len=4, max_expansions=8),
    "pg_td": PGTD(reward=new_words, num_rollouts=12),
}


def superposed(lm: dlm.LanguageModel) -> SearchMethod:
    """Three drafts, told apart by the n-grams of a few sentences.

    Raises:
      ValueError: the model has no tokenizer.
    """
    if lm.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer, to read sentences with")
    texts = [lm.tokenizer.encode(text) for text in SENTENCES]
    with tempfile.TemporaryDirectory() as folder:
        build_datastore(texts, lm.cfg.vocab_size, folder)
        return SearchMethod(Superposed(load_datastore(folder)), num_return=3)


def explore(lm: dlm.LanguageModel, prompt: str, gen_len: int) -> dict[str, Any]:
    """The trees of the first point of every strategy, of superposed decoding, and of the planners,
    by its name."""
    names = [name for kind in STRATEGIES for name in list(kind.points())[:1]]
    methods: dict[str, Any] = {name: name for name in names} | {"superposed": superposed(lm)}
    trees = {}
    for name, method in (methods | PLANNERS).items():
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
