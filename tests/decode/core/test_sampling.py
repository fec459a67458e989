"""The filters by hand, one number after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode.core.sampling import FILTERS, Sampling, draw
from decode.core.streams import fold_in, uniforms
from tests.lib.tiers import more

RNG = np.random.default_rng(0)
Z = jnp.asarray(RNG.normal(0, 2, (40, 12)), jnp.float32)
ALL = dict(top_k=9, top_p=0.95, min_p=0.01, typical_p=0.9, epsilon_cutoff=0.03, eta_cutoff=0.2)


@jax.jit
def law_of(sampling, logits, seen=None):
    return sampling.probs(logits, seen)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropy(p):
    p = p[p > 0]
    return -(p * np.log(p)).sum()


def fewest(p, order, mass):
    """The first of an order whose probabilities sum to the mass, and all of them if it is 1."""
    before = np.cumsum(p[order]) - p[order]
    keep = np.zeros(len(p), bool)
    keep[order[before < (mass if mass < 1 else np.inf)]] = True
    return keep


def by_hand(z, temperature=1.0, seen=None, repetition_penalty=None, **filters):
    """One row, in float64, filter after filter as Hugging Face's `generate` has them."""
    z = np.array(z, np.float64)
    if repetition_penalty is not None:
        r = repetition_penalty
        z[seen] = np.where(z[seen] > 0, z[seen] / r, z[seen] * r)
    z = z / temperature
    for name in FILTERS:
        limit, p = filters.get(name), softmax(z)
        with np.errstate(divide="ignore"):
            if limit is None:
                continue
            if name == "top_k":
                keep = z >= np.sort(z)[-limit]
            elif name == "top_p":
                keep = fewest(p, np.argsort(-z, kind="stable"), limit)
            elif name == "min_p":
                keep = p >= limit * p.max()
            elif name == "typical_p":
                away = np.round(np.abs(-np.log(p) - entropy(p)), 12)
                keep = fewest(p, np.argsort(away, kind="stable"), limit)
            else:
                least = limit
                if name == "eta_cutoff":
                    least = min(limit, np.sqrt(limit) * np.exp(-entropy(p)))
                keep = (p >= least) | (p == p.max())
        z = np.where(keep, z, -np.inf)
    return softmax(z)


@pytest.mark.parametrize(
    "numbers",
    [
        dict(),
        dict(temperature=0.7, top_k=4),
        dict(temperature=1.3, top_p=0.8),
        dict(min_p=0.2),
        dict(repetition_penalty=1.5),
        dict(temperature=0.8, top_k=6, top_p=0.9, min_p=0.05, repetition_penalty=0.7),
        dict(top_k=1),
        dict(top_p=1.0, min_p=0.0),
        dict(typical_p=0.3),
        dict(temperature=1.7, typical_p=0.8),
        dict(epsilon_cutoff=0.05),
        dict(temperature=0.6, eta_cutoff=0.1),
        dict(typical_p=1e-6, epsilon_cutoff=0.9),
        dict(temperature=1.3, repetition_penalty=1.2, **ALL),
    ],
)
@pytest.mark.parametrize("digits", [None, 0])
def test_laws_by_hand(numbers, digits):
    """Rounded logits have ties, of which top-p and typical p keep the first ones."""
    logits = Z if digits is None else jnp.round(Z, digits)
    seen = RNG.random((40, 12)) < 0.4
    law = law_of(Sampling(**numbers), logits, jnp.asarray(seen))
    expected = [by_hand(z, seen=s, **numbers) for z, s in zip(logits, seen, strict=True)]
    np.testing.assert_allclose(law, expected, atol=1e-6)


SHARES = st.floats(0.01, 1.0)


@settings(max_examples=60)
@given(
    st.lists(st.integers(-3, 3), min_size=12, max_size=12),
    st.sets(st.integers(0, 11), max_size=11),
    st.sampled_from([-1e9, -np.inf]),
    st.tuples(st.integers(1, 12), *[SHARES] * 3, *[st.floats(0.0, 0.99)] * 2),
)
def test_filters_one_behind_the_other(logits, masked, floor, numbers):
    """As by hand, whatever ties there are; what is masked stays so, and something is left."""
    z = np.array(logits, np.float32)
    z[list(masked)] = floor
    filters = dict(zip(FILTERS, numbers, strict=True))
    law = np.asarray(law_of(Sampling(**filters), z[None]))[0]
    assert not law[list(masked)].any() and abs(law.sum() - 1) < 1e-5
    np.testing.assert_allclose(law, by_hand(z, **filters), atol=1e-5)


