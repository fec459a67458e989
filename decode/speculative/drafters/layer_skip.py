"""The target drafts for itself, with some of its layers left out.

References: Zhang et al., "Draft & Verify: Lossless Large Language Model Acceleration via
Self-Speculative Decoding", arXiv:2309.08168 (any layers); Elhoushi et al., "LayerSkip",
arXiv:2404.16710 (the first ones, of models trained for it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from decode.speculative.drafters.draft_model import DraftModel
from dlm.config import ModelConfig
from dlm.params import Params


def layer_skip(
    params: Params,
    cfg: ModelConfig,
    keep: Sequence[int],
    num_drafts: int = 4,
    is_sampled: bool = False,
) -> DraftModel:
    """A drafter that runs only some layers of the target, of which it keeps a copy.

    Args:
      params, cfg: the target.
      keep: layers that are run, from 0, rising.
      num_drafts: tokens per round.
      is_sampled: see `DraftModel`.

    Raises:
      ValueError: `keep` is empty, out of order, or has layers that do not exist.
    """
    layers = list(keep)
    if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= cfg.n_layers:
        raise ValueError(f"keep={layers} must be rising layers of the {cfg.n_layers} there are")
    kept = jax.tree.map(lambda x: x[jnp.array(layers)], params["layers"])
    draft = dataclasses.replace(cfg, n_layers=len(layers))
    return DraftModel(
        params | {"layers": kept}, draft, num_drafts=num_drafts, is_sampled=is_sampled
    )
