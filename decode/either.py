"""Which of `decode.generate` and `decode.complete` decodes a model with a method."""

from __future__ import annotations

from typing import Any

from decode.complete import PLANNERS
from decode.diffusion.method import DiffusionMethod
from decode.diffusion.points import METHODS as DIFFUSION
from decode.search.components import METHODS as SEARCHES
from decode.speculative.points import METHODS as DRAFTING
from dlm.lm import LanguageModel


def is_diffusion(lm: LanguageModel, method: Any = None, drafter: Any = None) -> bool:
    """Whether it is `generate`.

    A name that only one of them has says which; else the model does. One that is trained in blocks
    is read from left to right if something drafts for it.

    Args:
      lm: the model.
      method: a method, its name, or None.
      drafter: who drafts; None: nobody, or whom the method has.
    """
    if method is not None and not isinstance(method, str):
        return isinstance(method, DiffusionMethod)
    is_read = method in DRAFTING or method in SEARCHES or method in PLANNERS
    if method in DIFFUSION and not is_read:
        return True
    drafts = (is_read or drafter is not None) and lm.cfg.block_len is not None
    return lm.cfg.never_causal and not drafts
