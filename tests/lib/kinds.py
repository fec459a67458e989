"""Small models whose layers are of other kinds than Llama's, or of several."""

import dataclasses
import functools

import jax

from dlm.config import Experts
from dlm.presets import PRESETS
from tests.lib.weights import init_params, noisy

EXPERTS = Experts(num_experts=4, num_chosen=2, d_ff=24, shared_d_ff=12)
# Together they have every word and every setting of a layer.
KINDS = {
    "gemma": dict(
        n_layers=5, pattern=("dense sliding rotary", "dense global rotary"), sliding_window=4,
        local_rope_theta=500.0, norm="rms_offset", norm_places="around", activation="gelu_tanh",
        attention_cap=5.0, attention_scale=0.3, logit_cap=4.0, embed_scale=8.0, qk_norm=True,
    ),
    "experts behind a dense layer": dict(
        n_layers=4, pattern=("dense global rotary", *["experts sliding rotary"] * 3),
        experts=EXPERTS, sliding_window=6, rotary_dim=8,
    ),
    "every other has experts": dict(
        n_layers=4, pattern=("dense global rotary", "experts global none"), experts=EXPERTS,
        qk_norm=True, joint_qk_norm=True, clip_qkv=0.8, norm_places="after", residual_scale=0.5,
    ),
    "gpt2": dict(
        n_layers=2, pattern=("dense global none",), norm="layer", activation="gelu", gated=False,
        qkv_bias=True, o_bias=True, mlp_bias=True, learned_positions=True, logit_scale=0.5,
    ),
    "growing queries": dict(n_layers=2, query_growth=(0.1, 3), mlp_bias=True, o_bias=True),
}  # fmt: skip


@functools.cache
def model(name, **changes):
    cfg = dataclasses.replace(PRESETS["tiny"], **KINDS[name] | changes)
    return cfg, noisy(jax.random.key(1), init_params(jax.random.key(0), cfg))
