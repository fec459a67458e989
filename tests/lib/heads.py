"""Draft heads, networks and models beside a toy target."""

import dataclasses
import json
import pathlib

import jax

from decode.speculative.drafters.hydra import Hydra
from decode.speculative.drafters.medusa import Medusa
from decode.speculative.tree import from_paths
from dlm.config import ModelConfig
from dlm.heads.draft_lm import Draft
from dlm.heads.hydra import HydraHeads
from dlm.heads.medusa import MedusaHeads
from dlm.trainable import Learned
from tests.lib.models import hidden_of, random_model
from tests.lib.weights import init_from_specs, noisy
from train.objectives.hydra import HydraLoss
from train.objectives.medusa import MedusaLoss

KINDS = {"medusa": (MedusaHeads, Medusa, MedusaLoss), "hydra": (HydraHeads, Hydra, HydraLoss)}

TREE = from_paths([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


def init(heads, cfg):
    """Random weights."""
    return init_from_specs(jax.random.key(1), heads.specs(cfg), cfg.jnp_dtype)


def fresh(kind, cfg, params, **sizes):
    """Heads of a kind, and what they start as."""
    heads = KINDS[kind][0](num_heads=3, **sizes)
    return heads, heads.start(cfg, params, init(heads, cfg))


def shaken(own):
    """Heads that are not what they start as."""
    leaves, tree = jax.tree.flatten(jax.device_get(own))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [noisy(key, x) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, moved)


def simulated_length(right):
    """Mean tokens per round of a chain whose draft j is right behind the roots in `right[j]`."""
    lengths = []
    for root in right[0]:
        n = 0
        while n < len(right) and right[n].get(root, False):
            n += 1
        lengths.append(1 + n)
    return sum(lengths) / len(lengths)


def features_of(network, cfg, params, tokens):
    """What a network reads of a text: [n, F]."""
    return hidden_of(params, cfg, tokens, network.feature_layers)


def models(toy_cfg, toy_params, dtype="float32"):
    """A target, and a draft model of one layer."""
    cfg = dataclasses.replace(toy_cfg, n_layers=1, dtype=dtype)
    return Learned(toy_params, Draft(random_model(9, cfg), cfg))


def target_of(root: pathlib.Path) -> ModelConfig:
    """The configuration of a target that a network in a folder was published for."""
    raw = json.loads((root / "config.json").read_text())
    return ModelConfig(
        d_model=raw["hidden_size"],
        n_layers=raw.get("num_target_layers", 12),
        n_heads=4,
        n_kv_heads=4,
        head_dim=16,
        d_ff=8,
        vocab_size=raw["vocab_size"],
        max_seq_len=64,
        eos_token_id=2,
        rope_theta=5e5,  # of the target: not the network's
        dtype="float32",
    )
