"""AdaDec: an oracle that knows of no shortcut, its limits, and what it reports."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from decode.complete import complete
from decode.constraints.token_ban import TokenBan
from decode.core.sampling import Sampling
from decode.search.components import METHODS, AdaDec
from decode.search.loop import SearchMethod, decode
from tests.lib.docs import check_refusals
from tests.lib.models import laws_of, markov
from tests.lib.search import found, search
from tests.lib.speculation import random_prompts
from tests.lib.tiers import more
from tests.lib.untrained import byte_lm


@pytest.fixture(scope="module")
def toy(toy_cfg, toy_params):
    """A model whose texts end now and then, and prompts."""
    cfg = dataclasses.replace(toy_cfg, eos_token_id=3, mask_token_id=None)
    return cfg, toy_params, random_prompts(cfg, 8)


def by_hand(toy, strategy, prompt, gen_len):
    """As the card says, every rollout from scratch: the text, its log-probability, pauses."""
    cfg, params, _ = toy
    eos, text, total, pauses = cfg.eos_token_id, [], 0.0, 0
    stops = {eos} if strategy.stops is None else {eos, *np.flatnonzero(strategy.stops)}

    def law(tokens):
        return np.log(laws_of(params, cfg, [*prompt, *tokens])[-1])

    while len(text) < gen_len and text[-1:] != [eos]:
        log_p = law(text)
        chosen = int(np.argmax(log_p))
        may_look = len(text) + 1 < gen_len
        if may_look and -(np.exp(log_p) * log_p).sum() >= strategy.theta:
            pauses += 1
            every = []
            for c in np.argsort(-log_p, kind="stable")[: strategy.num_tried]:
                rolled, R = [], log_p[c]
                most = min(strategy.look_ahead, gen_len - len(text) - 1)
                while len(rolled) < most and c not in stops:
                    ahead = law([*text, int(c), *rolled])
                    if (r := int(np.argmax(ahead))) in stops:
                        break
                    rolled.append(r)
                    R += ahead[r]
                every.append((len(rolled), R / (len(rolled) + 1), int(c)))
            enough = [x for x in every if x[0] >= strategy.min_rollout] or every
            chosen = max(enough, key=lambda x: x[1])[2]
        total += log_p[chosen]
        text.append(chosen)
    return text, total, pauses


@pytest.mark.parametrize(
    "strategies",
    [
        [
            AdaDec(1.0, look_ahead=3),
            AdaDec(-1.0, look_ahead=4),
            AdaDec(0.6, look_ahead=2, min_rollout=1),
        ],
        *more(
            [AdaDec(0.5, num_tried=24, look_ahead=2)],
            [AdaDec(0.3, look_ahead=4, stops=np.isin(np.arange(24), [4, 9, 16, 19]))],
        ),
    ],
)
def test_texts_by_hand(toy, strategies):
    """Of prompts together, and of one alone; what stays of rollouts is what comes anyway."""
    options = dict(prompt_len=13, canvas_len=10)
    for i, strategy in enumerate(strategies):
        num_programs = decode._cache_size()
        state, ours = search(toy, SearchMethod(strategy), **options)
        pauses, rolled, read = (np.asarray(x) for x in strategy.counts(state.strategy).values())
        for b, prompt in enumerate(toy[2]):
            text, score, num = by_hand(toy, strategy, prompt, 10)
            assert found(ours, b) == text, (strategy, b)
            assert float(ours.score[b, 0]) == pytest.approx(score, abs=1e-3)
            assert pauses[b] == num
        assert rolled.sum() > 0 and np.asarray(state.num_moves).any()
        plain = (1 + strategy.look_ahead) * pauses + (ours.num_tokens[:, 0] - pauses)
        forwards = np.asarray(state.num_forwards)
        assert (forwards <= plain).all()
        # Every forward reads the text or, with a rollout of the longest under way, all of them.
        assert ((read - forwards) % (strategy.num_tried - 1) == 0).all()
        assert (read - forwards >= (strategy.num_tried - 1) * rolled // strategy.num_tried).all()
        for b, prompt in enumerate(toy[2]):
            _, alone = search(toy, SearchMethod(strategy), [prompt] * 8, **options)
            assert {tuple(found(alone, j)) for j in range(8)} == {tuple(found(ours, b))}
            n = ours.num_tokens[b, 0]
            np.testing.assert_allclose(alone.log_prob[0, 0, :n], ours.log_prob[b, 0, :n], atol=1e-4)
        assert i == 0 or decode._cache_size() == num_programs


@pytest.mark.parametrize(
    "strategy", [AdaDec(np.inf), AdaDec(-1.0, look_ahead=0), *more(AdaDec(-1.0, num_tried=1))]
)
def test_never_pausing_or_looking_no_further_is_greedy(toy, strategy):
    _, ours = search(toy, SearchMethod(strategy), prompt_len=13, canvas_len=10)
    greedy = [by_hand(toy, AdaDec(np.inf), prompt, 10)[0] for prompt in toy[2]]
    assert [found(ours, b) for b in range(8)] == greedy


@pytest.mark.exhaustive
def test_of_all_candidates_the_best_rollout(toy):
    """A table of 6 tokens: all of them tried at every token, as far as there is room."""
    table = np.random.default_rng(3).dirichlet([0.5] * 6, size=6)
    params, cfg = markov(table)
    of_table = cfg, params, [[i] for i in range(6)]
    strategy = AdaDec(0.0, num_tried=6, look_ahead=3)
    cfg = dataclasses.replace(cfg, eos_token_id=4)
    _, ours = search((cfg, *of_table[1:]), SearchMethod(strategy), gen_len=6)
    for b, prompt in enumerate(of_table[2]):
        assert found(ours, b) == by_hand((cfg, *of_table[1:]), strategy, prompt, 6)[0]


@pytest.mark.exhaustive
def test_entropies_are_of_the_model_itself(toy):
    """A bias that leaves one token only changes no pause, and a penalty forgets rollouts."""
    bias = jnp.full(24, -50.0).at[6].set(50.0)
    strategy = AdaDec(1.0, look_ahead=3)
    state, ours = search(toy, SearchMethod(strategy, Sampling(None, logit_bias=bias)))
    assert all(found(ours, b) == [6] * 10 for b in range(8))
    for b, prompt in enumerate(toy[2]):
        laws = laws_of(toy[1], toy[0], [*prompt, *[6] * 8])[len(prompt) - 1 :]
        pauses = (-(laws * np.log(laws)).sum(axis=1) >= 1.0).sum()
        # What stays of a rollout is no pause, so these are all that there are.
        assert int(state.strategy.num_pauses[b]) == pauses
    method = SearchMethod(strategy, Sampling(None, repetition_penalty=1.5))
    state, ours = search(toy, method)
    for b, prompt in enumerate(toy[2]):
        seen = np.asarray(state.occurred[b, 0])
        assert {*np.flatnonzero(seen)} == {*prompt, *found(ours, b)}


@pytest.mark.exhaustive
def test_what_complete_reports():
    answer = complete(byte_lm(), "abc", gen_len=8, method="adadec")
    assert answer.counts.keys() == {"num_pauses", "num_rolled", "num_read"}
    assert answer.counts["num_rolled"] <= 3 * 5 * answer.counts["num_pauses"]
    assert answer.num_forwards >= len(answer.canvas)


def test_what_goes_without_it_is_refused():
    lm = byte_lm()
    with pytest.raises(ValueError, match="goes without AdaDec, which takes texts back"):
        complete(lm, "abc", gen_len=8, method="adadec", constraint=TokenBan((3,)))
    with pytest.raises(ValueError, match="AdaDec draws nothing, so temperature goes without it"):
        complete(lm, "abc", gen_len=8, method="adadec", temperature=0.5)


def test_nonsense_is_refused(toy):
    refuse = lambda made: SearchMethod(made).validate(toy[0])
    check_refusals(METHODS["adadec"].strategy, refuse, toy[0])
    refuse(AdaDec(np.inf))
    with pytest.raises(ValueError, match="stops is a list, which must be an array of bool"):
        refuse(AdaDec(stops=[True] * 24))
    with pytest.raises(ValueError, match=r"stops has shape \(5,\), not \[vocab_size=24\]"):
        refuse(AdaDec(stops=np.zeros(5, bool)))
