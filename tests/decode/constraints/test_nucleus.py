"""Dream's `sample`: temperature, nucleus, top-k, and the confidences of what is left."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.constraints.nucleus import Nucleus
from decode.diffusion.components import (
    Credit,
    FixedBlocks,
    Margin,
    NegEntropy,
    Probability,
    SparseCredit,
    Threshold,
    TokenBan,
)
from decode.diffusion.confidences.tempered import Tempered
from decode.diffusion.loop import DiffusionMethod, decode, init_state
from decode.diffusion.rules.dream_quota import DreamQuota
from kernels_pallas.unembed_stats import logits_stats
from tests.lib import oracle
from tests.lib.jitted import as_one_program
from tests.lib.rounds import make_round
from tests.lib.tiers import more
from tests.lib.weights import init_params

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [2, 2]]
MEASURES = {
    "maskgit_plus": (Probability(), lambda p, y: p[y]),
    "topk_margin": (Margin(), lambda p, y: np.sort(p)[-1] - np.sort(p)[-2]),
    "entropy": (NegEntropy(), lambda p, y: math.exp((p * np.log(p + 1e-10)).sum())),
}


def law(z, temperature=None, top_p=None, top_k=None):
    """The distribution `sample(z)` of the card draws from, in float64 for one position."""
    z = np.asarray(z, np.float64) / (temperature or 1.0)
    p = np.exp(z - z.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda v: (-p[v], v))
    if top_p is not None and top_p < 1:
        total, nucleus = 0.0, []
        for v in order:
            nucleus.append(v)
            total += p[v]
            if total > top_p:
                break
        order = nucleus
    if top_k is not None:
        order = order[:top_k]
    filtered = np.zeros_like(p)
    filtered[order] = p[order]
    return filtered / filtered.sum()


def read(logits, constraint, temperature=None):
    """A round with these [B, W, V] logits, read as the loop reads them; arg-max proposals."""
    B, W, V = logits.shape
    view = make_round(np.full((B, W), 0.5)).replace(temperature=temperature)
    mask = as_one_program(constraint.mask_logits)
    logits = mask(view, np.asarray(logits, np.float32), ())
    stats = logits_stats(logits.reshape(B * W, V))
    stats = jax.tree.map(lambda x: x.reshape(B, W, *x.shape[1:]), stats)
    return view.replace(
        logits=logits, stats=stats, proposal=stats.token, log_prob=stats.log_prob,
        confidence=stats.log_prob,
    )  # fmt: skip


def random_logits(seed, scale=3.0, V=24):
    return np.random.default_rng(seed).normal(0, scale, (2, 5, V)).astype(np.float32)


def kept(constraint, logits, temperature=None):
    """Ids that stay at the one position of [V] logits."""
    view = read(np.asarray(logits)[None, None], constraint, temperature)
    return np.flatnonzero(np.isfinite(view.logits[0, 0])).tolist()


def run(params, cfg, method, prompts=PROMPTS, **options):
    return decode(params, cfg, method, init_state(cfg, method, prompts, **options))


def completions(state):
    return np.asarray(state.tokens[:, state.prompt_len :]).tolist()


@pytest.mark.exhaustive(every=4)
def test_example_by_hand():
    z = np.log([0.1, 0.5, 0.15, 0.25])
    assert kept(Nucleus(top_p=0.4), z) == [1]  # 0.5 exceeds it
    assert kept(Nucleus(top_p=0.6), z) == [1, 3]
    assert kept(Nucleus(top_p=0.8), z) == [1, 2, 3]
    assert kept(Nucleus(top_p=0.95), z) == kept(Nucleus(top_p=1.0), z) == [0, 1, 2, 3]
    assert kept(Nucleus(top_k=2), z) == [1, 3]
    assert kept(Nucleus(0.8, 2), z) == [1, 3]
    assert kept(Nucleus(0.4, 99), z) == [1]
    assert kept(Nucleus(), z) == [0, 1, 2, 3]
    # At temperature 0.5 probabilities are 0.029, 0.725, 0.065, 0.181.
    assert kept(Nucleus(top_p=0.7), z, 0.5) == [1]


def test_the_nucleus_must_exceed_top_p():
    assert kept(Nucleus(top_p=0.5), np.zeros(4)) == [0, 1, 2]  # 0.25 and 0.5 are exact


def test_ties_stay_in_the_order_of_ids():
    assert kept(Nucleus(top_k=2), [1.0, 2.0, 1.0, 1.0]) == [0, 1]
    assert kept(Nucleus(top_k=3), np.zeros(5)) == [0, 1, 2]
    assert kept(Nucleus(top_p=1e-6), np.zeros(5)) == [0]


@pytest.mark.parametrize("temperature", [0.3, *more(None, 1.7)])
@pytest.mark.parametrize("filters", [(0.9, None), (None, 4), (0.9, 4), (0.3, 9), (1.0, None)])
@pytest.mark.parametrize("alg", MEASURES)
def test_filters_and_confidences_are_those_of_the_card(alg, filters, temperature):
    measure, formula = MEASURES[alg]
    for seed in range(3):
        logits = random_logits(seed)
        view = read(logits, Nucleus(*filters), temperature)
        after, _ = Tempered(measure).measure(view, ())
        for b, w in np.ndindex(2, 5):
            p = law(logits[b, w], temperature, *filters)
            np.testing.assert_array_equal(np.isfinite(view.logits[b, w]), p > 0)
            expected = formula(p, int(view.proposal[b, w]))
            got = math.exp(after.confidence[b, w])
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
        np.testing.assert_array_equal(after.log_prob, view.log_prob)
        np.testing.assert_array_equal(after.stats.entropy, view.stats.entropy)


def test_probability_is_that_of_the_proposal_not_of_the_favourite():
    logits = random_logits(7)
    view = read(logits, Nucleus(top_k=3), 0.6)
    second = jnp.argsort(view.logits, axis=-1)[..., -2]
    after, _ = Tempered(Probability()).measure(view.replace(proposal=second), ())
    for b, w in np.ndindex(2, 5):
        expected = np.sort(law(logits[b, w], 0.6, None, 3))[-2]
        np.testing.assert_allclose(math.exp(after.confidence[b, w]), expected, rtol=1e-5)


@pytest.mark.parametrize("alg", MEASURES)
def test_without_temperature_a_tempered_measure_is_the_measure(alg):
    measure, _ = MEASURES[alg]
    view = read(random_logits(3), Nucleus(0.9))
    np.testing.assert_allclose(
        Tempered(measure).measure(view, ())[0].confidence,
        measure.measure(view, ())[0].confidence,
        rtol=1e-6,
    )


def test_confidences_keep_their_order_where_they_are_all_but_one():
    logits = np.zeros((1, 3, 6), np.float32)
    logits[0, :, 0] = [20.0, 30.0, 25.0]
    view = read(logits, Nucleus(), 0.5)
    for measure, _ in MEASURES.values():
        confidence = Tempered(measure).measure(view, ())[0].confidence[0]
        assert np.argsort(confidence).tolist() == [0, 2, 1]


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("alg", MEASURES)
def test_top_k_of_one_makes_confidences_degenerate(toy_cfg, toy_params, alg):
    """Card, check 4: 1, 1 - 0 and 0; and a temperature then changes nothing."""
    measure, _ = MEASURES[alg]
    view = read(random_logits(1), Nucleus(top_k=1), 0.8)
    assert (Tempered(measure).measure(view, ())[0].confidence == 0).all()  # log scale, and -H
    method = DiffusionMethod(FixedBlocks(1), confidence=Tempered(measure), temperature=0.8)
    method = method.replace(constraint=Nucleus(top_k=1))
    state = run(toy_params, toy_cfg, method, gen_len=6)
    assert (state.confidence == 1).all()
    assert completions(state) == completions(
        run(toy_params, toy_cfg, DiffusionMethod(FixedBlocks(1)), gen_len=6)
    )


def test_a_temperature_towards_zero_is_the_arg_max(toy_cfg, toy_params):
    """Card, check 4."""
    greedy = run(toy_params, toy_cfg, DiffusionMethod(FixedBlocks(1)), gen_len=8)
    method = DiffusionMethod(
        FixedBlocks(1), confidence=Tempered(), temperature=1e-5, constraint=Nucleus(0.95)
    )
    cold = run(toy_params, toy_cfg, method, gen_len=8)
    assert completions(cold) == completions(greedy)
    np.testing.assert_allclose(cold.confidence, 1.0)
    warm = run(toy_params, toy_cfg, method.replace(temperature=1.0), gen_len=8)
    assert completions(warm) != completions(greedy)


def test_sampled_tokens_follow_the_filtered_tempered_law(toy_cfg, toy_params):
    """One position, one step: 4096 seeds, also with one more token banned."""
    n, temperature, filters = 4096, 1.5, (0.85, 9)
    model = oracle.Model(toy_params, toy_cfg)
    z = model.logits(model.run([3, 1, toy_cfg.mask_token_id], range(3))[0][-1])
    banned = int(z.argmax())
    z[[banned, toy_cfg.mask_token_id]] = -np.inf
    p = law(z, temperature, *filters)
    assert 4 <= (p > 0).sum() < (law(z, temperature, None, None) > 0).sum()
    method = DiffusionMethod(
        FixedBlocks(1), confidence=Tempered(), temperature=temperature,
        constraint=Nucleus(*filters, ids=(banned,)),
    )  # fmt: skip
    state = run(toy_params, toy_cfg, method, [[3, 1]] * n, gen_len=1, seeds=list(range(n)))
    tokens = np.asarray(state.tokens[:, -1])
    counts = np.bincount(tokens, minlength=len(p))
    assert (counts[p == 0] == 0).all()
    allowed = p > 0
    chi2 = ((counts - n * p)[allowed] ** 2 / (n * p)[allowed]).sum()
    assert chi2 < 32  # at most 8 degrees of freedom: the 0.9999 quantile is 31.8
    np.testing.assert_allclose(state.confidence[:, 0], p[tokens], rtol=1e-4)
    untempered = law(np.where(allowed, z, -np.inf))
    np.testing.assert_allclose(np.exp(state.log_prob[:, 0]), untempered[tokens], rtol=1e-4)


@pytest.mark.exhaustive(every=4)
def test_filters_that_keep_everything_change_nothing(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), rule=Threshold(0.4), temperature=0.7)
    plain = run(toy_params, toy_cfg, method.replace(constraint=TokenBan((3,))), gen_len=8)
    open_filters = method.replace(constraint=Nucleus(1.0, 99, ids=(3,)))
    same = run(toy_params, toy_cfg, open_filters, gen_len=8)
    assert completions(same) == completions(plain)
    np.testing.assert_array_equal(same.step_map, plain.step_map)


@pytest.fixture(scope="module")
def dream(toy_cfg, toy_params):
    cfg = dataclasses.replace(toy_cfg, qkv_bias=True, shifted_logits=True)
    params = init_params(jax.random.key(5), cfg)
    return cfg, params | {"unembed": 6.0 * params["unembed"]}


@pytest.mark.exhaustive(every=4)
def test_a_left_padded_row_of_the_whole_sampler_equals_itself_alone(dream):
    """Card, check 5, with everything that the sampler may do at once."""
    cfg, params = dream
    method = DiffusionMethod(
        FixedBlocks(None), confidence=Tempered(NegEntropy()), temperature=0.7,
        rule=DreamQuota(5, alg_temp=0.3, alg_temp_units="nats", may_idle=True),
        constraint=Nucleus(0.9, 8),
    )  # fmt: skip
    together = run(params, cfg, method, gen_len=9, seeds=3, prompt_len=12)
    for b in (1, 2):
        alone = run(params, cfg, method, [PROMPTS[b]], gen_len=9, seeds=[3 + b])
        assert completions(alone)[0] == completions(together)[b]
        np.testing.assert_array_equal(alone.step_map[0], together.step_map[b])
        np.testing.assert_allclose(alone.confidence[0], together.confidence[b], rtol=1e-3)


def test_shifted_outputs_decode_to_the_true_text_without_loss(toy_cfg):
    """Card, check 1: raw output i - 1 is one-hot at the true token i, once i - 1 holds a token.

    Texts follow a cycle through the vocabulary; next to MASK the model knows nothing. Unless its
    outputs are shifted as they should be, it sees only MASK.
    """
    V, mask = toy_cfg.vocab_size, toy_cfg.mask_token_id
    cfg = dataclasses.replace(toy_cfg, d_model=V, qkv_bias=True, shifted_logits=True)
    cycle = np.random.default_rng(0).permutation(21).tolist()  # ids of the text
    params = init_params(jax.random.key(0), cfg)
    layers = jax.tree.map(jnp.zeros_like, params["layers"])
    unembed = np.zeros((V, V), np.float32)
    for a, b in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        unembed[b, a] = 10.0
    params |= {"layers": layers, "embed": jnp.eye(V), "unembed": jnp.asarray(unembed)}
    assert not unembed[:, mask].any()
    prompts = [cycle[:1], cycle[4:9], cycle[2:4]]
    method = DiffusionMethod(
        FixedBlocks(None), confidence=Tempered(), rule=DreamQuota(8), temperature=0.2,
        constraint=Nucleus(0.95),
    )  # fmt: skip
    state = run(params, cfg, method, prompts, gen_len=8)
    assert completions(state) == [cycle[1:9], cycle[9:17], cycle[4:12]]
    np.testing.assert_allclose(state.log_prob, 0.0, atol=1e-6)
    assert np.asarray(state.step_map).tolist() == [list(range(8))] * 3
    unshifted = dataclasses.replace(cfg, shifted_logits=False)
    assert completions(run(params, unshifted, method, prompts, gen_len=8)) != completions(state)


def test_one_compile_for_all_filters(toy_cfg, toy_params):
    decode.clear_cache()
    for top_p, top_k, temperature, alg_temp in ((0.9, 3, 0.5, 0.0), (1.0, 20, 1.0, 0.4)):
        method = DiffusionMethod(
            FixedBlocks(4), confidence=Tempered(Margin()), temperature=temperature,
            constraint=Nucleus(top_p, top_k), rule=DreamQuota(2, alg_temp=alg_temp),
        )  # fmt: skip
        run(toy_params, toy_cfg, method, gen_len=8)
    assert decode._cache_size() == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DiffusionMethod(constraint=Nucleus(0.0)), r"top_p=0 must be in \(0, 1\], or None"),
        (DiffusionMethod(constraint=Nucleus(1.5)), r"top_p=1.5 must be in \(0, 1\], or None"),
        (DiffusionMethod(constraint=Nucleus(top_k=0)), "top_k=0 must be at least 1, or None"),
        (DiffusionMethod(constraint=Nucleus(ids=(99,))), "banned id 99"),
        (DiffusionMethod(confidence=Tempered(Credit())), r"Tempered\(base=Credit\) must be of"),
        (DiffusionMethod(confidence=Tempered(SparseCredit())), r"base=SparseCredit\) must be of"),
        (DiffusionMethod(confidence=Tempered(Tempered())), r"base=Tempered\) must be of"),
    ],
)
def test_bad_values_are_refused(toy_cfg, method, message):
    with pytest.raises(ValueError, match=message):
        init_state(toy_cfg, method, [[1]], gen_len=4)
