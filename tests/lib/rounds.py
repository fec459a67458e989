"""Hand-made rounds, to test one component without a model."""

import jax
import numpy as np

from decode.diffusion.round import Round
from kernels_pallas.unembed_stats import VocabStats


def make_round(confidence, *, eligible=None, entropy=None):
    """One round of [B, W] probabilities; by default every position is eligible."""
    confidence = np.atleast_2d(np.asarray(confidence, np.float32))
    B, W = confidence.shape
    if eligible is None:
        eligible = np.ones((B, W), bool)
    eligible = np.atleast_2d(np.asarray(eligible, bool))
    with np.errstate(divide="ignore"):
        log_prob, second = np.log(confidence), np.log1p(-confidence)
    nothing = np.zeros((B, W), np.float32)
    entropy = nothing if entropy is None else np.atleast_2d(np.asarray(entropy, np.float32))
    token = np.tile(np.arange(W, dtype=np.int32), (B, 1))
    zeros = np.zeros(B, np.int32)
    view = Round(
        tokens=token, proposal=token, log_prob=log_prob, confidence=log_prob,
        eligible=eligible, undecided=eligible, in_block=eligible | True,
        shadow_log_prob=None, expected=None,
        stats=VocabStats(token, log_prob, second, entropy, nothing),
        logits=None, noise_key=np.zeros((B, W, 2), np.uint32), temperature=None, index=token,
        block_start=zeros, block_end=zeros + W, block_step=zeros, row_step=zeros,
        num_open=zeros + W, gen_len=zeros + W, prompt_len=zeros,
    )  # fmt: skip
    return jax.device_put(view)  # one transfer, and no program


@jax.jit
def _commit(rule, view):
    return rule.commit(view, ())[0]


def committed(rule, view):
    """Per row, the positions that a stateless rule commits."""
    return [np.flatnonzero(row).tolist() for row in np.asarray(_commit(rule, view))]
