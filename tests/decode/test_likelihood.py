import collections
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.likelihood import (
    _estimate,
    draw_masks,
    greedy_match,
    log_likelihood,
    mask_counts,
)
from dlm.lm import LanguageModel
from dlm.presets import PRESETS
from dlm.sharding import make_mesh
from dlm.tokenizer import byte_tokenizer, word_tokenizer
from tests.lib import oracle
from tests.lib.likelihoods import expectation, score
from tests.lib.tiers import more
from tests.lib.weights import init_params


@pytest.fixture(scope="module")
def lm(toy_cfg, toy_params):
    return LanguageModel(toy_params, toy_cfg)


@pytest.fixture(scope="module")
def shifted_lm(toy_cfg, toy_params):
    return LanguageModel(toy_params, dataclasses.replace(toy_cfg, shifted_logits=True))


@pytest.fixture(scope="module")
def text_lm():
    return with_tokenizer(byte_tokenizer())


def with_tokenizer(tokenizer):
    cfg = dataclasses.replace(
        PRESETS["tiny"],
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LanguageModel(init_params(jax.random.key(0), cfg), cfg, tokenizer)


def greedy(lm, prompt, length, guidance):
    """The surest token of all at each step, decided in float64."""
    model, mask = oracle.Model(lm.params, lm.cfg), lm.cfg.mask_token_id
    answer, first = [mask] * length, len(prompt) - int(lm.cfg.shifted_logits)
    for _ in range(length):
        z, blind = (
            model.logits(model.run([*given, *answer], range(len(prompt) + length))[0])
            for given in (prompt, [mask] * len(prompt))
        )
        z = (blind + (guidance + 1) * (z - blind))[first : first + length]
        z[:, mask] = -np.inf
        sure = np.exp(z.max(1)) / np.exp(z).sum(1)
        i = max((i for i in range(length) if answer[i] == mask), key=lambda i: sure[i])
        answer[i] = int(z[i].argmax())
    return answer


PROMPT, ANSWER = [3, 1, 4, 1, 5], [9, 2, 6]


@pytest.mark.parametrize(
    ("model", "guidance"),
    [("shifted_lm", 1.5), *more(("lm", 1.5), ("shifted_lm", 0.0), ("lm", 0.0))],
)
def test_one_token_is_exact(model, guidance, request):
    lm = request.getfixturevalue(model)
    answers = [[7], [0], [20]]
    results = log_likelihood(lm, [(PROMPT, answer) for answer in answers], guidance=guidance)
    for answer, result in zip(answers, results, strict=True):
        np.testing.assert_allclose(
            result.log_prob, score(lm, PROMPT, answer, [True], guidance), rtol=1e-4
        )
        assert result.standard_error == 0 and result.num_tokens == 1
        assert result.num_forwards == (2 if guidance else 1)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    ("model", "prompt_len", "answer_len", "guidance", "antithetic"),
    [
        ("lm", 5, 3, 0.5, True),
        ("shifted_lm", 1, 39, 0.0, False),
        *more(
            *[
                (model, *lengths, *options)
                for model in ("lm", "shifted_lm")
                for lengths in ((5, 3), (2, 17), (1, 39))
                for options in ((0.0, False), (0.5, True))
                if (model, *lengths, *options)
                not in [("lm", 5, 3, 0.5, True), ("shifted_lm", 1, 39, 0.0, False)]
            ]
        ),
    ],
)
def test_estimate_is_that_of_the_masks_drawn(
    model, prompt_len, answer_len, guidance, antithetic, request
):
    """Copy by copy against the oracle, which sees no padding; the longest fills the model."""
    lm = request.getfixturevalue(model)
    lm = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, max_seq_len=40))
    rng = np.random.default_rng(0)
    prompt, answer = rng.integers(0, 20, prompt_len).tolist(), rng.integers(0, 20, answer_len)
    answer = answer.tolist()
    (_, result) = log_likelihood(
        lm, [(PROMPT, ANSWER), (prompt, answer)], num_samples=8, batch_size=4, guidance=guidance,
        antithetic=antithetic, seed=3,
    )  # fmt: skip
    G = {3: 16, 17: 32, 39: 40}[answer_len]
    is_answer = jnp.arange(G) >= G - answer_len
    batches = []
    for step in range(2):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 1), step)
        masks = np.asarray(draw_masks(key, is_answer, num_copies=4, antithetic=antithetic))
        assert not masks[:, : G - answer_len].any()
        batches.append(
            np.mean(
                [
                    score(lm, prompt, answer, m, guidance) * answer_len / m.sum()
                    for m in masks[:, G - answer_len :]
                ]
            )
        )
    np.testing.assert_allclose(result.log_prob, np.mean(batches), rtol=1e-4, equal_nan=False)
    error = abs(batches[0] - batches[1]) / 2  # standard error of a mean of two
    np.testing.assert_allclose(result.standard_error, error, rtol=1e-2, atol=1e-4)
    assert result.num_tokens == answer_len
    assert result.num_forwards == (16 if guidance else 8)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    ("model", "antithetic"),
    [("lm", True), *more(("shifted_lm", False), ("lm", False), ("shifted_lm", True))],
)
def test_estimate_is_unbiased(model, antithetic, request):
    lm = request.getfixturevalue(model)
    exact = expectation(lm, PROMPT, ANSWER)
    (result,) = log_likelihood(
        lm, [(PROMPT, ANSWER)], num_samples=8192, batch_size=256, antithetic=antithetic
    )
    assert result.standard_error < 0.01 * abs(exact)
    assert abs(result.log_prob - exact) < 3 * result.standard_error
    # The chain rule in one order, or all tokens at once, is another number.
    assert abs(score(lm, PROMPT, ANSWER, [True] * 3) - exact) > 10 * result.standard_error


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("num_copies", [4, *more(2, 6)])
def test_every_copy_draws_counts_and_sets_uniformly(num_copies, antithetic):
    """Each copy alone is unbiased. Rounding halves to even would fail with two copies."""
    num = 12_000
    is_answer = jnp.array([False, False, True, True, True])
    keys = jax.random.split(jax.random.key(0), num)
    draw = lambda key: draw_masks(key, is_answer, num_copies=num_copies, antithetic=antithetic)
    masks = np.asarray(jax.jit(jax.vmap(draw))(keys))
    assert not masks[..., :2].any()
    for copy in range(num_copies):
        counts = collections.Counter(map(tuple, masks[:, copy, 2:].tolist()))
        assert len(counts) == 7 and all(map(any, counts))
        for chosen, count in counts.items():
            p = 1 / 3 / math.comb(3, sum(chosen))
            assert abs(count / num - p) < 4.5 * math.sqrt(p * (1 - p) / num)


