"""Random weights as `dlm.params` draws them, by programs that all models share.

A model that is drawn by a program of its own waits a second for the compiler, and most tests have
one. Here every leaf is the beginning of a draw of one of a few lengths, and the rest is NumPy.
"""

import functools
import zlib

import jax
import numpy as np

from dlm.config import ModelConfig
from dlm.params import Params, ParamSpec, param_specs

SHORTEST = 4**5  # numbers of a draw; the others are powers of four as well


def init_params(key: jax.Array, cfg: ModelConfig) -> Params:
    """What `dlm.params.init_params` gives, but for roundings."""
    return init_from_specs(key, param_specs(cfg), cfg.jnp_dtype)


def init_from_specs(key: jax.Array, specs: Params, dtype: jax.typing.DTypeLike) -> Params:
    """What `dlm.params.init_from_specs` gives, but for roundings."""

    def init(path: jax.tree_util.KeyPath, spec: ParamSpec) -> np.ndarray:
        if spec.stddev is None:
            return np.full(spec.shape, spec.fill, spec.dtype or dtype)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        drawn = normal(key, spec.shape, zlib.crc32(name.encode()))
        return (np.float32(spec.stddev) * drawn).astype(dtype)

    return jax.device_put(jax.tree_util.tree_map_with_path(init, specs))


def noisy(key: jax.Array, params: Params, by: float = 0.1) -> Params:
    """With the same noise on every leaf, so that biases and norms are not trivial."""
    shake = lambda x: (x + np.float32(by) * normal(key, x.shape)).astype(x.dtype)
    return jax.device_put(jax.tree.map(shake, jax.device_get(params)))


def normal(key: jax.Array, shape: tuple[int, ...], fold: int | None = None) -> np.ndarray:
    """What `jax.random.normal` gives; with `fold`, for the key folded with it."""
    size, length = int(np.prod(shape)), SHORTEST
    while length < size:
        length *= 4
    drawn = _normal(key, length) if fold is None else _folded(key, np.uint32(fold), length)
    return np.asarray(drawn)[:size].reshape(shape)


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, length: int) -> jax.Array:
    return jax.random.normal(key, (length,))


@functools.partial(jax.jit, static_argnums=2)
def _folded(key: jax.Array, fold: np.uint32, length: int) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, fold), (length,))
