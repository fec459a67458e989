"""EAGLE-1 and -2's draft network, which continues the target's final hidden states.

References: Li et al., "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty",
arXiv:2401.15077, Sec. 4.1, and the public code; EAGLE-2 (arXiv:2406.16858) drafts other trees with
the same network. In the words of `dlm.heads.eagle`, with f_t the final hidden state of the target,
after its norm:

    u_t = f_t        z = Wfc [E(x_{t+1}) ; u_t] + b
    s_t = z + attention(z), then + MLP(RMSNorm(..))        no norm before attention
    logits = W s_t                                          W is the target's output head

Letters: D model width.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dlm import vocab
from dlm.blocks.linear import linear
from dlm.config import ModelConfig
from dlm.heads import files
from dlm.heads.eagle import EagleHeads, EagleNetwork, layer_specs
from dlm.lm import LanguageModel
from dlm.params import Params, ParamSpec


class Eagle1Network(EagleNetwork):
    """See above."""

    def begin(self, features: jax.Array) -> jax.Array:
        return features

    def enter(self, embedded: jax.Array, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = linear(jnp.concatenate([embedded, states], axis=-1), self.own["fc"])
        z = z + self.own["fc_bias"][None, None]
        return z, z

    def normed(self, states: jax.Array) -> jax.Array:
        return states

    def head(self, target: Params) -> vocab.Head:
        return vocab.head(target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle1Heads(EagleHeads):
    """What the network is; also what `train.trainable` trains beside a model."""

    def specs(self, cfg: ModelConfig) -> Params:
        """Its parameters: a decoder layer without a norm before attention, and "fc"."""
        return network_specs(self.layer(cfg))

    def start(self, cfg: ModelConfig, params: Params, own: Params) -> Params:
        """Fresh parameters `own`, with which states are at first about the features."""
        D = own["fc_bias"].shape[0]
        same = np.eye(D, dtype=own["fc"].dtype)  # not of one process: `own` may be of all
        return own | {"fc": own["fc"].at[D:].set(same)}

    def network(self, cfg: ModelConfig, own: Params) -> Eagle1Network:
        """For a target `cfg`."""
        return Eagle1Network(own, None, self.layer(cfg))


def network_specs(layer: ModelConfig) -> Params:
    D = layer.d_model
    return layer_specs(layer, D) | {
        "fc": ParamSpec((2 * D, D), ("embed", None), (2 * D) ** -0.5),
        "fc_bias": ParamSpec((D,), (None,)),
    }


def load(path: str | pathlib.Path, lm: LanguageModel) -> Eagle1Network:
    """A trained network; ValueError if it was trained for another model than `lm`."""
    heads, own = files.load(path, Eagle1Heads, lm)
    return heads.network(lm.cfg, own)
