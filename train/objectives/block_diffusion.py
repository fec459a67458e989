"""Block diffusion: autoregression over blocks, masked diffusion inside them.

Reference: Arriola et al., "Block Diffusion: Interpolating Between Autoregressive and Diffusion
Language Models" (BD3-LM), arXiv:2503.09573, Sec. 3; also what turns an autoregressive model into
one with an exact cache (SDAR, arXiv:2510.06303; Fast-dLLM v2, arXiv:2509.26328). With t drawn for
every block, each completion token of it is MASK with probability p = (1 - eps) t + eps; one pass
over [noisy ; clean] predicts every block from the clean blocks before it:

    loss = 1/G * sum over masked tokens of  -log p_theta(x_i | clean blocks before, noisy block) / p

averaged over rows; the network sees neither t nor p. Blocks are counted from the start of the
prompt, as `BlockCausal` decodes them; prompt tokens are never masked. For a model with shifted
logits (Fast-dLLM v2) a block's first token is predicted from the last position of the clean block
before it, and the first one of a text without a prompt is never masked; others (SDAR, LLaDA2) say
a token where its MASK stands.

What the recipes that start from an autoregressive model add, each an option:

  * `complementary`: a text is seen twice, masked where it is shown the other time, so that every
    token is learned once (Fast-dLLM v2, Sec. 3.2). The level is p or 1 - p, with p in
    [eps, 1 - eps], and the loss is the mean of both. Both noisy copies read one clean copy, where
    the public code has two.
  * `schedule`: shorter blocks first; blocks of one are the autoregressive model (LLaDA2.0,
    arXiv:2512.15745, the warm-up of "WSD").
  * `causal_context`: the clean copy is read from left to right, also inside its blocks, so its keys
    and values are those of an autoregressive model. Decode with `CausalContext`; this is what
    self-speculation reads (TiDAR, arXiv:2511.08923; Nemotron-Labs-Diffusion, arXiv:2607.05722).
  * `next_token`: weight of that copy's own loss, -log p_theta(x_i | x_<i) at position i - 1, the
    mean over completions up to their ends, in the same pass. Nemotron-Labs-Diffusion: 1 / 0.3,
    TiDAR: 1, up to a common factor.

Letters: B batch, P prompt length, G completion length, L = P + G rounded up to whole blocks, C
positions per block, n noisy copies.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from dlm import vocab, window
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import Params
from train.config import ConfigError
from train.objectives import Context, Predictions, TokenObjective
from train.reading import NO_MASK


class Views(struct.PyTreeNode):
    """What the noisy copies leave to be predicted.

    Attributes:
      is_masked: [B, G] bool. Tokens that are MASK in one of them.
      level: [B, G] float32. The probability with which that one has masked them.
      counts: [B, G] bool. Tokens up to the end of the completion.
      has_next: whether [B, G] predictions of the next token follow. Static.
    """

    is_masked: jax.Array
    level: jax.Array
    counts: jax.Array
    has_next: bool = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDiffusion(TokenObjective):
    """BD3-LM's training loss.

    Attributes:
      block_len: >= 1, positions per block; decode with the same.
      schedule: >= 1 each, lengths of blocks that come before `block_len`, for as many steps each.
      eps: the smallest masking probability; in (0, 1), and below 0.5 with `complementary`.
      weight_power: a in [0, 1]; masked tokens are weighted by p^-a. 1: the published bound; 0:
        every masked token counts the same (Fast-dLLM v2).
      complementary: whether there is a second noisy copy, masked where the first one is not.
      causal_context: whether the clean copy is read from left to right.
      next_token: >= 0, weight of the clean copy's own loss; only with `causal_context`.
      remat: whether the backward pass recomputes each layer instead of keeping its activations.
    """

    block_len: int = 32
    schedule: tuple[int, ...] = ()
    eps: float = 1e-3
    weight_power: float = 1.0
    complementary: bool = False
    causal_context: bool = False
    next_token: float = 0.0
    remat: bool = False

    def __post_init__(self) -> None:
        if self.block_len < 1:
            raise ValueError(f"block_len={self.block_len} must be at least 1")
        if min(self.schedule, default=1) < 1:
            raise ValueError(f"schedule={self.schedule} must be lengths of at least 1")
        if not 0 < self.eps < (0.5 if self.complementary else 1):
            most = "0.5) with complementary=True" if self.complementary else "1)"
            raise ValueError(f"eps={self.eps} must be in (0, {most}")
        if not 0 <= self.weight_power <= 1:
            raise ValueError(f"weight_power={self.weight_power} must be in [0, 1]")
        if not self.next_token >= 0:
            raise ValueError(f"next_token={self.next_token} must be at least 0")
        if self.next_token and not self.causal_context:
            raise ValueError(
                f"next_token={self.next_token} needs causal_context=True: else the position before "
                "a token sees it"
            )

    def predict(
        self, params: Params, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> Predictions:
        """Hidden states [B, G, D] of the noisy completions, with `Views` as `extra`.

        Behind them there are [B, G, D] of the clean ones if the next token is learned, or, on
        held-out data, if it could be.

        Raises:
          ConfigError: the model has no mask token.
        """
        if cfg.mask_token_id is None:
            raise ConfigError(NO_MASK)
        lengths = (*self.schedule, self.block_len)
        branches = [
            functools.partial(self._read, cfg=cfg, is_validation=context.is_validation, C=C)
            for C in lengths
        ]
        if len(lengths) == 1:
            return branches[0](params, batch, context.key)
        stage = jnp.floor(jnp.asarray(context.progress) * len(lengths)).astype(jnp.int32)
        said: Predictions = jax.lax.switch(stage, branches, params, batch, context.key)
        return said

    def score(self, params: Params, said: Predictions) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and what it says about the model.

        Returns:
          Scalar float32, and metrics: "loss", "masked_accuracy" (masked tokens whose arg-max is
          right), "nll_bound" (an estimate, in nats per token up to the end of a completion, of a
          bound on the negative log-likelihood, whatever the loss's weights) and, if the next token
          was predicted, "nll_next_token" (that of the clean copy, of the same tokens).
        """
        stats = vocab.score(vocab.head(params), said.hidden, said.targets)
        loss = -(said.weight * stats.log_prob).sum()
        views: Views = said.extra
        G = views.is_masked.shape[1]
        nll, next_nll = -stats.log_prob[:, :G], -stats.log_prob[:, G:]
        is_judged = views.is_masked & views.counts
        is_right = (stats.token == said.targets)[:, :G] & is_judged
        num = jnp.maximum(views.counts.sum(), 1) * (2 if self.complementary else 1)
        bound = jnp.where(is_judged, nll / views.level, 0).sum() / num
        metrics = {
            "loss": loss,
            "masked_accuracy": is_right.sum() / jnp.maximum(is_judged.sum(), 1),
            "nll_bound": bound,
        }
        if views.has_next:
            total = jnp.maximum(views.counts.sum(), 1)
            metrics["nll_next_token"] = jnp.where(views.counts, next_nll, 0).sum() / total
        return loss, metrics

    def _read(
        self,
        params: Params,
        batch: Mapping[str, jax.Array],
        key: jax.Array,
        *,
        cfg: ModelConfig,
        is_validation: bool,
        C: int,
    ) -> Predictions:
        """The predictions of blocks of C."""
        prompt, completion, start = batch["prompt"], batch["completion"], batch["prompt_start"]
        (B, P), G = prompt.shape, completion.shape[1]
        whole = math.lcm(self.block_len, *self.schedule)
        L = -(-(P + G) // whole) * whole

        # Rows move to the left, so that blocks start where the prompt does.
        source = jnp.arange(L)[None] + start[:, None]  # [B, L]
        is_real = source < P + G
        tokens = jnp.concatenate([prompt, completion], axis=1)
        clean = jnp.take_along_axis(tokens, jnp.minimum(source, P + G - 1), axis=1)
        can_be = is_real & (source >= P)
        if cfg.shifted_logits:  # nothing speaks of the first token of a text
            can_be &= jnp.arange(L)[None] > 0
        masked, p = self._draw(key, can_be, C)
        n, mask_id = len(masked), jnp.int32(cfg.mask_token_id)
        noisy = [jnp.where(is_masked, mask_id, clean) for is_masked in masked]

        every = window.Window(
            tokens=jnp.concatenate([*noisy, clean], axis=1),
            positions=jnp.broadcast_to(jnp.tile(jnp.arange(L), n + 1)[None], (B, (n + 1) * L)),
            mask=window.BlockDiffusion(
                (~is_real).astype(jnp.int32), C, 1 if self.causal_context else C
            ),
        )
        hidden = decoder.forward(params, cfg, every, remat=self.remat).hidden
        index = jnp.arange(G)[None] + P - start[:, None]  # [B, G], where completions lie in rows
        of = lambda x: jnp.take_along_axis(x, index, axis=1)  # noqa: E731
        read, is_masked, level = index, of(masked[0]), of(p)
        if self.complementary:  # each token where it is masked
            read = jnp.where(is_masked, index, L + index)
            level = jnp.where(is_masked, level, 1 - level)
            is_masked = of(can_be)
        before = n * L + index - 1  # in the clean copy
        if cfg.shifted_logits:
            read = jnp.where(index % C == 0, before, read - 1)
        counts = (jnp.arange(G)[None] < batch["completion_len"][:, None]) & (index > 0)
        has_next = self.causal_context and (self.next_token > 0 or is_validation)
        weight = is_masked / level**self.weight_power / (n * B * G)
        targets = completion
        if has_next:
            read = jnp.concatenate([read, jnp.maximum(before, n * L)], axis=1)
            targets = jnp.concatenate([targets, completion], axis=1)
            next_weight = self.next_token * counts / jnp.maximum(counts.sum(), 1)
            weight = jnp.concatenate([weight, next_weight], axis=1)
        return Predictions(
            hidden=jnp.take_along_axis(hidden, read[..., None], axis=1),
            targets=targets,
            weight=weight,
            extra=Views(is_masked, level, counts, has_next),
        )

    def _draw(self, key: jax.Array, can_be: jax.Array, C: int) -> tuple[list[jax.Array], jax.Array]:
        """What each noisy copy masks of the tokens that `can_be`, and p: [B, L] each."""
        B, L = can_be.shape
        t_key, mask_key = jax.random.split(key)
        most = 1 - self.eps if self.complementary else 1.0
        p = (most - self.eps) * jax.random.uniform(t_key, (B, L // C)) + self.eps
        p = jnp.repeat(p, C, axis=1)
        is_first = jax.random.uniform(mask_key, (B, L)) < p
        return [can_be & is_first, can_be & ~is_first][: 1 + self.complementary], p