def test_partners_mask_what_the_other_does_not():
    is_answer = jnp.arange(8) >= 3
    sizes = set()
    for seed in range(20):
        masks = np.asarray(
            draw_masks(jax.random.key(seed), is_answer, num_copies=6, antithetic=True)
        )
        for one, other in zip(masks[:3], masks[3:], strict=True):
            sizes.add(int(one.sum()))
            if one.sum() == 5:
                np.testing.assert_array_equal(one, other)
            else:
                np.testing.assert_array_equal(one ^ other, is_answer)
                assert not (one & other).any()
    assert sizes == {1, 2, 3, 4, 5}


def test_mask_counts_are_those_of_the_paper():
    def public(k, A, N):
        return [(round(k + j * A / N) - 1) % A + 1 for j in range(N)]

    counts = jax.jit(mask_counts, static_argnames="num")
    for A, N in itertools.product((1, 2, 3, 5, 8, 13, 100), (1, 2, 3, 4, 7, 16)):
        columns = []
        for k in range(1, A + 1):
            ours, theirs = np.asarray(counts(k, A, num=N)), public(k, A, N)
            for j in range(N):
                if (2 * j * A) % (2 * N) != N:  # halves are rounded up here
                    assert ours[j] == theirs[j]
            columns.append(ours)
        for column in np.stack(columns, axis=1):  # each alone is uniform
            assert sorted(column) == list(range(1, A + 1))
    assert [public(k, 3, 2)[1] for k in (1, 2, 3)] == [2, 1, 1]
    assert [int(mask_counts(k, 3, 2)[1]) for k in (1, 2, 3)] == [3, 1, 2]
    assert list(mask_counts(4, 10, 4)) == [4, 7, 9, 2]
    assert mask_counts(4000, 4096, 16).min() >= 1


