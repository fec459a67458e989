import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from kernels_pallas.window_attention import Near, pack_mask
from kernels_pallas.window_attention import window_attention as in_operations
from tests.lib.jitted import as_one_program

window_attention = as_one_program(in_operations)


def dense_attention(q, k, v, allowed):
    """float64 attention of one row: q [T, N, H], k and v [S, K, H], allowed [T, S]."""
    T, N, H = q.shape
    out = np.zeros((T, N, H))
    for t, n in itertools.product(range(T), range(N)):
        head = n // (N // k.shape[1])
        scores = (k[:, head] @ q[t, n]) / np.sqrt(H)
        if not allowed[t].any():
            continue
        weights = np.where(allowed[t], np.exp(scores - scores[allowed[t]].max()), 0)
        out[t, n] = weights @ v[:, head] / weights.sum()
    return out


def random_case(rng, B, T, S, N, K, H, dtype=np.float32):
    make = lambda *shape: rng.normal(size=shape).astype(dtype)
    return (
        make(B, T, N, H),
        make(B, T, K, H),
        make(B, T, K, H),
        make(3, B, K, S, H),
        make(3, B, K, S, H),
    )


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("mask", ["full", "causal", "tree"])
def test_equals_dense_float64_attention(implementation, group, mask):
    rng = np.random.default_rng(group)
    B, T, S, K, H = 3, 37, 11, 2, 8
    q, k, v, ck, cv = random_case(rng, B, T, S, K * group, K, H)
    window = {
        "full": np.ones((B, T, T), bool),
        "causal": np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T)),
        "tree": rng.random((B, T, T)) < 0.3,
    }[mask]
    window_range = np.array([[0, T], [2, 30], [5, 5]])
    ranges = np.array([[[0, 4], [7, 11]], [[3, 3], [0, 0]], [[0, 0], [0, 0]]])
    got = window_attention(
        q,
        k,
        v,
        mask=pack_bits(window) if mask == "tree" else mask,
        window_range=window_range,
        cache=(ck, cv),
        cache_ranges=ranges,
        layer=1,
        implementation=implementation,
    )
    for b in range(B):
        slot, position = np.arange(S), np.arange(T)
        in_cache = np.zeros(S, bool)
        for first, last in ranges[b]:
            in_cache |= (slot >= first) & (slot < last)
        in_window = (position >= window_range[b, 0]) & (position < window_range[b, 1])
        allowed = np.concatenate([np.broadcast_to(in_cache, (T, S)), window[b] & in_window], axis=1)
        expected = dense_attention(
            q[b],
            np.concatenate([ck[1, b].swapaxes(0, 1), k[b]]).astype(np.float64),
            np.concatenate([cv[1, b].swapaxes(0, 1), v[b]]).astype(np.float64),
            allowed,
        )
        np.testing.assert_allclose(got[b], expected, atol=1e-5, rtol=1e-5)


