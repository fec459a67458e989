"""Constraints on the host: greedy, drawn, with drafts and in beams, texts obey and are exact."""

import dataclasses
import functools
import itertools
import re

import jax.numpy as jnp
import numpy as np
import pytest

import dlm
from decode.complete import complete, stream_text, warm_up
from decode.constraints.hosted import Follower, HostConstraint
from decode.constraints.monitors.automaton import Automaton, AutomatonMonitor
from decode.constraints.monitors.dereference import IntrospectionMonitor
from decode.constraints.monitors.watched import Vocabulary, Watched
from decode.core.sampling import FILTERS, Sampling
from decode.search import hosted as hosted_search
from decode.search.components import Beam, Contrastive
from decode.search.contracts import NEVER
from decode.search.loop import results
from decode.search.method import SearchMethod
from decode.speculative import hosted
from decode.speculative.accept import SpeculativeSampling
from decode.speculative.controller import Controller
from decode.speculative.drafters.draft_model import DraftModel
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.loop import SpeculativeMethod
from decode.speculative.pearl import Pearl
from tests.lib.drafters import Adversary
from tests.lib.models import laws_of, markov, random_model
from tests.lib.speculation import random_prompts, run, texts
from tests.lib.tiers import more
from tests.lib.untrained import byte_lm

NAMES = ["name", "nation", "x", "\N{LATIN SMALL LETTER E WITH ACUTE}"]
WORDS = [
    b"obj", b".", b".na", b"na", b"me", b"name", b"x", b"tion", b"(", b")", b" ", b"name(", b"oth",
    b".x(", b"a", b"obj.", b"obj.y", b"y", b"=", b"\xc3", b"\xa9", b"", b"", b"",
]  # fmt: skip
SILENT = [i for i, word in enumerate(WORDS) if not word]
MONITOR = IntrospectionMonitor({"T": NAMES}, {"obj": "T", "obj.x": "T"})
OBJ = WORDS.index(b"obj.")


def is_legal(text, first, ends):
    """Whether of every dereference that is not whole before `first` the name is a member.

    Where the text does not end, the last one may be a beginning.
    """
    members = {name.encode() for name in NAMES}
    name = rb"[A-Za-z0-9_\x80-\xff]*"
    for match in re.finditer(rb"(?<![\w.\x80-\xff])obj(?:\.x)?\.(?=(" + name + rb"))", text):
        written = match[1]
        at, end = match.start(1), match.start(1) + len(written)
        given = text[at : max(first, at)] if end >= first else written
        if end < first or (given and not any(m.startswith(given) for m in members)):
            continue  # given as it is
        is_open = end == len(text) and not ends
        if not (written in members or (is_open and any(m.startswith(written) for m in members))):
            return False
    return True


def allowed_by_hand(prompt, tokens, eos):
    """[V] bool: what may follow, by reading the whole text anew."""
    first = sum(len(WORDS[t]) for t in prompt)
    text = b"".join(WORDS[t] for t in (*prompt, *tokens))
    mask = [is_legal(text + w, first, False) if w else is_legal(text, first, True) for w in WORDS]
    return np.array(mask)


@pytest.fixture(scope="module")
def toy(toy_cfg, toy_params):
    """A model whose tokens are pieces of a program, and prompts of which many dereference."""
    cfg = dataclasses.replace(toy_cfg, mask_token_id=None)
    prompts = [[*p, OBJ] if i % 2 else p for i, p in enumerate(random_prompts(cfg, 6))]
    return cfg, toy_params, prompts


@functools.cache
def watched():
    return Watched(MONITOR, Vocabulary(WORDS), SILENT)


def written(toy, method, gen_len=10, constraint=None, **options):
    """The finished state, and texts."""
    cfg, params, prompts = toy
    method = hosted.host(method, constraint or watched())
    state = hosted.prepare(params, cfg, method, prompts, gen_len=gen_len, chunk=8, **options)
    state = hosted.decode(params, cfg, method, state)
    return state, texts(state, len(prompts))