@pytest.mark.parametrize("antithetic", more(True, False))
def test_independent_tokens_give_the_sum(lm, antithetic):
    """Without attention the tokens know nothing of each other."""
    attention = lm.params["layers"]["attention"]
    deaf = attention | {"o": jnp.zeros_like(attention["o"])}
    params = lm.params | {"layers": lm.params["layers"] | {"attention": deaf}}
    lm = dataclasses.replace(lm, params=params)
    for num_samples in (2, 16, 32):  # equal tokens: every mask says the same
        (result,) = log_likelihood(
            lm, [(PROMPT, [8] * 7)], num_samples=num_samples, antithetic=antithetic
        )
        np.testing.assert_allclose(result.log_prob, 7 * score(lm, PROMPT, [8], [True]), rtol=1e-5)
        if num_samples == 32:
            assert result.standard_error < 1e-4
        else:  # one batch
            assert math.isnan(result.standard_error)
    answer = [8, 2, 11, 19]
    total = sum(score(lm, [], [token], [True]) for token in answer)
    (result,) = log_likelihood(
        lm, [(PROMPT, answer)], num_samples=2048, batch_size=64, antithetic=antithetic
    )
    assert abs(result.log_prob - total) < 3 * result.standard_error
    if antithetic:  # n = 2 of 4 gives the sum exactly, and no pair misses a token
        (plain,) = log_likelihood(lm, [(PROMPT, answer)], num_samples=2048, batch_size=64)
        assert result.standard_error < plain.standard_error


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("num_samples", [16, *more(4)])
def test_results_do_not_depend_on_other_pairs(lm, num_samples):
    pairs = [
        (PROMPT, ANSWER),
        ([2] * 3, [7, 7, 9, 1]),
        (PROMPT, [4]),
        ([], [1, 2]),
        ([9] * 40, [3] * 20),
    ]
    options = {"num_samples": num_samples, "batch_size": 8}
    together = log_likelihood(lm, pairs, **options)
    for i, pair in enumerate(pairs):
        others = [([5], [6, 6, 6])] * i
        alone = log_likelihood(lm, [*others, pair], **options)[-1]
        assert dataclasses.astuple(alone)[0::2] == dataclasses.astuple(together[i])[0::2]
    again = log_likelihood(lm, pairs, **options)
    assert [r.log_prob for r in again] == [r.log_prob for r in together]
    other_seed = log_likelihood(lm, pairs, **options, seed=1)
    assert other_seed[0].log_prob != together[0].log_prob
    twice = log_likelihood(lm, [(PROMPT, ANSWER)] * 2, **options)
    assert twice[0].log_prob != twice[1].log_prob  # streams of their own
    assert log_likelihood(lm, []) == []


def test_a_pair_with_a_seed_of_its_own_gives_the_same_anywhere(lm):
    pairs, seeds = [(PROMPT, ANSWER), ([2] * 3, [7, 7, 9, 1]), (PROMPT, ANSWER)], [5, 2**32 - 1, 5]
    options = {"num_samples": 4, "batch_size": 4}
    found = log_likelihood(lm, pairs, **options, seed=seeds)
    assert found[0].log_prob == found[2].log_prob
    assert [x.log_prob for x in log_likelihood(lm, pairs[::-1], **options, seed=seeds[::-1])] == [
        x.log_prob for x in found[::-1]
    ]
    others = log_likelihood(lm, pairs[:1], **options, seed=[6])
    assert others[0].log_prob != found[0].log_prob
    by_place = log_likelihood(lm, pairs[:1] * 6, **options)  # the sixth has stream 5 of seed 0
    assert by_place[5].log_prob == found[0].log_prob
    for wrong in ([-1, 0, 0], [2**32, 0, 0]):
        with pytest.raises(ValueError, match=r"must be in \[0, 2\^32\)"):
            log_likelihood(lm, pairs, seed=wrong)
    with pytest.raises(ValueError, match="seeds has 2 entries for 3 prompts"):
        log_likelihood(lm, pairs, seed=[1, 2])


def test_guidance_of_zero_is_none_and_others_are_not(lm):
    off, zero, some = (
        log_likelihood(lm, [(PROMPT, ANSWER)], num_samples=4, **options)[0].log_prob
        for options in ({}, {"guidance": 0.0}, {"guidance": 0.7})
    )
    assert off == zero != some


def test_one_program_per_bucket(lm):
    def run(**options):
        log_likelihood(lm, **{"num_samples": 4, "batch_size": 4, "guidance": 0.5} | options)

    run(pairs=[(PROMPT, ANSWER)])
    size = _estimate._cache_size()
    run(pairs=[([1] * 9, [2] * 16), ([1], [2, 3])], guidance=0.9, seed=5, num_samples=16)
    assert _estimate._cache_size() == size
    run(pairs=[([1] * 30, [2] * 16)])
    assert _estimate._cache_size() == size + 1


