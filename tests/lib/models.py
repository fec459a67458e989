"""Small random models that are worth decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dlm import vocab
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import Params
from dlm.window import Window
from tests.lib.weights import init_params

# A masked-diffusion model small enough for a plain-Python oracle.
TOY_CFG = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24, vocab_size=24,
    max_seq_len=64, mask_token_id=23, eos_token_id=22, pad_token_id=21, dtype="float32",
)  # fmt: skip


def spread(params: Params) -> Params:
    """Makes random weights opinionated: layers that matter, and confidences that differ."""
    layers = dict(params["layers"])
    layers["attention"] = layers["attention"] | {"o": layers["attention"]["o"] * 4.0}
    layers["mlp"] = layers["mlp"] | {"down": layers["mlp"]["down"] * 4.0}
    return params | {"layers": layers, "unembed": params["unembed"] * 6.0}


def random_model(seed: int, cfg: ModelConfig) -> Params:
    """Random weights, spread."""
    return jax.device_put(spread(jax.device_get(init_params(jax.random.key(seed), cfg))))


@functools.cache
def dream_toy() -> tuple[ModelConfig, Params]:
    """A toy with the conventions of Dream: shifted logits, biases."""
    cfg = dataclasses.replace(TOY_CFG, qkv_bias=True, shifted_logits=True)
    return cfg, random_model(5, cfg)


def markov(table):
    """A model whose law of the next token is row `token` of a table [V, V]."""
    V = len(table)
    cfg = ModelConfig(
        d_model=V, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, d_ff=4, vocab_size=V,
        max_seq_len=64, eos_token_id=None, dtype="float32",
    )  # fmt: skip
    params = jax.tree.map(np.asarray, random_model(0, cfg))
    layers = jax.tree.map(lambda x: 0 * x, params["layers"])
    # Tokens are unit vectors, long enough for the norm's epsilon, which makes them sqrt(V) long.
    unembed = np.log(np.maximum(table, 1e-30)).T / np.sqrt(V)
    params |= {"layers": layers, "embed": 100 * np.eye(V), "unembed": unembed}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), cfg


MOST = 40  # tokens of a text below; one length, so that little is compiled


def hidden_of(
    params: Params, cfg: ModelConfig, tokens: np.ndarray, layers: tuple[int, ...] = ()
) -> np.ndarray:
    """What a causal model makes of a text without padding: [n, D], or features of layers [n, F]."""
    padded = np.pad(np.asarray(tokens, np.int32), (0, MOST - len(tokens)))
    return np.asarray(_hidden(params, cfg, padded[None], layers))[: len(tokens)]


def laws_of(
    params: Params, cfg: ModelConfig, tokens: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """The law of the token behind each token of a text: [n, V] float64."""
    z = np.asarray(_logits(params, hidden_of(params, cfg, tokens)), np.float64) / temperature
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("cfg", "layers"))
def _hidden(
    params: Params, cfg: ModelConfig, tokens: jax.Array, layers: tuple[int, ...]
) -> jax.Array:
    window = Window.at(tokens, jnp.zeros(1, jnp.int32), is_causal=True)
    output = decoder.forward(params, cfg, window, feature_layers=layers)
    return (output.features if layers else output.hidden)[0]


def _logits(params: Params, hidden: np.ndarray) -> np.ndarray:
    return hidden @ np.asarray(vocab.head(params)).T
