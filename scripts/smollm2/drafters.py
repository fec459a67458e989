"""The drafters that were trained for SmolLM2, ready to decode with."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import dlm
from configs.smollm2 import RECIPES
from decode.core.datastore import load_datastore
from decode.speculative.contracts import Drafter
from decode.speculative.drafters.ddtree import DDTree
from decode.speculative.drafters.dflash import DFlash
from decode.speculative.drafters.draft_model import DraftModel, DraftModelBest, DraftModelTree
from decode.speculative.drafters.dynamic_exit import DynamicExit
from decode.speculative.drafters.eagle import Eagle, EagleBest
from decode.speculative.drafters.hybrid import Hybrid
from decode.speculative.drafters.hydra import Hydra
from decode.speculative.drafters.masks import Masks
from decode.speculative.drafters.medusa import Medusa
from decode.speculative.drafters.opt_tree import DraftModelOpt, EagleOpt
from decode.speculative.drafters.rest import REST
from decode.speculative.drafters.sam import SAM
from decode.speculative.drafters.specdec_pp import SpecDecPP
from decode.speculative.tree import TreeShape, chain
from dlm.heads import dflash, eagle_3, hydra, masks, medusa, specdec_pp

CHAIN = chain(3)  # on a CPU every further node costs its arithmetic
BUDGET = 7  # nodes of a tree, as many as a block of DFlash has
WIDE = 31  # nodes of one that shows what a drafter knows
AGREED = 4  # tokens from which on a copy is taken instead of a draft
EXITS = (6, 12, 18)  # of 30 layers


def draft_of(lm: dlm.LanguageModel, folder: pathlib.Path) -> dlm.LanguageModel | None:
    """The trained draft model, if it is there."""
    path = folder / "draft" / "model"
    return dlm.load(path, dtype=lm.cfg.dtype) if path.exists() else None


def trained(lm: dlm.LanguageModel, folder: pathlib.Path) -> Iterator[tuple[str, Drafter]]:
    """By name, those of `configs/smollm2.py` that are there: runs in folders of their names.

    All as chains; EAGLE-3, DFlash and masks as trees, too.

    Raises:
      ValueError: one was trained for another model.
    """
    at = _found(folder)
    if (draft := draft_of(lm, folder)) is not None:
        yield "draft model", DraftModel(draft.params, draft.cfg, num_drafts=CHAIN.depth)
    if "medusa" in at:
        yield "Medusa", Medusa(medusa.load(at["medusa"], lm)[1], CHAIN)
    if "hydra_plus" in at:
        yield "Hydra++", Hydra(hydra.load(at["hydra_plus"], lm)[1], CHAIN)
    if "eagle_3" in at:
        eagle = eagle_3.load(at["eagle_3"], lm)
        yield "EAGLE-3", Eagle(eagle, CHAIN)
        yield "EAGLE-3, OPT-Tree", EagleOpt(eagle, budget=BUDGET, levels=BUDGET)
        wide = EagleBest(eagle, width=8, levels=5, budget=WIDE)
        yield f"EAGLE-3, {WIDE} nodes", wide
    if "dflash" in at:
        block = dflash.load(at["dflash"], lm)
        yield "DFlash", DFlash(block, num_drafts=CHAIN.depth)
        yield "DDTree of DFlash", DDTree(DFlash(block), budget=BUDGET, max_budget=BUDGET)
    if "masks" in at:
        network = masks.load(at["masks"], lm)
        for kind, is_quadratic in (("linear", False), ("quadratic", True)):
            yield f"masks, {kind}", Masks(network, CHAIN.depth, is_quadratic=is_quadratic)
        yield "DDTree of masks", DDTree(Masks(network), budget=BUDGET, max_budget=BUDGET)


def everything(lm: dlm.LanguageModel, folder: pathlib.Path) -> Iterator[tuple[str, Drafter]]:
    """Those of `trained`, what else they can be, such as trees, and others that need no training.

    Three need files of their own in the folder: `tree.json` is a shape that `scripts.draft_tree`
    has measured for the draft model, `rest` a datastore of `scripts.rest_datastore`, `stop` a head
    for the draft model.

    Raises:
      ValueError: one was trained for another model.
    """
    yield from trained(lm, folder)
    at = _found(folder)
    if (draft := draft_of(lm, folder)) is not None:
        yield (
            "draft model, best tree",
            DraftModelBest(draft.params, draft.cfg, width=3, levels=CHAIN.depth, budget=BUDGET),
        )
        yield (
            "draft model, OPT-Tree",
            DraftModelOpt(draft.params, draft.cfg, budget=BUDGET, levels=BUDGET),
        )
        tree = folder / "tree.json"
        if tree.exists():
            shape = TreeShape(**json.loads(tree.read_text(encoding="utf-8")))
            yield "draft model, measured tree", DraftModelTree(draft.params, draft.cfg, shape=shape)
        if "stop" in at:
            own = specdec_pp.load(at["stop"], draft)[1]
            yield (
                "draft model, SpecDec++",
                SpecDecPP(draft.params, draft.cfg, own=own, num_drafts=BUDGET, least=1),
            )
    if (folder / "rest").exists():
        yield "REST", REST(load_datastore(folder / "rest"), num_drafts=BUDGET)
    yield "early exits", DynamicExit(EXITS, num_drafts=CHAIN.depth)
    if "eagle_3" in at:
        network = eagle_3.load(at["eagle_3"], lm)
        yield "EAGLE-3, best tree", EagleBest(network, width=3, levels=CHAIN.depth, budget=BUDGET)
        yield "SAM, else EAGLE-3", Hybrid(SAM(), Eagle(network, CHAIN), threshold=AGREED)
    if "dflash" in at:
        block = DFlash(dflash.load(at["dflash"], lm))
        yield "DFlash, whole block", block
        yield (
            f"DDTree of DFlash, {WIDE} nodes",
            DDTree(block, budget=WIDE, max_budget=WIDE),
        )
    if "medusa" in at:
        heads = Medusa(medusa.load(at["medusa"], lm)[1], CHAIN)
        yield "DDTree of Medusa", DDTree(heads, budget=BUDGET, max_budget=BUDGET)


def _found(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    at = {name: folder / name / "model" for name in RECIPES}
    return {name: path for name, path in at.items() if path.exists()}
