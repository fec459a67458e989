"""Gradients against differences of values."""

import jax
import numpy as np


def check_gradients(value, own):
    """Every leaf of the tree `own`, moved along a random direction, changes `value` as it should.

    Float32: the step is large, and the tolerance too.
    """
    value = jax.jit(value)
    gradient = jax.device_get(jax.jit(jax.grad(value))(own))
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(jax.device_get(own))
    for i, (leaf, slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        direction = rng.normal(size=leaf.shape).astype(leaf.dtype)
        step = np.float32(2e-2 / np.linalg.norm(direction))
        moved = lambda by, i=i, leaf=leaf, d=direction: value(
            jax.tree.unflatten(tree, [*leaves[:i], leaf + by * d, *leaves[i + 1 :]])
        )
        numeric = (moved(step) - moved(-step)) / (2 * step)
        np.testing.assert_allclose((slope * direction).sum(), numeric, rtol=3e-2, atol=3e-3)
