"""The drafters that were trained for SmolLM2, ready to decode with."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import dlm
from configs.smollm2 import RECIPES
from decode.speculative.contracts import Drafter
from decode.speculative.drafters.dflash import DFlash
from decode.speculative.drafters.draft_model import DraftModel
from decode.speculative.drafters.eagle import Eagle
from decode.speculative.drafters.hydra import Hydra
from decode.speculative.drafters.masks import Masks
from decode.speculative.drafters.medusa import Medusa
from decode.speculative.tree import chain
from dlm.heads import dflash, eagle_3, hydra, masks, medusa

CHAIN = chain(3)  # on a CPU every further node costs its arithmetic


def trained(lm: dlm.LanguageModel, folder: pathlib.Path) -> Iterator[tuple[str, Drafter]]:
    """By name, those of `configs/smollm2.py` that are there: runs in folders of their names.

    Raises:
      ValueError: one was trained for another model.
    """
    at = {name: folder / name / "model" for name in RECIPES}
    at = {name: path for name, path in at.items() if path.exists()}
    if "draft" in at:
        draft = dlm.load(at["draft"], dtype=lm.cfg.dtype)
        yield "draft model", DraftModel(draft.params, draft.cfg, num_drafts=CHAIN.depth)
    if "medusa" in at:
        yield "Medusa", Medusa(medusa.load(at["medusa"], lm)[1], CHAIN)
    if "hydra_plus" in at:
        yield "Hydra++", Hydra(hydra.load(at["hydra_plus"], lm)[1], CHAIN)
    if "eagle_3" in at:
        yield "EAGLE-3", Eagle(eagle_3.load(at["eagle_3"], lm), CHAIN)
    if "dflash" in at:
        yield "DFlash", DFlash(dflash.load(at["dflash"], lm), num_drafts=CHAIN.depth)
    if "masks" in at:
        network = masks.load(at["masks"], lm)
        for kind, is_quadratic in (("linear", False), ("quadratic", True)):
            yield f"masks, {kind}", Masks(network, CHAIN.depth, is_quadratic=is_quadratic)