# A bias towards dots and objects, which changes nothing about what is right.
BIAS = jnp.zeros(24).at[jnp.array([1, 15, 16, 13])].set(2.0)


# ---- Greedy -------------------------------------------------------------------------------------


def test_greedy_texts_are_those_of_a_masked_target(toy):
    """Of the same model without a constraint some are others."""
    cfg, params, prompts = toy
    state, rows = written(toy, SpeculativeMethod())
    for prompt, text in zip(prompts, rows, strict=True):
        for n, token in enumerate(text):
            law = laws_of(params, cfg, [*prompt, *text[:n]])[-1]
            mask = allowed_by_hand(prompt, text[:n], cfg.eos_token_id)
            assert mask[token] and token == int(np.argmax(np.where(mask, law, -1)))
    assert state.num_masked.sum() > 3 and not state.num_released.any()


@pytest.mark.parametrize("drafter", ["truth", *more("lookup")])
def test_drafts_change_no_text(toy, drafter):
    """Also those that are right behind a token that only a mask has made the target's choice."""
    plain, rows = written(toy, SpeculativeMethod())
    truth = jnp.pad(plain.tokens, ((0, 0), (0, 8)))
    rate = jnp.linspace(0.7, 1.0, 6)
    drafts = PromptLookup() if drafter == "lookup" else Adversary(truth, rate)
    state, others = written(toy, SpeculativeMethod(drafts))
    assert others == rows and not state.num_released.any()
    assert (np.asarray(state.num_forwards) < [len(row) for row in rows]).any()
    assert (np.asarray(state.num_masked) <= np.asarray(state.num_forwards)).all()


@pytest.mark.exhaustive(every=4)
def test_without_a_trigger_nothing_changes(toy):
    """Nor is any mask sent; drawn texts are the same, too."""
    cfg, params, prompts = toy
    method = SpeculativeMethod(sampling=Sampling(0.9))
    plainly = run(params, cfg, method, prompts, gen_len=10)
    monitor = IntrospectionMonitor({"T": NAMES}, {"zzz": "T"})
    state, rows = written(toy, method, constraint=Watched(monitor, Vocabulary(WORDS), SILENT))
    assert rows == texts(plainly, 6) and not state.num_masked.any()
    np.testing.assert_allclose(state.log_prob, plainly.log_prob, atol=1e-5)


# ---- Drawn --------------------------------------------------------------------------------------


CUTS = {
    "top_k": 5, "top_p": 0.7, "min_p": 0.2, "typical_p": 0.6, "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.3,
}  # fmt: skip


def test_every_filter_asks_for_masks_before_it_cuts():
    assert set(CUTS) == set(FILTERS)
    for name, number in CUTS.items():
        for temperature, is_lazy in ((1.2, False), (None, True)):
            sampling = Sampling(temperature, **{name: number})
            method = hosted.host(SpeculativeMethod(sampling=sampling), HostConstraint())
            assert method.is_lazy == is_lazy, name


@pytest.mark.parametrize("filters", [{}, *more(*({name: cut} for name, cut in CUTS.items()))])
def test_drawn_texts_do_not_depend_on_drafts_or_on_when_masks_are_made(toy, filters, monkeypatch):
    sampling = Sampling(1.2, logit_bias=BIAS, **filters)
    drafted = SpeculativeMethod(PromptLookup(), sampling=sampling)
    state, rows = written(toy, drafted, seeds=3)
    assert state.num_masked.sum() > 3
    monkeypatch.setattr(hosted.Hosted, "is_lazy", False)
    assert written(toy, drafted, seeds=3)[1] == rows
    if filters:
        alone = drafted.replace(drafter=SpeculativeMethod().drafter)
        assert written(toy, alone, seeds=3)[1] == rows
    cfg, _, prompts = toy
    for prompt, text in zip(prompts, rows, strict=True):
        for n, token in enumerate(text):
            assert allowed_by_hand(prompt, text[:n], cfg.eos_token_id)[token]


