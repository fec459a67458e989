"""Forward passes of training: what a model makes of texts, of masked completions, of two views.

Letters: B batch, P prompt length, G completion length, T = P + G, A positions of the longest block,
D model width.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import Params
from dlm.window import Window
from kernels_pallas.window_attention import pack_mask
from train.config import ConfigError
from train.objectives import Predictions, row_mean_weight

NO_MASK = (
    "mask_token_id=None of the model must be a token, whose place is learned: give it one, such as "
    "train.with_mask={'mask_token': '<|mdm_mask|>'}"
)


class Text(struct.PyTreeNode):
    """Prompts and completions as an autoregressive model reads them.

    Attributes:
      tokens: [B, T] int32.
      hidden: [B, T, D]. Final hidden states; that of position t predicts token t + 1.
      is_scored: [B, T] bool. Tokens that are to be predicted.
      start: [B] int32. The first real position.
      features: [B, T, n D], or None; see `dlm.models.decoder.forward`.
    """

    tokens: jax.Array
    hidden: jax.Array
    is_scored: jax.Array
    start: jax.Array
    features: jax.Array | None = None

    @property
    def positions(self) -> jax.Array:
        """[B, T] int32. Rotary positions; before the first real one, 0."""
        index = jnp.arange(self.tokens.shape[1])[None]
        return jnp.maximum(index - self.start[:, None], 0)


def read_text(
    params: Params,
    cfg: ModelConfig,
    batch: Mapping[str, jax.Array],
    on_prompt: bool,
    remat: bool = False,
    feature_layers: tuple[int, ...] = (),
    sublayers: jax.Array | None = None,
) -> Text:
    """The forward pass of `Causal`: one batch, and which tokens of it count.

    `feature_layers` and `sublayers` are those of `dlm.models.decoder.forward`.
    """
    tokens = jnp.concatenate([batch["prompt"], batch["completion"]], axis=1)  # [B, T]
    output = decoder.forward(
        params,
        cfg,
        _window(batch, tokens, is_causal=True),
        feature_layers=feature_layers,
        sublayers=sublayers,
        remat=remat,
    )
    is_scored = scored_tokens(batch, on_prompt)
    return Text(tokens, output.hidden, is_scored, batch["prompt_start"], output.features)


def scored_tokens(batch: Mapping[str, jax.Array], on_prompt: bool) -> jax.Array:
    """[B, T] bool: which tokens of autoregressive texts are to be predicted."""
    start, P = batch["prompt_start"], batch["prompt"].shape[1]
    index = jnp.arange(P + batch["completion"].shape[1])[None]
    # The first real token of a row, or of a text in it, has nothing to be predicted from.
    is_scored = (index > start[:, None]) & (index < P + batch["completion_len"][:, None])
    if "segment" in batch:
        is_scored &= ~_is_first(batch["segment"])
    return is_scored if on_prompt else is_scored & (index >= P)


def read_completion(
    params: Params,
    cfg: ModelConfig,
    batch: Mapping[str, jax.Array],
    is_masked: jax.Array,
    mask: jax.Array | None = None,
    remat: bool = False,
) -> jax.Array:
    """Hidden states [B, G, D] that predict a completion of which some tokens are masked.

    Only completions are scored, so only they are to be multiplied with the vocabulary.

    Args:
      params, cfg, batch: as `train.objectives` says.
      is_masked: [B, G] bool.
      mask: attention over prompt and completion, see `dlm.window.Window`; None: all of it.
      remat: whether the backward pass recomputes each layer.

    Raises:
      ConfigError: the model has no mask token, or it is shifted and there is no prompt.
    """
    prompt = batch["prompt"]
    P = prompt.shape[1]
    if cfg.mask_token_id is None:
        raise ConfigError(NO_MASK)
    if cfg.shifted_logits and P == 0:
        raise ConfigError("data.prompt_len=0 must be at least 1 for a model with shifted_logits")
    noisy = jnp.where(is_masked, cfg.mask_token_id, batch["completion"])
    window = _window(batch, jnp.concatenate([prompt, noisy], axis=1), mask)
    hidden = decoder.forward(params, cfg, window, remat=remat).hidden
    return hidden[:, P - 1 : -1] if cfg.shifted_logits else hidden[:, P:]


def _window(
    batch: Mapping[str, jax.Array],
    tokens: jax.Array,
    mask: jax.Array | None = None,
    is_causal: bool = False,
) -> Window:
    """Texts [B, T] left-padded, or several in a row that do not see each other."""
    segment = batch.get("segment")
    if segment is None:
        return Window.left_padded(tokens, batch["prompt_start"], mask=mask, is_causal=is_causal)
    T = tokens.shape[1]
    index = jnp.arange(T)[None]
    begin = jax.lax.cummax(jnp.where(_is_first(segment), index, 0), axis=1)
    is_seen = segment[:, :, None] == segment[:, None]  # [B, T, T]
    if is_causal:
        is_seen &= jnp.tri(T, dtype=bool)[None]
    bits = pack_mask(is_seen)
    return Window(tokens, index - begin, mask=bits if mask is None else bits & mask)


def _is_first(segment: jax.Array) -> jax.Array:
    """[B, T] bool. Where a segment begins, but for the row's first one."""
    return jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)))


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