def test_limits_of_filters():
    """A mass of 1 keeps all, also what rounding loses; a cutoff of 0, too; eta asks for no more
    than epsilon, and as much of a sure model; nothing depends on a constant added to logits."""
    wide = jnp.asarray(RNG.normal(0, 8, (4, 12)), jnp.float32)
    plain = law_of(Sampling(), wide)
    for name in ("top_p", "typical_p"):
        np.testing.assert_array_equal(law_of(Sampling(**{name: 1.0}), wide), plain)
    for name in ("epsilon_cutoff", "eta_cutoff", "min_p"):
        np.testing.assert_array_equal(law_of(Sampling(**{name: 0.0}), wide), plain)
    left = {name: np.asarray(law_of(Sampling(**{name: 0.04}), Z)) > 0
            for name in ("epsilon_cutoff", "eta_cutoff")}  # fmt: skip
    assert (left["eta_cutoff"] >= left["epsilon_cutoff"]).all()
    assert left["eta_cutoff"].sum() > left["epsilon_cutoff"].sum()
    sure = Z.at[:, 0].set(12.0)
    for name in left:
        left[name] = np.asarray(law_of(Sampling(**{name: 0.001}), sure)) > 0
    np.testing.assert_array_equal(left["eta_cutoff"], left["epsilon_cutoff"])
    shifted = law_of(Sampling(**ALL), Z + 3)
    np.testing.assert_allclose(shifted, law_of(Sampling(**ALL), Z), atol=1e-5)


def test_they_are_those_of_the_well_known_library():
    torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
    pytest.importorskip("transformers", reason="needs the extra 'parity'")
    from transformers import generation

    theirs = {
        "top_k": generation.TopKLogitsWarper, "top_p": generation.TopPLogitsWarper,
        "min_p": generation.MinPLogitsWarper, "typical_p": generation.TypicalLogitsWarper,
        "epsilon_cutoff": generation.EpsilonLogitsWarper,
        "eta_cutoff": generation.EtaLogitsWarper,
    }  # fmt: skip
    for names in (*([name] for name in FILTERS), FILTERS):
        z = torch.from_numpy(np.array(Z))
        for name in names:
            z = theirs[name](ALL[name])(None, z)
        ours = law_of(Sampling(**{name: ALL[name] for name in names}), Z)
        np.testing.assert_allclose(ours, z.softmax(-1).numpy(), atol=1e-6)


def test_no_temperature_is_the_arg_max_after_the_penalty():
    seen = jnp.zeros_like(Z, bool).at[:, 3].set(True)
    law = law_of(Sampling(None, repetition_penalty=1e6), Z.at[:, 3].set(50.0), seen)
    expected = np.where(np.arange(12) == 3, 50 / 1e6, Z).argmax(-1)
    np.testing.assert_array_equal(np.argmax(law, axis=-1), expected)
    assert np.asarray(law).max(-1).tolist() == [1.0] * 40


@pytest.mark.parametrize("filters", [{}, *more(*({name: ALL[name]} for name in FILTERS))])
def test_draws_follow_the_law_and_rows_their_own_streams(filters):
    law = law_of(Sampling(1.0, **filters), Z[:1])[0]
    key = jax.random.key_data(jax.random.split(jax.random.key(1), 50_000))
    counts = np.bincount(draw(key, jnp.broadcast_to(law, (50_000, 12))), minlength=12)
    expected = np.asarray(law, np.float64) * 50_000
    there = expected > 0
    assert not counts[~there].any()
    chi_square = ((counts - expected)[there] ** 2 / expected[there]).sum()
    assert chi_square < 40  # at most 11 degrees of freedom
    np.testing.assert_array_equal(
        draw(key[7:8], law[None])[0], draw(key, jnp.tile(law, (50_000, 1)))[7]
    )
    assert (uniforms(key[:4], 3) == uniforms(key, 3)[:4]).all()
    assert (fold_in(key, 1) != fold_in(key, 2)).any()
    assert (fold_in(key, jnp.arange(50_000))[5] == fold_in(key[5:6], 5)[0]).all()
