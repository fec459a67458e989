"""Certainty-forcing distillation: a model learns to be sure of many of its own tokens at once.

Reference: Chen et al., "dParallel: Learnable Parallel Decoding for dLLMs", arXiv:2509.26488, Sec. 3
and the public code. Completions are the model's own, decoded one token per step
(`train.trajectories`). Of each row one block is active: what comes before it is given, what comes
after it is all MASK. With masked positions drawn with probability q = (1 - eps) / 2 + eps, a row is
seen twice, as M_1 and as its complement M_2 within the block:

    CE_v  = mean over M_v of -log p(y_i)
    C_v   = positions of M_v whose arg-max is y_i
    ENT_v = mean over C_v of the entropy of softmax(z_i / T)
    loss  = CE_1 + CE_2 + beta (ENT_1 + ENT_2), averaged over rows

The entropy's gradient flows through the probabilities; positions that are predicted wrongly get
none of it. A mean over no position is 0.

The public code draws one block for all rows of a batch and is meant for one row per device; here
each row draws its own. Decode with `EntropyThreshold`.

Letters: B batch, G completion length, A positions of the longest block, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dlm import vocab
from dlm.config import ModelConfig
from dlm.params import Params
from train.objectives import Context, Predictions, TokenObjective, row_mean_weight
from train.objectives.masked_diffusion import read_completion


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertaintyForcing(TokenObjective):
    """dParallel's training loss.

    Attributes:
      block_len: positions per block (LLaDA: 32); None: the whole completion is active (Dream).
      beta: weight of the entropy (LLaDA: 2, Dream: 1).
      temperature: T > 0 of the entropy.
      eps: q = (1 - eps) / 2 + eps is the probability of being masked in the first view; in [0, 1].
      remat: whether the backward pass recomputes each layer instead of keeping its activations.
    """

    block_len: int | None = 32
    beta: float = 2.0
    temperature: float = 0.5
    eps: float = 1e-3
    remat: bool = False

    def __post_init__(self) -> None:
        check_certainty(self.block_len, self.beta, self.temperature)
        if not 0 <= self.eps <= 1:
            raise ValueError(f"eps={self.eps} must be in [0, 1]")

    def predict(
        self, params: Params, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> Predictions:
        """Hidden states of the active blocks; the batch's completions are the model's own.

        Raises:
          ValueError: the model has no mask token, or it is shifted and there is no prompt.
        """
        return predict_views(params, cfg, batch, *self._corrupt(batch, context), self.remat)

    def score(self, params: Params, said: Predictions) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, and metrics: see `certainty_loss`."""
        return certainty_loss(vocab.head(params), said, said.extra, self.beta, self.temperature)

    def _corrupt(
        self, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Blocks [B], [B] in completion positions, and [B, A] bool: masked in the first view."""
        B, G = batch["completion"].shape
        block_key, mask_key = jax.random.split(context.key)
        if self.block_len is None:
            start, stop = jnp.zeros(B, jnp.int32), jnp.full(B, G)
        else:
            start, stop = draw_block(block_key, B, G, self.block_len)
        q = (1 - self.eps) * 0.5 + self.eps
        size = G if self.block_len is None else min(self.block_len, G)
        return start, stop, jax.random.uniform(mask_key, (B, size)) < q


def draw_block(
    key: jax.Array, num_rows: int, gen_len: int, block_len: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """One block per row, as [B] first and past-the-last completion positions.

    k ~ Uniform{0 .. gen_len // block_len}; the last one is what blocks leave over, perhaps nothing.
    """
    last = gen_len // block_len
    k = jax.random.randint(key, (num_rows,), 0, last + 1)
    return k * block_len, jnp.where(k == last, gen_len, (k + 1) * block_len)


def predict_views(
    params: Params,
    cfg: ModelConfig,
    batch: Mapping[str, jax.Array],
    start: jax.Array,
    stop: jax.Array,
    is_masked: jax.Array,
    remat: bool,
) -> Predictions:
    """Both views of every row in one forward, and what they say about the active blocks.

    A position is masked in exactly one of them, so each is read once.

    Args:
      params, cfg, batch: as `train.objectives` says.
      start: [B] int32. First completion position of the active block.
      stop: [B] int32. Past its last, at most A further.
      is_masked: [B, A] bool. Positions of the block, from `start`, masked in the first view.
      remat: whether the backward pass recomputes each layer.

    Returns:
      Predictions for [B, A] positions whose weighted cross-entropy is CE_1 + CE_2. With it, as
      `extra`, M_1 and M_2: [2, B, A] bool.
    """
    B, G = batch["completion"].shape
    size = is_masked.shape[1]
    index = start[:, None] + jnp.arange(size)[None]  # [B, A]
    is_active = index < stop[:, None]
    in_view = jnp.stack([is_active & is_masked, is_active & ~is_masked])

    rows, inside = jnp.arange(B)[:, None], jnp.where(is_active, index, G)
    is_future = jnp.arange(G)[None] >= stop[:, None]
    shown = [
        is_future.at[rows, inside].set(masked, mode="drop") for masked in (is_masked, ~is_masked)
    ]
    both = {name: jnp.concatenate([x, x]) for name, x in batch.items()}
    hidden = read_completion(params, cfg, both, jnp.concatenate(shown), remat=remat)  # [2B, G, D]
    index = jnp.minimum(index, G - 1)
    first, second = (jnp.take_along_axis(x, index[..., None], axis=1) for x in jnp.split(hidden, 2))
    return Predictions(
        hidden=jnp.where(is_masked[..., None], first, second),
        targets=jnp.take_along_axis(batch["completion"], index, axis=1),
        weight=row_mean_weight(in_view[0]) + row_mean_weight(in_view[1]),
        extra=in_view,
    )


def certainty_loss(
    head: jax.Array,
    said: Predictions,
    in_view: jax.Array,
    beta: float,
    temperature: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """CE plus beta times ENT.

    Args:
      head: [V, D]. The model's output head.
      said: its predictions, [B, A].
      in_view: [n, B, A] bool. Positions whose entropy is lowered, one mean per view; none of them
        in two views.
      beta: weight of the entropy.
      temperature: at which it is taken.

    Returns:
      Scalar float32, and metrics: "loss", "cross_entropy" (CE_1 + CE_2), "entropy" (the sum of
      ENT_v, in nats) and "masked_accuracy" (active tokens whose arg-max is right).
    """
    stats = vocab.score(head, said.hidden, said.targets)
    cross_entropy = -(said.weight * stats.log_prob).sum()
    is_right = stats.token == said.targets
    weight = sum(row_mean_weight(view & is_right) for view in in_view)
    entropy = vocab.score(head, said.hidden / temperature, said.targets).entropy
    entropy = (weight * entropy).sum()
    loss = cross_entropy + beta * entropy
    is_scored = said.weight > 0
    return loss, {
        "loss": loss,
        "cross_entropy": cross_entropy,
        "entropy": entropy,
        "masked_accuracy": (is_right & is_scored).sum() / jnp.maximum(is_scored.sum(), 1),
    }


def check_certainty(block_len: int | None, beta: float, temperature: float) -> None:
    """Raises ValueError on fields out of range."""
    if block_len is not None and block_len < 1:
        raise ValueError(f"block_len={block_len} must be at least 1, or None")
    if not beta >= 0:
        raise ValueError(f"beta={beta} must be at least 0")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
