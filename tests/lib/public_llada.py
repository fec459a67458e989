"""Bit-faithful details of the public LLaDA sampler, for its golden traces only.

The sampler ranks positions by a float32 softmax. Most confidences of a trained model lie within a
few units in the last place of 1.0, so which position comes first is decided by the order in which
sixteen vector lanes are summed and by how C++'s `nth_element` leaves ties. The library's own
`Probability` ranks by log-probabilities, which do not collide, and breaks ties to the left. To
reproduce the traces' `step_map`, both accidents are rebuilt here, as ordinary components.
"""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.diffusion.contracts import CommitRule, Confidence

LANES = 16
PROMPT_LEN = 16  # of the traces; a row's ties depend on its whole length


@struct.dataclass
class Float32Softmax(Confidence):
    """softmax in float32, its sum taken in sixteen lanes that are then folded in halves."""

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def measure(self, view, state: Any):
        z = view.logits
        e = jnp.exp(z - z.max(axis=-1, keepdims=True))
        lanes = e.reshape(*e.shape[:-1], -1, LANES)
        total = functools.reduce(jnp.add, [lanes[..., i, :] for i in range(lanes.shape[-2])])
        while total.shape[-1] > 1:
            half = total.shape[-1] // 2
            total = total[..., :half] + total[..., half:]
        p = e / total
        # Not its logarithm, which would round once more: only the order matters here.
        sure = jnp.take_along_axis(p, view.proposal[..., None], axis=-1)[..., 0]
        return view.replace(confidence=sure), state


@struct.dataclass
class PublicTopK(CommitRule):
    """LLaDA's quota, with ties left as `nth_element` leaves them."""

    steps_per_block: int = 32

    def commit(self, view, state: Any):
        steps = jnp.asarray(self.steps_per_block, jnp.int32)
        quota = view.num_open // steps + (view.block_step < view.num_open % steps)
        shape = jax.ShapeDtypeStruct(view.eligible.shape, jnp.bool_)
        arguments = (view.confidence, view.eligible, view.index[:, 0], quota, view.gen_len)
        return jax.pure_callback(_top_k_rows, shape, *arguments), state


def _top_k_rows(confidence, eligible, first, quota, gen_len):
    out = np.zeros(eligible.shape, bool)
    for b in range(len(out)):
        row = np.full(PROMPT_LEN + int(gen_len[b]), -np.inf)
        at = PROMPT_LEN + int(first[b]) + np.arange(eligible.shape[1])
        row[at] = np.where(eligible[b], confidence[b], -np.inf)
        out[b] = np.isin(at, nth_element(row, int(quota[b])))
    return out & np.asarray(eligible)


def nth_element(values, k):
    """Indices of the k largest values, in the order libstdc++'s introselect finds them."""
    if k == 0:
        return []
    queue = [(float(v), i) for i, v in enumerate(values)]
    before = lambda a, b: a[0] > b[0]
    first, last, nth = 0, len(queue), k - 1
    while last - first > 3:
        cut = _partition(queue, first, last, before)
        first, last = (cut, last) if cut <= nth else (first, cut)
    for i in range(first + 1, last):  # insertion sort of what is left
        item, j = queue[i], i
        while j > first and before(item, queue[j - 1]):
            queue[j] = queue[j - 1]
            j -= 1
        queue[j] = item
    return [i for _, i in queue[:k]]


def _partition(queue, first, last, before):
    """Median of three to the front, then an unguarded Hoare partition around it."""

    def swap(i, j):
        queue[i], queue[j] = queue[j], queue[i]

    a, b, c = first + 1, first + (last - first) // 2, last - 1
    if before(queue[a], queue[b]):  # ties are resolved by the order of these comparisons
        median = b if before(queue[b], queue[c]) else c if before(queue[a], queue[c]) else a
    else:
        median = a if before(queue[a], queue[c]) else c if before(queue[b], queue[c]) else b
    swap(first, median)
    pivot, left, right = queue[first], first + 1, last
    while True:
        while before(queue[left], pivot):
            left += 1
        right -= 1
        while before(pivot, queue[right]):
            right -= 1
        if left >= right:
            return left
        swap(left, right)
        left += 1
