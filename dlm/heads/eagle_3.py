"""EAGLE-3's draft network, which reads three layers of the target and feeds on its own states.

References: Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via
Training-Time Test", arXiv:2503.01840, Sec. 3.1, and the public codes; EAGLE-3.1, which keeps states
from drifting away in deep drafts, "attention drift", arXiv:2605.09992. In the words of
`dlm.heads.eagle`, with g_t the residual stream of the target at the entrance of three layers:

    u_t = Wfc g_t                                            of true features only
    s_t = u_t + attention([RMSNorm(E(x_{t+1})) ; RMSNorm(u_t)]), then + MLP(RMSNorm(..))
    logits = W' RMSNorm(s_t)                                 W' is its own, for part of the tokens

Published ones differ in four switches:

    fc_norm               each of the three parts of g_t is normalised first (EAGLE-3.1)
    norm_before_fc        or g_t is, as a whole
    norm_before_residual  RMSNorm(u_t) is what attention is added to, not u_t
    norm_output           the next state is made of RMSNorm(s_t), the one of the logits (EAGLE-3.1)

A published one is read by `dlm.heads.published.eagle_3`.

Letters: D model width, F MLP width, V vocabulary, U draft vocabulary, n features, I width of the
target.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlm import vocab
from dlm.blocks.linear import linear
from dlm.blocks.norm import rms_norm
from dlm.config import ModelConfig
from dlm.heads import files
from dlm.heads.draft_vocab import Vocab, check_vocab, read_vocab
from dlm.heads.eagle import EagleHeads, EagleNetwork, layer_specs
from dlm.lm import LanguageModel
from dlm.params import Params, ParamSpec, param_specs


class Eagle3Network(EagleNetwork):
    """See above.

    Attributes:
      norm_before_residual, norm_output: see above; the other switches are known from `own`. Static.
    """

    norm_before_residual: bool = struct.field(pytree_node=False, default=False)
    norm_output: bool = struct.field(pytree_node=False, default=False)

    @property
    def target_width(self) -> int:
        width: int = self.own["fc"].shape[0] // len(self.feature_layers)
        return width

    def begin(self, features: jax.Array) -> jax.Array:
        eps = self.cfg.norm_eps
        if "fc_norm" in self.own:
            parts = jnp.split(features, len(self.feature_layers), axis=-1)
            normed = [rms_norm(x, self.own["fc_norm"][i], eps) for i, x in enumerate(parts)]
            features = jnp.concatenate(normed, axis=-1)
        if "input_norm" in self.own:
            features = rms_norm(features, self.own["input_norm"], eps)
        return linear(features, self.own["fc"])

    def feed(self, states: jax.Array) -> jax.Array:
        return self.normed(states) if self.norm_output else states

    def enter(self, embedded: jax.Array, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        eps = self.cfg.norm_eps
        e = rms_norm(embedded, self.own["embed_norm"], eps)
        u = rms_norm(states, self.own["state_norm"], eps)
        return jnp.concatenate([e, u], axis=-1), u if self.norm_before_residual else states

    def normed(self, states: jax.Array) -> jax.Array:
        return rms_norm(states, self.own["final_norm"], self.cfg.norm_eps)

    def head(self, target: Params) -> vocab.Head:
        if "unembed" not in self.own:
            return vocab.head(target)
        head: jax.Array = self.own["unembed"]
        return head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle3Heads(EagleHeads):
    """What the network is; also what `train.trainable` trains beside a model.

    Attributes:
      layers: at whose entrance the target is read, three of them, see
        `dlm.models.decoder.forward`; empty: 2, L/2 and L - 3 of a target of L layers, as published,
        or L/4, L/2 and L of one of less than 8.
      vocab: tokens it can draft, or a JSON file with the list of them
        (`python -m scripts.draft_vocab`); empty: all.
      n_layers: >= 1, of the network; those behind the first are plain decoder layers.
      fc_norm, norm_before_fc, norm_before_residual, norm_output: see above; not both of the first
        two.
    """

    layers: tuple[int, ...] = ()
    vocab: Vocab = ()
    n_layers: int = 1
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab", read_vocab(self.vocab))
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.layers and len(set(self.layers)) != 3:
            raise ValueError(f"layers={self.layers} must be three different ones")
        if self.n_layers < 1:
            raise ValueError(f"n_layers={self.n_layers} must be at least 1")
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("fc_norm=True and norm_before_fc=True exclude each other: one norm")
        super().__post_init__()

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens it can draft, ascending; empty: all."""
        assert not isinstance(self.vocab, str)
        return self.vocab

    def feature_layers(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Of a target `cfg`; ValueError if it does not have them."""
        L = cfg.n_layers
        chosen = self.layers or ((2, L // 2, L - 3) if L >= 8 else (L // 4, L // 2, L))
        if len(set(chosen)) != 3 or not all(0 <= layer <= L for layer in chosen):
            raise ValueError(
                f"layers={chosen} must be three different ones in [0, n_layers={L}] of the target"
            )
        return chosen

    def specs(self, cfg: ModelConfig) -> Params:
        """Its parameters, see `network_specs`."""
        self.feature_layers(cfg)
        check_vocab(self.ids, cfg)
        return network_specs(
            self.layer(cfg),
            (cfg.d_model,) * 3,
            len(self.ids) or cfg.vocab_size,
            fc_norm=self.fc_norm,
            norm_before_fc=self.norm_before_fc,
        )

    def start(self, cfg: ModelConfig, params: Params, own: Params) -> Params:
        """Fresh parameters `own`, whose output head becomes the model's."""
        head = vocab.head_weight(params).astype(own["unembed"].dtype)
        norm = params["final_norm"].astype(own["final_norm"].dtype)
        if self.ids:
            head = head[np.asarray(self.ids)]
        return own | {"unembed": head, "final_norm": norm}

    def network(self, cfg: ModelConfig, own: Params) -> Eagle3Network:
        """For a target `cfg`."""
        ids = jnp.asarray(self.ids, jnp.int32) if self.ids else None
        return Eagle3Network(
            own,
            ids,
            self.layer(cfg),
            self.feature_layers(cfg),
            norm_before_residual=self.norm_before_residual,
            norm_output=self.norm_output,
        )

    def layer(self, cfg: ModelConfig) -> ModelConfig:
        return dataclasses.replace(super().layer(cfg), n_layers=self.n_layers)


def network_specs(
    layers: ModelConfig,
    features: tuple[int, ...],
    num_ids: int,
    *,
    fc_norm: bool = False,
    norm_before_fc: bool = False,
) -> Params:
    """A decoder layer with two norms before attention, "more" layers, "fc", norms, and a head.

    Args:
      layers: the network's.
      features: the width of each.
      num_ids: U.
      fc_norm, norm_before_fc: see above.
    """
    D, n, I = layers.d_model, len(features), sum(features)  # noqa: E741
    norm = ParamSpec((D,), (None,), fill=1.0)
    specs = layer_specs(layers, 2 * D) | {
        "fc": ParamSpec((I, D), ("embed", None), I**-0.5),
        "embed_norm": norm,
        "state_norm": norm,
        "final_norm": norm,
        "unembed": ParamSpec((num_ids, D), ("vocab", "embed"), D**-0.5),
    }
    if layers.n_layers > 1:
        more = dataclasses.replace(layers, n_layers=layers.n_layers - 1)
        specs["more"] = param_specs(more)["layers"]
    if fc_norm:
        specs["fc_norm"] = ParamSpec((n, I // n), (None, None), fill=1.0)
    if norm_before_fc:
        specs["input_norm"] = ParamSpec((I,), (None,), fill=1.0)
    return specs


def load(path: str | pathlib.Path, lm: LanguageModel) -> Eagle3Network:
    """A trained network; ValueError if it was trained for another model than `lm`."""
    heads, own = files.load(path, Eagle3Heads, lm)
    return heads.network(lm.cfg, own)
