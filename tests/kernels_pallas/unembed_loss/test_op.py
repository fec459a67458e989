import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from dlm.sharding import make_mesh
from kernels_pallas.unembed_loss import unembed_loss as in_operations
from kernels_pallas.unembed_stats import xla
from tests.lib.jitted import as_one_program

unembed_loss = as_one_program(in_operations)


def case(M=6, D=5, V=37, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(M, D)), dtype)
    head = jnp.asarray(rng.normal(size=(V, D)), dtype)
    return hidden, head, jnp.asarray(rng.integers(0, V, M))


def mixed_loss(hidden, head, targets, compute=unembed_loss):
    """A loss in which every row weighs log-probability and entropy differently."""
    out = compute(hidden, head, targets)
    weight = jnp.arange(1.0, 1 + len(targets))
    return (weight * out.log_prob).sum() + (out.entropy / weight).sum()


def plain(hidden, head, targets):
    log_p = jax.nn.log_softmax(hidden @ head.T)
    stats = unembed_loss(hidden, head, targets)
    return stats.replace(
        log_prob=jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0],
        entropy=-(jnp.exp(log_p) * log_p).sum(axis=1),
    )


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("tile", [10, 37])
def test_equals_softmax_with_all_logits(monkeypatch, tile):
    monkeypatch.setattr(xla, "WHOLE_LOGITS", 0)
    monkeypatch.setattr(xla, "VOCAB_TILE", tile)
    operands = case()
    got = jax.value_and_grad(mixed_loss, argnums=(0, 1))(*operands)
    expected = jax.value_and_grad(mixed_loss, argnums=(0, 1))(*operands, plain)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive(every=4)
def test_gradients_match_finite_differences(monkeypatch):
    monkeypatch.setattr(xla, "WHOLE_LOGITS", 0)
    monkeypatch.setattr(xla, "VOCAB_TILE", 10)
    with jax.enable_x64(True):
        hidden, head, targets = case(M=3, D=4, V=23, dtype=jnp.float64)
        loss = lambda hidden, head: mixed_loss(hidden, head, targets)
        check_grads(loss, (hidden, head), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_gradients_through_a_cap_of_logits(monkeypatch):
    monkeypatch.setattr(xla, "WHOLE_LOGITS", 0)
    monkeypatch.setattr(xla, "VOCAB_TILE", 10)
    with jax.enable_x64(True):
        hidden, head, targets = case(M=3, D=4, V=23, dtype=jnp.float64)
        capped = functools.partial(unembed_loss, cap=1.5)
        loss = lambda hidden, head: mixed_loss(hidden, head, targets, capped)
        check_grads(loss, (hidden, head), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)
        z = 1.5 * np.tanh(np.asarray(hidden @ head.T) / 1.5)
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        got = capped(hidden, head, targets).log_prob
        np.testing.assert_allclose(got, log_p[np.arange(3), targets], rtol=1e-9)


def test_sharded_vocabulary_and_rows_equal_unsharded():
    hidden, head, targets = case(M=8, V=40)

    def sharded(hidden, head, targets):
        run = lambda h, w, t: unembed_loss(h, w, t, vocab_axis="tensor")
        specs = (P("data"), P("tensor"), P("data"))
        return jax.shard_map(run, in_specs=specs, out_specs=P("data"), check_vma=False)(
            hidden, head, targets
        )

    expected = jax.value_and_grad(mixed_loss, argnums=(0, 1))(hidden, head, targets)
    with jax.set_mesh(make_mesh(data=2, tensor=4)):
        grad = jax.value_and_grad(lambda h, w, t: mixed_loss(h, w, t, sharded), argnums=(0, 1))
        got = jax.jit(grad)(hidden, head, targets)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_in_bfloat16_have_their_dtype_and_size():
    operands = case(M=32, D=64, V=300, dtype=jnp.bfloat16)
    exact = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in operands]
    got = jax.grad(mixed_loss, argnums=(0, 1))(*operands)
    expected = jax.grad(mixed_loss, argnums=(0, 1))(*exact)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        # dz is rounded to 8 bits before it is multiplied, and the result once more: 2^-8 relative.
        error = jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other)
        assert error < 2**-7


def test_neither_pass_stores_all_logits():
    M, D, V = 512, 8, 16384 * 12
    grad = jax.jit(jax.grad(lambda h, w, t: unembed_loss(h, w, t).log_prob.sum(), argnums=(0, 1)))
    operands = (jnp.zeros((M, D)), jnp.zeros((V, D)), jnp.zeros(M, jnp.int32))
    memory = grad.lower(*operands).compile().memory_analysis()
    assert memory.temp_size_in_bytes < M * V * 4 / 2


def test_targets_of_another_shape_are_refused():
    hidden, head, targets = case()
    with pytest.raises(ValueError, match=r"targets \(5,\) must be \[M=6\]"):
        unembed_loss(hidden, head, targets[:5])
