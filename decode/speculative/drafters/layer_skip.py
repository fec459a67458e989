"""The target drafts for itself, with some of its layers left out.

References: Zhang et al., "Draft & Verify: Lossless Large Language Model Acceleration via
Self-Speculative Decoding", arXiv:2309.08168 (any layers); Elhoushi et al., "LayerSkip",
arXiv:2404.16710 (the first ones, of models trained for it).
"""

from __future__ import annotations

from collections.abc import Sequence

from decode.speculative.drafters.draft_model import DraftModel
from dlm.config import ModelConfig
from dlm.models.decoder import check_layers
from dlm.params import Params


def layer_skip(
    params: Params,
    cfg: ModelConfig,
    keep: Sequence[int],
    num_drafts: int = 4,
    is_sampled: bool = False,
) -> DraftModel:
    """A drafter that runs only some layers of the target, whose weights it shares.

    Args:
      params, cfg: the target.
      keep: layers that are run, from 0, rising.
      num_drafts: tokens per round.
      is_sampled: see `DraftModel`.

    Raises:
      ValueError: `keep` is empty, out of order, or has layers that do not exist.
    """
    layers = check_layers(tuple(keep), cfg.n_layers)
    return DraftModel(params, cfg, num_drafts=num_drafts, is_sampled=is_sampled, layers=layers)