@pytest.mark.exhaustive(every=4)
def test_a_mesh_changes_nothing(lm):
    pairs = [(PROMPT, ANSWER)]
    one = log_likelihood(lm, pairs, num_samples=8, batch_size=8, guidance=0.5)
    on_mesh = dataclasses.replace(lm, mesh=make_mesh(data=2, tensor=2))
    split = log_likelihood(on_mesh, pairs, num_samples=8, batch_size=8, guidance=0.5)
    for a, b in zip(one, split, strict=True):
        np.testing.assert_allclose(a.log_prob, b.log_prob, rtol=1e-5)


def test_text_is_cut_where_the_prompt_ends(text_lm):
    options = {"num_samples": 4, "batch_size": 4}
    pairs = [
        ("ab  ", "c"),
        ("ab", "  c"),
        ([97, 98], [32, 32, 99]),
        (np.array([97]), np.array([98, 9])),
    ]
    one, two, ids, _ = (log_likelihood(text_lm, [pair], **options)[0] for pair in pairs)
    assert one.log_prob == two.log_prob == ids.log_prob
    assert one.num_tokens == 3
    # "a" + "b" is one token: the prompt's two ids take two of the whole's three.
    lm = with_tokenizer(word_tokenizer(["a", "b", "ab", " ", "c"]))
    (merged,) = log_likelihood(lm, [("a a", "bc")], **options)
    (by_hand,) = log_likelihood(lm, [([0, 3, 0], [4])], **options)
    assert merged.log_prob == by_hand.log_prob
    with pytest.raises(ValueError, match="answer of pair 0 has 0 tokens"):
        log_likelihood(lm, [("a", "b")], **options)


@pytest.mark.parametrize(
    ("model", "guidance"),
    [("shifted_lm", 0.5), *more(("lm", 0.5), ("shifted_lm", 0.0), ("lm", 0.0))],
)
def test_greedy_match_is_greedy_decoding(model, guidance, request):
    lm = request.getfixturevalue(model)
    pairs, expected = [], []
    for prompt, length in (PROMPT, 4), ([2], 1), ([7, 8], 18), (PROMPT, 2):
        answer = greedy(lm, prompt, length, guidance)
        for wrong in (None, 0, length - 1):
            other = [(token + 1) % 20 if i == wrong else token for i, token in enumerate(answer)]
            pairs.append((prompt, other))
            expected.append(wrong is None)
    assert greedy_match(lm, pairs, batch_size=4, guidance=guidance) == expected
    assert greedy_match(lm, []) == []


def test_refusals(lm, shifted_lm, toy_cfg):
    good = [(PROMPT, ANSWER)]
    for pairs, message in [
        ([(PROMPT, [])], "answer of pair 0 has 0 tokens"),
        ([*good, ([1] * 60, [2] * 5)], r"pair 1 has 60 \+ 5 tokens.*max_seq_len=64"),
        ([([1, 23], [2])], "prompt of pair 0 contains the mask token 23"),
        ([([1], [2, 23])], "answer of pair 0 contains the mask token 23"),
        ([([1], [24])], r"token 24, which must be in \[0, vocab_size=24\)"),
        ([([-1], [2])], "token -1"),
        ([("text", "more")], "pair 0 is text but the checkpoint has no tokenizer"),
    ]:
        for call in (log_likelihood, greedy_match):
            with pytest.raises(ValueError, match=message):
                call(lm, pairs)
    for pairs in ("text", ["ab"], [("a", [1])], [(1, 2)], [([1], [2], [3])], [[1], [2]]):
        with pytest.raises(TypeError):
            log_likelihood(lm, pairs)
    for options, message in [
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_samples": 24}, "num_samples=24 must be a multiple of batch_size=16"),
        ({"num_samples": 3, "antithetic": True}, "num_samples=3 must be even"),
        ({"num_samples": 15, "batch_size": 5, "antithetic": True}, "batch_size=5 must be even"),
        ({"guidance": -0.5}, "guidance=-0.5 must be at least 0"),
        ({"guidance": math.nan}, "guidance=nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            log_likelihood(lm, good, **options)
    with pytest.raises(ValueError, match="prompt of pair 0 is empty"):
        log_likelihood(shifted_lm, [([], [1])])
    blocks = LanguageModel(lm.params, dataclasses.replace(toy_cfg, block_len=4))
    with pytest.raises(ValueError, match="trained to see its own block of 4 and those before it"):
        log_likelihood(blocks, good)
    causal = dataclasses.replace(toy_cfg, mask_token_id=None)
    with pytest.raises(ValueError, match="MASK token"):
        log_likelihood(LanguageModel(lm.params, causal), good)
