"""What searches find where not everything is allowed: as enumeration does, by every strategy."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import struct

from decode.complete import complete
from decode.constraints.filters import Filters
from decode.constraints.nucleus import Nucleus
from decode.constraints.token_ban import TokenBan
from decode.core.sampling import Sampling
from decode.diffusion.contracts import Constraint
from decode.search.components import METHODS, Beam, ConditionalBeam
from decode.search.loop import SearchMethod
from decode.search.strategies.conditional_beam import Length
from dlm.lm import LanguageModel
from tests.lib.constraints import Automaton, Monitor, ways
from tests.lib.models import laws_of
from tests.lib.search import found, search
from tests.lib.speculation import random_prompts
from tests.lib.tiers import often

G, EOS = 5, 22
NAMES = [name for name, method in METHODS.items() if not method.strategy.takes_back]


def table_of(V, most=2):
    """Four states, `most` tokens from each; a text may end in the third, the last is its end."""
    rng = np.random.default_rng(4)
    table = np.full((5, V), -1, np.int32)
    for state in range(4):
        for token in rng.choice(20, most, replace=False):
            table[state, token] = rng.integers(4)
    table[2, EOS] = 4
    return table


@pytest.fixture(scope="module")
def toy(toy_cfg, toy_params):
    """A model, and prompts."""
    cfg = dataclasses.replace(toy_cfg, eos_token_id=EOS, mask_token_id=None)
    return cfg, toy_params, random_prompts(cfg, 4)


@pytest.fixture(scope="module")
def table(toy):
    return table_of(toy[0].vocab_size)


def enumerated(toy, table, prompt, gen_len):
    """(log-probability, tokens) of every text of the language, the best first."""
    cfg, params, _ = toy
    every, grown = [], [((), 0.0)]
    for n in range(gen_len):
        longer = []
        for text, total in grown:
            law = np.log(laws_of(params, cfg, [*prompt, *text])[-1])
            state = ways(table, text)
            longer += [((*text, t), total + law[t]) for t in np.flatnonzero(table[state] >= 0)]
        every += [x for x in longer if x[0][-1] == EOS or n == gen_len - 1]
        grown = [x for x in longer if x[0][-1] != EOS]
    return sorted(((total, [int(t) for t in text]) for text, total in every), reverse=True)


@pytest.mark.parametrize("kind", [Automaton, Monitor])
def test_enough_beams_find_the_best_texts_of_the_language(toy, table, kind):
    """Exactly those, with the model's own probabilities, which bans do not make larger."""
    beam = Beam(num_beams=24, length_penalty=0.0, ends="safe")
    method = SearchMethod(beam, constraint=kind(jax.numpy.asarray(table)), num_return=12)
    _, ours = search(toy, method, gen_len=4)
    for b, prompt in enumerate(toy[2]):
        expected = enumerated(toy, table, prompt, 4)[:12]
        there = [r for r in range(12) if ours.score[b, r] > -1e8]
        assert [found(ours, b, r) for r in there] == [text for _, text in expected]
        np.testing.assert_allclose(
            ours.score[b, there], [total for total, _ in expected], atol=1e-4
        )


@pytest.mark.parametrize("name", ["beam_4", *often(*(n for n in NAMES if n != "beam_4"))])
def test_whatever_is_found_is_of_the_language(toy, table, name):
    """Whatever a strategy would like; log-probabilities are the model's own."""
    cfg, params, prompts = toy
    strategy = METHODS[name].strategy
    method = SearchMethod(
        strategy, constraint=Automaton(jax.numpy.asarray(table)), num_return=strategy.num_results
    )
    _, ours = search(toy, method, gen_len=G)
    num = 0
    for b, prompt in enumerate(prompts):
        for r in range(method.num_return):
            if ours.score[b, r] > -1e8:
                text = found(ours, b, r)
                assert ways(table, text) >= 0 and (text[-1] == EOS or len(text) == G)
                laws = laws_of(params, cfg, [*prompt, *text])[len(prompt) - 1 : -1]
                own = np.log(laws[np.arange(len(text)), text])
                np.testing.assert_allclose(ours.log_prob[b, r, : len(text)], own, atol=1e-4)
                num += 1
    assert num >= len(prompts)


@pytest.mark.exhaustive
def test_an_end_is_accepted_or_refused_as_other_tokens_are(toy, table):
    """Also where it is looked at though it is improbable."""
    strategy = ConditionalBeam(Length(least=1), num_beams=3, num_tried=6)
    method = SearchMethod(strategy, constraint=Monitor(jax.numpy.asarray(table)), num_return=3)
    _, ours = search(toy, method, gen_len=G)
    for b, r in itertools.product(range(len(toy[2])), range(3)):
        if ours.score[b, r] > -1e8:
            assert ways(table, found(ours, b, r)) >= 0


