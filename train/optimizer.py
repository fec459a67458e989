"""The optimiser: AdamW with warm-up, cosine decay, clipping and accumulation, all from optax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from dlm.params import Params
from train.config import OptimConfig


def learning_rate_schedule(optim: OptimConfig) -> optax.Schedule:
    """Learning rate by number of updates; `optim.decay_steps` must have been filled in.

    Linear from 0 over the warm-up, constant, half a cosine down to `end_factor` of the highest.
    """
    peak = optim.learning_rate
    warmup = optim.warmup_steps // optim.accumulate
    end = max(optim.decay_steps // optim.accumulate, warmup + 1)
    fall = max(round(optim.decay_share * end), 1)
    start = max(end - fall, warmup)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.cosine_decay_schedule(peak, end - start, optim.end_factor),
        ],
        boundaries=[warmup, start],
    )


def make_optimizer(optim: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """The gradient transformation of `optim`; a pure function of it."""
    transforms = []
    if optim.clip_norm:
        transforms.append(optax.clip_by_global_norm(optim.clip_norm))
    transforms.append(
        optax.adamw(
            learning_rate_schedule(optim),
            b1=optim.beta1,
            b2=optim.beta2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mask=is_decayed,
        )
    )
    optimizer = optax.chain(*transforms)
    if optim.accumulate == 1:
        return optimizer
    return optax.MultiSteps(optimizer, optim.accumulate).gradient_transformation()


def is_decayed(params: Params) -> Params:
    """Per parameter, whether weight decay applies: to matrices and embeddings."""

    def decays(path: jax.tree_util.KeyPath, _: object) -> bool:
        *_, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return not (name.endswith(("norm", "bias")) or name.rstrip("0123456789") == "b")

    return jax.tree_util.tree_map_with_path(decays, params)


def update_ema(ema: Params, params: Params, num_updates: jax.Array, optim: OptimConfig) -> Params:
    """The moving average after `num_updates` updates, of which the last gave `params`: float32."""
    warmup = (1.0 + num_updates) / (10.0 + num_updates)
    decay = jnp.minimum(jnp.float32(optim.ema_decay), warmup)

    def mix(old: jax.Array, new: jax.Array) -> jax.Array:
        return (decay * old + (1 - decay) * new).astype(old.dtype)

    return jax.tree.map(mix, ema, params)