class ByTable(HostConstraint):
    """Which token may follow which: [V, V] bool."""

    def __init__(self, table):
        self.table = table

    def begin(self, prompt):
        return prompt[-1]

    def advance(self, state, token):
        return token if self.table[state, token] else None

    def allowed(self, state):
        return self.table[state]

    def release(self, state):
        return state


@pytest.mark.parametrize(("is_sampled", "num"), more((True, 4000), (True, 40_000), (False, 40_000)))
def test_tested_drafts_follow_the_masked_law(is_sampled, num):
    """Three tokens against all there are; drafts are drawn without a mask, and tested."""
    V, G, rng = 3, 3, np.random.default_rng(1)
    p, q = (rng.dirichlet(np.full(V, 0.7), size=V) + 0.05 for _ in range(2))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    table = np.array([[1, 1, 0], [0, 1, 1], [1, 1, 1]], bool)
    (params, cfg), draft = markov(p), markov(q)
    drafter = DraftModel(*draft, num_drafts=2, is_sampled=is_sampled)
    method = SpeculativeMethod(drafter, SpeculativeSampling(), Sampling(1.0))
    method = hosted.host(method, ByTable(table))
    state = hosted.prepare(params, cfg, method, [[0]] * num, gen_len=G, seeds=7)
    state = hosted.decode(params, cfg, method, state)
    tokens = np.asarray(state.tokens)[:, 1 : G + 1]
    counts = np.bincount(tokens @ V ** np.arange(G)[::-1], minlength=V**G)
    p = np.where(table, p, 0)
    p /= p.sum(1, keepdims=True)
    law = np.array(
        [p[0, a] * p[a, b] * p[b, c] for a, b, c in itertools.product(range(V), repeat=3)]
    )
    assert (counts[law == 0] == 0).all() and (law == 0).sum() > 9
    expected = num * law[law > 0]
    chi_square = ((counts[law > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 40  # of at most 16 degrees of freedom: once in 2,000 times
    assert (np.asarray(state.num_forwards) < G).any()


# ---- Beams --------------------------------------------------------------------------------------


def beam_by_hand(toy, prompt, K, gen_len):
    """(score, text), the best first; no text of the toy ends before."""
    cfg, params, _ = toy
    alive = [(0.0, ())]
    for _ in range(gen_len):
        every = []
        for score, text in alive:
            law = np.log(laws_of(params, cfg, [*prompt, *text])[-1])
            mask = allowed_by_hand(prompt, text, cfg.eos_token_id)
            mask[cfg.eos_token_id] = False
            every += [(score + law[t], (*text, t)) for t in np.flatnonzero(mask).tolist()]
        alive = sorted(every, key=lambda x: -x[0])[:K]
    return [(score / gen_len, list(text)) for score, text in alive]


def test_beams_are_those_of_a_masked_target(toy):
    """Children of one hypothesis go their own ways; texts that are not allowed are not there."""
    cfg, params, prompts = toy
    never = jnp.zeros(24).at[cfg.eos_token_id].set(-jnp.inf)
    plain = SearchMethod(Beam(num_beams=3), Sampling(None, logit_bias=never), num_return=3)
    method = hosted_search.host(plain, watched())
    state = hosted_search.prepare(params, cfg, method, prompts, gen_len=6, chunk=8)
    state = hosted_search.decode(params, cfg, method, state)
    found = results(plain, state)
    assert state.num_masked.sum() > 3 and state.num_moves.sum() > 3
    for b, prompt in enumerate(prompts):
        expected = beam_by_hand(toy, prompt, 3, 6)
        for r in range(3):
            assert found.tokens[b, r, :6].tolist() == expected[r][1]
            assert float(found.score[b, r]) == pytest.approx(expected[r][0], abs=1e-4)


@pytest.mark.exhaustive
def test_hypotheses_that_are_not_there_are_no_results(toy):
    """Three beams where one token is allowed at a time."""
    cfg, params, _ = toy
    table = np.roll(np.eye(24, dtype=bool), 1, axis=1)
    plain = SearchMethod(Beam(num_beams=3), num_return=3)
    method = hosted_search.host(plain, ByTable(table))
    state = hosted_search.prepare(params, cfg, method, [[3]], gen_len=4, chunk=8)
    state = hosted_search.decode(params, cfg, method, state)
    found = results(plain, state)
    assert found.tokens[0, 0, :4].tolist() == [4, 5, 6, 7]
    assert (np.asarray(found.score[0, 1:]) == NEVER).all()


# ---- The API ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    return byte_lm()


ASKED = ["a.b = obj.na", "obj.", "nothing here", "obj.name; obj.", "x"]


def test_complete_and_stream_say_what_the_constraint_did(lm):
    options = dict(gen_len=12, constraint=MONITOR)
    answer = complete(lm, ASKED[1], **options)
    pieces = list(stream_text(lm, ASKED[1], **options))
    streamed = pieces[-1].completion
    assert streamed.tokens.tolist() == answer.tokens.tolist()
    assert streamed.counts == answer.counts
    assert answer.counts["num_masked"] > 0 == answer.counts["num_released"]
    assert "".join(piece.text for piece in pieces) == answer.text
    raw = bytes(t for t in answer.tokens.tolist() if t < 256)
    assert is_legal(ASKED[1].encode() + raw, len(ASKED[1]), False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["prompt_lookup", None, "beam_4"])
def test_complete_with_rows_replaced(lm, method):
    """Each answer is the one its prompt gets alone."""
    options = dict(gen_len=12, method=method, constraint=MONITOR)
    together = complete(lm, ASKED, batch_size=2, **options)
    assert sum(answer.counts["num_masked"] for answer in together) >= 3
    for prompt, answer in zip(ASKED[:2], together, strict=False):
        alone = complete(lm, prompt, **options)
        assert alone.tokens.tolist() == answer.tokens.tolist()
        assert alone.counts == answer.counts
    num_programs = results._cache_size()
    assert complete(lm, ASKED[1], **options).tokens.tolist() == together[1].tokens.tolist()
    assert results._cache_size() == num_programs  # another constraint compiles nothing
    plain = complete(lm, ASKED[2], gen_len=12, method=method)
    assert plain.text == together[2].text and "num_masked" not in plain.counts


def test_a_state_that_allows_nothing_is_released():
    """No token begins the name: what follows is free, and so is a state read from the text."""
    monitor = IntrospectionMonitor({"T": ["q"]}, {"obj": "T"})
    follower = Follower(Watched(monitor, Vocabulary(WORDS), SILENT))
    asleep, awake = (follower.state_of(np.array(text, np.int32), 1) for text in ([9], [9, OBJ]))
    assert not follower.mask(awake).any() and follower.mask(asleep).sum() == 23  # all but obj.y
    released, mask = follower.open(awake)
    assert mask.all() and follower.open(asleep)[0] is asleep
    name = WORDS.index(b"name")
    written = follower.follow(released, name)
    assert written == follower.follow(awake, name)
    assert written == follower.state_of(np.array([9, OBJ, name], np.int32), 1)
    never = np.arange(24) == 6
    ruled = Follower(Watched(MONITOR, Vocabulary(WORDS), SILENT), never)
    state = ruled.state_of(np.array([OBJ], np.int32), 1)
    assert not ruled.mask(state)[6] and Follower(ruled.constraint).mask(state)[6]


def test_what_was_given_is_told_from_what_was_written():
    """The same tokens, of which the last was written behind one prompt and is part of another."""
    monitor = AutomatonMonitor(Automaton.words(["ab"]), "")
    follower, text = (
        Follower(Watched(monitor, Vocabulary([b"a", b"b"]), ())),
        np.array([1, 0], np.int32),
    )
    allowed = lambda prompt_len: follower.mask(follower.state_of(text, prompt_len)).tolist()
    assert (allowed(1), allowed(2)) == ([False, True], [True, False])


def test_an_answer_that_is_whole_only_ends(lm):
    """Of tokens that say nothing those alone are left that end a text; so may a stop token."""
    words = [b"a", b"b", b"", b"", b"c"]
    monitor = AutomatonMonitor(Automaton.words(["ab"]), "")
    watched = Watched(monitor, Vocabulary(words), {3, 4})
    state = watched.advance(watched.begin([]), 0)
    assert watched.allowed(state).tolist() == [False, True, False, False, False]
    assert [watched.advance(state, token) for token in (2, 3, 4)] == [None] * 3
    state = watched.advance(state, 1)
    assert watched.allowed(state).tolist() == [False, False, False, True, True]
    assert watched.advance(state, 2) is None
    assert watched.advance(state, 3) == watched.advance(state, 4) == state
    assert watched.allowed(watched.release(state)).all()
    for stop_ids, bias in (((), {}), ((ord("z"),), {lm.tokenizer.eos_token_id: float("-inf")})):
        options = dict(gen_len=8, stop_ids=stop_ids, logit_bias=bias, constraint=monitor)
        for method in (None, "beam_4"):
            answer = complete(lm, "xy", method=method, **options)
            assert (answer.text, answer.finish_reason) == ("ab", "eos"), method


@pytest.mark.exhaustive
def test_where_nothing_is_allowed_it_is_released(lm):
    """No token may begin a member: the plain text, and it is said how often."""
    prompt, options = "v.", dict(gen_len=8)
    starts = {b: float("-inf") for b in b"q"}
    plain = complete(lm, prompt, logit_bias=starts, **options)
    monitor = IntrospectionMonitor({"T": ["q"]}, {"v": "T"})
    answer = complete(lm, prompt, logit_bias=starts, constraint=monitor, **options)
    assert answer.text == plain.text and answer.counts["num_released"] == 1


def test_bad_constraints_are_refused(lm):
    draft = DraftModel(lm.params, lm.cfg)
    for options, message in (
        (dict(constraint=5), "constraint=5 must be a Monitor or a HostConstraint; others"),
        (dict(method=Pearl(draft), constraint=MONITOR), "constraint must be None with Pearl"),
        (
            dict(controller=Controller(costs=np.ones(2)), constraint=MONITOR),
            "controller must be None with a constraint",
        ),
        (
            dict(method=SearchMethod(Contrastive()), constraint=MONITOR),
            "constraint must be None with Contrastive, which reads",
        ),
        (dict(method="cntp", constraint=MONITOR), "constraint must be None with CNTP, whose"),
        (dict(method="adadec", constraint=MONITOR), "constraint must be None with AdaDec, whose"),
    ):
        with pytest.raises(ValueError, match=message):
            complete(lm, "abc", gen_len=4, **options)
    nameless = dlm.LanguageModel(lm.params, lm.cfg, None)
    for method in ("beam_4", "prompt_lookup"):
        with pytest.raises(ValueError, match="constraint must be None: what it says on the host"):
            warm_up(lm, "abc", method=method, constraint=MONITOR, gen_len=4)
    with pytest.raises(ValueError, match="reads text, but the checkpoint has no tokenizer"):
        complete(nameless, [1, 2], constraint=MONITOR)
    for method in (hosted.Hosted(), hosted_search.HostedSearch(Beam())):
        with pytest.raises(ValueError, match="follower=None must be one: decode"):
            complete(lm, "abc", gen_len=4, method=method)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(5))
def test_every_dereference_is_a_member(toy, seed):
    """Random models, which lean towards dots."""
    cfg, _, prompts = toy
    params = random_model(seed, cfg)
    method = SpeculativeMethod(sampling=Sampling(1.5, logit_bias=BIAS))
    state, rows = written((cfg, params, prompts), method, seeds=seed)
    assert state.num_masked.sum() > 0
    for prompt, text in zip(prompts, rows, strict=True):
        for n, token in enumerate(text):
            assert allowed_by_hand(prompt, text[:n], cfg.eos_token_id)[token]
