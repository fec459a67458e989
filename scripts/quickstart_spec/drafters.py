"""What is compared: drafters of a target that was trained from nothing, as they were.

Per text and seed there is a target, a smaller draft model, and what Medusa, Hydra, Hydra++,
EAGLE-1, EAGLE-3 and DFlash put beside the target (`--heads`).
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

import dlm
from configs import causal_lm, draft_heads
from decode.speculative.contracts import Drafter
from decode.speculative.drafters.dflash import DFlash
from decode.speculative.drafters.draft_model import DraftModel, DraftModelTree
from decode.speculative.drafters.eagle import Eagle, EagleBest
from decode.speculative.drafters.hydra import Hydra
from decode.speculative.drafters.lookahead import Lookahead
from decode.speculative.drafters.medusa import Medusa
from decode.speculative.drafters.no_draft import NoDraft
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.drafters.suffix import Suffix
from decode.speculative.drafters.token_recycling import TokenRecycling
from decode.speculative.tree import from_paths
from dlm.heads import dflash, eagle_1, eagle_3, hydra, medusa
from train import loop
from train.config import build

GEN_LEN = {"python": 128, "scan": 52}  # tokens
NUM_DRAFTS = 4  # of chains
# 22 nodes: on two cores a forward of 64 is no longer about as fast as one of a single token.
TREE = from_paths(
    [
        *([i] for i in range(6)),
        *([0, i] for i in range(4)),
        *([1, i] for i in range(2)),
        *([2, 0], [3, 0]),
        *([0, 0, i] for i in range(3)),
        *([0, 1, 0], [1, 0, 0]),
        *([0, 0, 0, i] for i in range(2)),
    ]
)
WIDTH = 6  # of the best tree, which has as many nodes and levels
PLAIN = "none"


def train(task: str, seed: int, folder: pathlib.Path, heads: list[str], smoke: bool) -> None:
    """Trains whatever of target, draft model and heads is not there yet."""
    variant = "runlocal" if smoke else ""

    def fit(config: Any, name: str) -> None:
        config.train.seed = config.data.seed = seed
        result = loop.run(config, folder / name, f"{task}, seed {seed}: {name}")
        if result.model_path is None:
            raise SystemExit("training was interrupted: run the same command again to continue")

    fit(causal_lm.get_config(f"{task},{variant}" if smoke else task), "target")
    fit(causal_lm.get_config(f"{task},{variant or 'draft'}"), "draft")
    for name in heads:
        config = draft_heads.get_config(f"{task},{name}" + (f",{variant}" if smoke else ""))
        config.train.init_from = str(folder / "target" / "model")
        fit(config, name)


def drafters(
    lm: dlm.LanguageModel, folder: pathlib.Path, heads: list[str]
) -> Iterator[tuple[str, Drafter]]:
    """By the names of the table."""
    draft = dlm.load(folder / "draft" / "model")
    yield PLAIN, NoDraft()
    yield "prompt lookup", PromptLookup(num_drafts=8)
    yield "suffix decoding", Suffix(num_drafts=8)
    yield "token recycling, tree", TokenRecycling(TREE)
    yield "lookahead", Lookahead(ngram=4, window=4, num_candidates=4)
    yield "draft model, chain", DraftModel(draft.params, draft.cfg, num_drafts=NUM_DRAFTS)
    yield "draft model, tree", DraftModelTree(draft.params, draft.cfg, shape=TREE)
    at = {name: folder / name / "model" for name in heads}
    if "medusa" in at:
        yield "Medusa, tree", Medusa(medusa.load(at["medusa"], lm)[1], TREE)
    if "hydra" in at:
        yield "Hydra, tree", Hydra(hydra.load(at["hydra"], lm)[1], TREE)
    if "hydra_plus" in at:
        yield "Hydra++, tree", Hydra(hydra.load(at["hydra_plus"], lm)[1], TREE)
    if "eagle_1" in at:
        yield "EAGLE-1, tree", Eagle(eagle_1.load(at["eagle_1"], lm), TREE)
    if "eagle_3" in at:
        network = eagle_3.load(at["eagle_3"], lm)
        yield "EAGLE-3, tree", Eagle(network, TREE)
        best = EagleBest(network, WIDTH, TREE.depth, TREE.num_nodes - 1)
        yield "EAGLE-3, best tree", best
    if "dflash" in at:
        yield "DFlash, chain", DFlash(dflash.load(at["dflash"], lm))


def held_out_prompts(lm: dlm.LanguageModel, task: str, num: int) -> list[list[int]]:
    """Token ids of some prompts that the target was not trained on."""
    assert lm.tokenizer is not None
    config = causal_lm.get_config(task).data
    held_out = build({**config.task, **config.valid}, "task")
    order = np.random.default_rng(0).permutation(len(held_out))[:num]
    return [lm.tokenizer.encode(held_out[int(i)].prompt) for i in order]
