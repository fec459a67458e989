"""Hand-made rounds, to test one component without a model."""

import jax
import jax.numpy as jnp
import numpy as np

from decode.diffusion.round import Round
from kernels_pallas.unembed_stats import VocabStats


def make_round(confidence, *, eligible=None, entropy=None):
    """One round of [B, W] probabilities; by default every position is eligible."""
    confidence = jnp.asarray(np.atleast_2d(confidence), jnp.float32)
    B, W = confidence.shape
    if eligible is None:
        eligible = np.ones((B, W), bool)
    eligible = jnp.asarray(np.atleast_2d(eligible), bool)
    log_prob = jnp.log(confidence)
    entropy = jnp.zeros((B, W)) if entropy is None else jnp.asarray(np.atleast_2d(entropy))
    token = jnp.tile(jnp.arange(W), (B, 1))
    zeros = jnp.zeros(B, jnp.int32)
    return Round(
        tokens=token, proposal=token, log_prob=log_prob, confidence=log_prob,
        eligible=eligible, undecided=eligible, in_block=eligible | True,
        shadow_log_prob=None, expected=None,
        stats=VocabStats(token, log_prob, jnp.log1p(-confidence), entropy, jnp.zeros((B, W))),
        logits=None, noise_key=jnp.zeros((B, W, 2), jnp.uint32), temperature=None, index=token,
        block_start=zeros, block_end=zeros + W, block_step=zeros, row_step=zeros,
        num_open=zeros + W, gen_len=zeros + W, prompt_len=zeros,
    )  # fmt: skip


@jax.jit
def _commit(rule, view):
    return rule.commit(view, ())[0]


def committed(rule, view):
    """Per row, the positions that a stateless rule commits."""
    return [np.flatnonzero(row).tolist() for row in np.asarray(_commit(rule, view))]