def test_languages_that_end_are_found_whole_and_nothing_else(toy):
    """Two texts, of which one cannot be ended; a dead end for all; one word again and again."""
    table = np.full((4, toy[0].vocab_size), -1, np.int32)
    table[0, 3], table[0, 4], table[1, EOS] = 1, 2, 3
    lm = LanguageModel(toy[1], toy[0])
    answers = complete(
        lm, toy[2], method="beam_4", gen_len=G, num_return=4, constraint=Automaton(table)
    )
    for answer in answers:
        assert answer.canvas.tolist() == [3, EOS] and answer.finish_reason == "eos"
        assert answer.others == () and answer.num_forwards == 2
    table[1, EOS] = -1
    again = np.full_like(table, -1)
    again[0, 3] = 0
    for method in ("beam_4", "momentum", "contrastive"):
        options = dict(method=method, gen_len=G)
        answer = complete(lm, toy[2][0], constraint=Automaton(again), **options)
        assert answer.canvas.tolist() == [3] * G and answer.finish_reason == "length"
        answer = complete(lm, toy[2][0], constraint=Automaton(table), **options)
        assert answer.finish_reason == "stuck" and answer.score == -np.inf
        assert answer.num_forwards <= 4 and answer.canvas.tolist() in ([], [3], [4])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_states_go_where_their_prompts_go(toy, table, name):
    """A prompt finds alone, and in a row that others had before, what it finds in a batch."""
    lm = LanguageModel(toy[1], toy[0])
    options = dict(method=name, constraint=Automaton(jax.numpy.asarray(table)))
    lengths = [2, 5, 3, 4]
    whole, refilled = (
        complete(lm, toy[2], gen_len=lengths, batch_size=size, **options) for size in (4, 2)
    )
    alone = [
        complete(lm, prompt, gen_len=n, **options)
        for prompt, n in zip(toy[2], lengths, strict=True)
    ]
    for a, b, c in zip(whole, refilled, alone, strict=True):
        assert a.canvas.tolist() == b.canvas.tolist() == c.canvas.tolist()


@pytest.mark.exhaustive(every=4)
def test_banned_tokens_are_not_written(toy):
    lm = LanguageModel(toy[1], toy[0])
    options = dict(gen_len=G, method="beam_4")
    free = complete(lm, toy[2], **options)
    used = sorted({int(t) for x in free for t in x.canvas})
    banned = complete(lm, toy[2], constraint=TokenBan(tuple(used)), **options)
    assert not set(used) & {int(t) for x in banned for t in x.canvas}


@pytest.mark.exhaustive
def test_the_nucleus_and_filters_are_those_of_diffusion(toy):
    cfg, params, prompts = toy
    lm = LanguageModel(params, cfg)
    options = dict(gen_len=G, method="beam_4")
    one = complete(lm, prompts, constraint=Nucleus(top_k=1), **options)
    assert written(one) == written(complete(lm, prompts, gen_len=G))
    penalised = complete(lm, prompts, repetition_penalty=5.0, **options)
    filters = Filters(Sampling(None, repetition_penalty=5.0))
    assert written(complete(lm, prompts, constraint=filters, **options)) == written(penalised)
    assert written(complete(lm, prompts, **options)) != written(penalised)


def written(answers):
    return [answer.canvas.tolist() for answer in answers]


@struct.dataclass
class Proposes(Constraint):
    """Changes proposals, and knows nothing of laws."""

    def propose(self, round, state):
        return round


@struct.dataclass
class NeedsMore(Constraint):
    needs = frozenset({"shadow"})


def test_what_a_search_cannot_obey_is_refused(toy):
    lm = LanguageModel(toy[1], toy[0])
    for constraint, message in (
        (Proposes(), "Proposes changes proposals of a window"),
        (NeedsMore(), "NeedsMore needs 'shadow', which a search does not have"),
        (TokenBan((99,)), r"banned id 99 must be in \[0, vocab_size=24\)"),
        (5, "constraint=5 must be of class Constraint, or None"),
    ):
        with pytest.raises(ValueError, match=message):
            complete(lm, [1, 2], method="beam_4", gen_len=4, constraint=constraint)
    with pytest.raises(ValueError, match="are for searches: give one as method"):
        complete(lm, [1, 2], gen_len=4, constraint=TokenBan())