def limited_case(seed=0):
    """A window whose keys and slots stand anywhere; what queries see of [slots ; window]."""
    rng = np.random.default_rng(seed)
    B, T, S, K, H = 2, 9, 14, 2, 8
    q, k, v, ck, cv = random_case(rng, B, T, S, 2 * K, K, H)
    positions = 10 + np.stack([np.arange(T), np.arange(T) // 2])  # of a row of text, of a tree
    cached = np.stack([np.arange(S) - 2, rng.permutation(S)])
    ranges = np.array([[[2, 12]], [[0, 14]]])
    slot = np.arange(S)[None]
    in_cache = (slot >= ranges[:, 0, :1]) & (slot < ranges[:, 0, 1:])
    allowed = np.concatenate(
        [
            in_cache[:, None] & (np.abs(positions[:, :, None] - cached[:, None]) < 4),
            np.tril(np.ones((T, T), bool))
            & (np.abs(positions[:, :, None] - positions[:, None]) < 4),
        ],
        axis=2,
    )
    near = Near(jnp.int32(4), jnp.asarray(positions), jnp.asarray(cached))
    arguments = dict(mask="causal", cache=(ck, cv), cache_ranges=ranges, layer=1, near=near)
    return (q, k, v), arguments, allowed


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_limited_sight_is_by_position(implementation):
    """Whatever slot a key lies in; a key at the reach itself is not seen, one nearer is."""
    (q, k, v), arguments, allowed = limited_case()
    got = window_attention(q, k, v, **arguments, implementation=implementation)
    ck, cv = arguments["cache"]
    for b in range(2):
        keys, values = (
            np.concatenate([x[1, b].swapaxes(0, 1), y[b]]).astype(np.float64)
            for x, y in ((ck, k), (cv, v))
        )
        expected = dense_attention(q[b], keys, values, allowed[b])
        np.testing.assert_allclose(got[b], expected, atol=1e-5, rtol=1e-5)
    assert 0 < allowed[:, :, :14].sum() < 60


@pytest.mark.parametrize("implementation", ["xla", "reference", "in parts"])
def test_every_query_may_have_ranges_of_its_own(monkeypatch, implementation):
    """Each query as it is alone, with its ranges for all."""
    (q, k, v), arguments, _ = limited_case()
    rng = np.random.default_rng(3)
    ranges = rng.integers(0, 15, (2, 9, 2, 2))
    arguments |= dict(mask=pack_mask(np.eye(9, dtype=bool)[None].repeat(2, 0)), near=None)
    if implementation == "in parts":
        monkeypatch.setattr("kernels_pallas.window_attention.xla.SLOTS_AT_ONCE", 3)
    name = "reference" if implementation == "reference" else "xla"
    attend = functools.partial(window_attention, implementation=name)
    got = attend(q, k, v, **arguments | dict(cache_ranges=ranges))
    for t in range(9):
        one = [x[:, t : t + 1] for x in (q, k, v)]
        alone = attend(*one, **arguments | dict(mask="causal", cache_ranges=ranges[:, t]))
        np.testing.assert_allclose(got[:, t : t + 1], alone, atol=1e-6)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("has_near", [False, True])
def test_a_large_cache_is_read_in_parts(monkeypatch, has_near):
    """As all at once; the last part overlaps, and what nobody sees is not read: it may be NaN."""
    (q, k, v), arguments, _ = limited_case()
    if not has_near:
        arguments |= dict(near=None, cap=2.0)
    ck, cv = arguments["cache"]
    cv[1, :, :, 12:] = np.nan
    arguments |= dict(cache=(ck, cv), cache_ranges=np.array([[[2, 3], [5, 11]], [[0, 0], [9, 10]]]))
    expected = window_attention(q, k, v, **arguments | dict(cache=(ck, np.nan_to_num(cv))))
    monkeypatch.setattr("kernels_pallas.window_attention.xla.SLOTS_AT_ONCE", 3)
    monkeypatch.setattr("kernels_pallas.window_attention.xla.MANY_SLOTS", 1)
    attend = lambda cv, q: window_attention(q, k, v, **arguments | dict(cache=(ck, cv)))
    np.testing.assert_allclose(attend(cv, q), expected, atol=1e-6)
    gradient = lambda q: jax.grad(lambda q: (attend(np.nan_to_num(cv), q) ** 2).sum())(q)
    in_parts = gradient(q)
    monkeypatch.undo()
    np.testing.assert_allclose(in_parts, gradient(q), atol=1e-5)


@pytest.mark.parametrize("slots_in_place", [0, 4096])
def test_a_cache_that_lies_apart_is_the_stacked_one(monkeypatch, slots_in_place):
    """Read at once, or in parts where it is too large, by short windows as by long ones."""
    (q, k, v), arguments, _ = limited_case()
    expected = window_attention(q, k, v, **arguments)
    of_xla = "kernels_pallas.window_attention.xla"
    monkeypatch.setattr(f"{of_xla}.SLOTS_AT_ONCE", 3)
    monkeypatch.setattr(f"{of_xla}.SLOTS_IN_PLACE", slots_in_place)
    monkeypatch.setattr(f"{of_xla}.MANY_SLOTS", 1)  # slot by slot
    arguments["cache"] = tuple(tuple(jnp.asarray(c)) for c in arguments["cache"])
    for layer in (arguments["layer"], jnp.int32(arguments["layer"])):
        got = window_attention(q, k, v, **arguments | dict(layer=layer))
        np.testing.assert_allclose(got, expected, atol=1e-6)
    with pytest.raises(NotImplementedError, match="must be 'xla' for a cache that lies apart"):
        window_attention(q, k, v, **arguments, implementation="reference")
    fewer = tuple(tuple(c[:1] for c in layers) for layers in arguments["cache"])
    with pytest.raises(ValueError, match=r"a layer \(.*\) of the cache must be \[B=2 or more"):
        window_attention(q, k, v, **arguments | dict(cache=fewer))


@pytest.mark.parametrize("slots_at_once", [3, 512])
@pytest.mark.parametrize("kind", ["stacked", "apart", "reference"])
def test_a_window_of_the_first_rows_of_a_cache(monkeypatch, kind, slots_at_once):
    (q, k, v), arguments, _ = limited_case()
    expected = window_attention(q, k, v, **arguments)
    monkeypatch.setattr("kernels_pallas.window_attention.xla.SLOTS_AT_ONCE", slots_at_once)
    cache = tuple(np.pad(x, ((0, 0), (0, 3), *[(0, 0)] * 3)) for x in arguments["cache"])
    if kind == "apart":
        cache = tuple(tuple(map(jnp.asarray, x)) for x in cache)
    how = "reference" if kind == "reference" else None
    got = window_attention(q, k, v, **arguments | dict(cache=cache), implementation=how)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_scale_and_cap_of_scores(implementation):
    """cap tanh(scale q k / cap), by hand."""
    q, k, v, _, _ = random_case(np.random.default_rng(0), 1, 6, 1, 2, 2, 8)
    got = window_attention(q, k, v, scale=0.7, cap=1.5, implementation=implementation)
    scores = 1.5 * np.tanh(0.7 * np.einsum("btnh,bsnh->bnts", q, k).astype(np.float64) / 1.5)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(got, np.einsum("bnts,bsnh->btnh", weights, v), atol=1e-5)


def pack_bits(allowed):
    B, T, S = allowed.shape
    words = np.zeros((B, T, -(-S // 32)), np.uint32)
    for j in range(S):
        words[:, :, j // 32] |= allowed[:, :, j].astype(np.uint32) << np.uint32(j % 32)
    return jnp.asarray(words)


@pytest.mark.parametrize("S", [1, 31, 32, 33, 70])
def test_packed_masks_hold_one_bit_per_position(S):
    allowed = np.random.default_rng(S).random((2, 3, S)) < 0.5
    np.testing.assert_array_equal(pack_mask(jnp.asarray(allowed)), pack_bits(allowed))


def test_rows_that_may_see_nothing_are_zero():
    q, k, v, ck, cv = random_case(np.random.default_rng(0), 2, 3, 4, 2, 2, 4)
    none = np.zeros((2, 1, 2), np.int32)
    out = window_attention(
        q, k, v, window_range=np.array([[0, 3], [2, 2]]), cache=(ck, cv), cache_ranges=none
    )
    assert np.abs(out[0]).min() > 0
    np.testing.assert_array_equal(out[1], 0)


def test_what_is_masked_has_no_influence_even_if_it_is_nan():
    q, k, v, ck, cv = random_case(np.random.default_rng(0), 1, 4, 6, 2, 2, 4)
    arguments = dict(window_range=np.array([[1, 3]]), cache_ranges=np.array([[[2, 4]]]), layer=0)
    expected = window_attention(q, k, v, cache=(ck, cv), **arguments)
    k2, ck2 = k.copy(), ck.copy()
    k2[:, [0, 3]], ck2[..., [0, 1, 4, 5], :] = 1e9, np.nan
    got = window_attention(q, k2, v, cache=(ck2, cv), **arguments)
    np.testing.assert_array_equal(got, expected)


ATTEND = jax.jit(window_attention, static_argnames=("mask",))


@settings(max_examples=8)
@given(border=st.integers(0, 12), seed=st.integers(0, 99))
def test_splitting_keys_between_cache_and_window_changes_nothing(border, seed):
    """Attention over [prefix ; window] is the same wherever the border lies."""
    q, k, v, _, _ = random_case(np.random.default_rng(seed), 1, 13, 1, 4, 2, 8)
    whole = ATTEND(q, k, v, mask="causal")
    got = ATTEND(
        q[:, border:],
        k[:, border:],
        v[:, border:],
        mask="causal",
        cache=(k[None].swapaxes(2, 3), v[None].swapaxes(2, 3)),
        cache_ranges=np.array([[[0, border]]]),
    )
    np.testing.assert_allclose(got, whole[:, border:], atol=1e-5)


def test_gradients_match_finite_differences():
    q, k, v, ck, cv = map(jnp.asarray, random_case(np.random.default_rng(2), 1, 3, 4, 4, 2, 4))
    arguments = dict(mask="causal", cache=(ck, cv), cache_ranges=jnp.array([[[0, 2]]]))

    def loss(q, k, v):
        return (window_attention(q, k, v, **arguments) ** 2).sum()

    check_grads(loss, (q, k, v), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_bfloat16_stays_close_to_float32():
    q, k, v, ck, cv = random_case(np.random.default_rng(3), 2, 8, 16, 4, 2, 32)
    ranges = np.tile([[0, 16]], (2, 1, 1))
    exact = window_attention(q, k, v, cache=(ck, cv), cache_ranges=ranges)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, ck, cv)]
    got = window_attention(*low[:3], cache=tuple(low[3:]), cache_ranges=ranges)
    assert got.dtype == jnp.bfloat16
    # Inputs, weights and output are each rounded to 8 bits: about 3 roundings of 2^-9 of |v| ~ 3.
    np.testing.assert_allclose(got.astype(np.float32), exact, atol=4e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mask="diagonal"), "mask='diagonal' must be"),
        (dict(mask=jnp.zeros((1, 2, 2), jnp.uint32)), "must be uint32"),
        (dict(cache=(jnp.zeros((1, 2, 4, 2, 4)),) * 2), "cache"),
    ],
)
def test_bad_shapes_are_refused(change, message):
    q = jnp.zeros((1, 2, 4, 4))
    k = jnp.zeros((1, 2, 2, 4))
    with pytest.raises(ValueError, match=message):
        window_attention(q, k, k, **change)
    with pytest.raises(ValueError, match="must both be"):
        window_attention(q, k[:, :1], k)


def test_unknown_implementation_says_what_exists():
    q = jnp.zeros((1, 2, 4, 4))
    with pytest.raises(NotImplementedError, match="'xla', 'tpu', 'gpu' or 'reference'"):
        window_attention(q, q, q, implementation="cuda")


def test_keys_meet_few_queries_by_slot_and_many_by_query():
    """What is by slot has to be turned around, which costs more than it saves where many look."""
    k = v = jnp.zeros((1, 1, 2, 8))
    cache, ranges = (jnp.zeros((1, 1, 2, 512, 8)),) * 2, jnp.array([[[0, 512]]])

    def is_by_slot(T):
        q = jnp.zeros((1, T, 4, 8))
        new = (jnp.tile(x, (1, T, 1, 1)) for x in (k, v))
        attend = lambda q, k, v: in_operations(q, k, v, cache=cache, cache_ranges=ranges)
        return "optimization_barrier" in str(jax.make_jaxpr(attend)(q, *new))

    assert is_by_slot(1) and is_by_slot(12) and not is_by_slot(13)  # two queries per head each
