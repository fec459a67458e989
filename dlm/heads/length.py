"""A head that says how long a text still gets: the future that conditional search asks about.

Reference: Yoshida, Goyal and Gimpel, "MAP's not dead yet: Uncovering true language model modes by
conditioning away degeneracy", arXiv:2311.08817, Sec. 5, whose classifier of prefixes this is for
lengths. Of the final state h in which token v was predicted, and v's embedding,

    x = silu(W h + U e / rms(e) + b)        all candidates v behind a prefix: one product with U
    log P(bucket) = log_softmax(V x + c)

r >= 1 is the number of tokens behind v, end-of-text included. Buckets begin at 1, 2, 3, 4, 6, 8,
12, 16, ...; inside of one all lengths are alike; the last one stands for all that is longer, too.
That the embedding is scaled, and these buckets, are ours.

Letters: D model width, F hidden width, N buckets.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dlm.config import ModelConfig
from dlm.heads import files
from dlm.lm import LanguageModel
from dlm.params import Params, ParamSpec

LEAST_RMS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthHead(files.Heads):
    """What the head is; also what `train.trainable` trains beside a model.

    Attributes:
      d_hidden: F >= 1.
      num_buckets: N in [1, 40]; of 20 the last begins at 1024 tokens.
    """

    d_hidden: int = 256
    num_buckets: int = 20

    def __post_init__(self) -> None:
        if self.d_hidden < 1:
            raise ValueError(f"d_hidden={self.d_hidden} must be at least 1")
        if not 1 <= self.num_buckets <= 40:
            raise ValueError(f"num_buckets={self.num_buckets} must be in [1, 40]")

    def specs(self, cfg: ModelConfig) -> Params:
        """{"w": [D, F], "u": [D, F], "b": [F], "v": [F, N], "c": [N]} of `ParamSpec`."""
        D, F, N = cfg.d_model, self.d_hidden, self.num_buckets
        return {
            "w": ParamSpec((D, F), ("embed", None), D**-0.5),
            "u": ParamSpec((D, F), ("embed", None), D**-0.5),
            "b": ParamSpec((F,), (None,), 0.02),
            "v": ParamSpec((F, N), (None, None), F**-0.5),
            "c": ParamSpec((N,), (None,), 0.02),
        }


def load(path: str | pathlib.Path, lm: LanguageModel) -> tuple[LengthHead, Params]:
    """A head and its parameters; ValueError if it was trained for another model."""
    return files.load(path, LengthHead, lm)


def bucket_starts(num: int) -> np.ndarray:
    """[N] int32: the shortest length of each bucket, and behind it the next one's [N + 1]."""
    i = np.arange(num + 1)
    return np.where(i == 0, 1, 2 ** ((i + 1) // 2) * np.where(i % 2 == 1, 2, 3) // 2).astype(
        np.int32
    )


def log_buckets(own: Params, hidden: jax.Array, embedded: jax.Array) -> jax.Array:
    """[..., N] float32: log-probabilities of the buckets of r.

    Args:
      own: the head's parameters.
      hidden: [..., D]. Final states in which tokens were predicted; axes of 1 stand for any number.
      embedded: [..., D]. Embeddings of these tokens.
    """
    scale = jax.lax.rsqrt(jnp.square(embedded.astype(jnp.float32)).mean(-1, keepdims=True))
    scaled = (embedded * jnp.minimum(scale, 1 / LEAST_RMS)).astype(hidden.dtype)
    times = lambda x, w: jnp.einsum("...d,df->...f", x, w)  # noqa: E731
    of_all = lambda b, x: b.reshape((1,) * (x.ndim - 1) + (-1,))  # noqa: E731
    x = times(hidden, own["w"]) + times(scaled, own["u"])
    x = jax.nn.silu(x + of_all(own["b"], x))
    logits = times(x, own["v"])
    return jax.nn.log_softmax((logits + of_all(own["c"], logits)).astype(jnp.float32), axis=-1)


def log_within(log_probs: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """[...] float32: log P(low <= r <= high).

    Args:
      log_probs: [..., N] float32. Of the buckets.
      low: [...] int32, at least 1.
      high: [...] int32, at least `low`.
    """
    bounds = bucket_starts(log_probs.shape[-1])
    of_buckets = lambda x: jnp.asarray(x).reshape((1,) * low.ndim + (-1,))  # noqa: E731
    first, last = of_buckets(bounds[:-1]), of_buckets(bounds[1:] - 1)
    low, high = (jnp.minimum(x, int(bounds[-1]) - 1)[..., None] for x in (low, high))
    inside = jnp.minimum(high, last) - jnp.maximum(low, first) + 1
    share = jnp.maximum(inside, 0) / (last - first + 1)
    return jax.nn.logsumexp(log_probs, b=share, axis=-1)
