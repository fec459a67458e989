"""DEL: what is chosen, what exits are taken to be worth, and texts that no exit changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from decode.core.sampling import Sampling
from decode.speculative.accept import BlockVerification, Match, SpeculativeSampling
from decode.speculative.contracts import Context, Seen
from decode.speculative.controller import Controller
from decode.speculative.drafters.dynamic_exit import DynamicExit, tokens_per_layer
from decode.speculative.loop import SpeculativeMethod, decode, init_state, prefill, stream
from dlm import vocab
from dlm.models import decoder
from dlm.window import Window
from tests.lib.jitted import as_one_program
from tests.lib.laws import enumerated
from tests.lib.models import random_model
from tests.lib.speculation import check_statistics, random_prompts, run, texts
from tests.lib.tiers import more

B, L, J, G = 6, 4, 4, 16
EXITS = (1, 2, 3)
N, MANY = 20_000, 200_000  # texts by default, and of the exhaustive tests


def test_the_way_through_another_drafters_tree_is_compared(toy_cfg, toy_params):
    """In a tree of six nodes and in a chain of two the same was kept, and the same is seen."""
    drafter = DynamicExit((1,), num_drafts=3)
    features = jax.random.normal(jax.random.key(0), (1, 4, toy_cfg.d_model))
    context = Context(
        toy_params, np.zeros((1, 9), np.int32), np.int32([4]), np.zeros((1, 2), np.uint32),
        Sampling(None), np.array([True]), None,
    )  # fmt: skip
    said = lambda x: (
        vocab.read(vocab.head(toy_params), decoder.final_hidden(toy_params, toy_cfg, x)).token
    )
    shadow = np.asarray(as_one_program(said)(features))[0]
    path = [5, int(shadow[0]), int(shadow[1]) ^ 1]  # right, wrong, and right behind the last

    def seen(chosen, last):
        return Seen(
            np.int32([[*path, 9]]), features, np.int32([3]), np.int32([3]), features,
            chosen=np.int32([chosen]), last=np.int32([last]),
        )  # fmt: skip

    for chosen, last in (
        ([path[1], path[2], shadow[2]], 2),
        ([path[1], 6, path[2], 7, 7, shadow[2]], 5),
    ):
        see = as_one_program(
            lambda seen: drafter.observe(toy_cfg, context, seen, drafter.init(toy_cfg, 1, 9))
        )
        state = see(seen(chosen, last))
        assert state.matches.tolist() == [[2.0]] and state.seen.tolist() == [3.0]


def test_a_round_in_which_nobody_is_asked_compares_nothing(deep):
    """And of a batch in which others are, rows that take no part stay."""
    cfg, params, prompts, *_ = deep
    drafter = DynamicExit(EXITS, num_drafts=J)
    method = SpeculativeMethod(drafter, controller=Controller(costs=np.ones(3, np.float32)))
    state = init_state(cfg, method, prompts, gen_len=G)
    state = prefill(params, cfg, method, state)
    seen = []
    for fixed in (0, 1):
        some = method.replace(controller=method.controller.replace(fixed=fixed))
        seen.append(np.asarray(state.drafter.seen))
        if fixed == 1:
            state = state.replace(has_stopped=state.has_stopped.at[0].set(True))
        going = ~np.asarray(state.has_stopped)
        state = decode(params, cfg, some, state, 1, 10**6)
    seen.append(np.asarray(state.drafter.seen))
    assert (seen[0] == seen[1]).all() and going.sum() > 2
    assert ((seen[2] != seen[1]) == going).all()


def test_tokens_per_layer_are_those_of_a_loop():
    """Card: the choice by brute force; a round of d drafts runs d l + L layers."""
    rates = np.random.default_rng(0).random((3, 4)).astype(np.float32)
    exits, L = (2, 5, 7, 11), 12
    found = np.asarray(tokens_per_layer(jnp.asarray(rates), jnp.array(exits), 6, L))
    for b, e, d in np.ndindex(found.shape):
        tokens = sum(rates[b, e] ** i for i in range(d + 1))
        np.testing.assert_allclose(found[b, e, d], tokens / (d * exits[e] + L), rtol=1e-5)


@pytest.fixture(scope="module")
def deep(toy_cfg):
    """A target of four layers, the last of which change little; prompts, and its greedy texts."""
    cfg = dataclasses.replace(toy_cfg, n_layers=L, mask_token_id=None, eos_token_id=20)
    params, prompts = random_model(1, cfg), random_prompts(cfg, B)
    layers = jax.tree.map(lambda x: x, params["layers"])
    fade = jnp.array([1.0, 0.6, 0.3, 0.15])
    for half, name in (("attention", "o"), ("mlp", "down")):
        w = layers[half][name]
        layers[half] = {**layers[half], name: w * fade.reshape(-1, *[1] * (w.ndim - 1))}
    params = {**params, "layers": layers}
    return cfg, params, prompts, texts(decoded(cfg, params, SpeculativeMethod(), prompts), B)


def decoded(cfg, params, method, prompts):
    return run(params, cfg, method, prompts, gen_len=G, prompt_len=13, batch_size=B)


@functools.partial(jax.jit, static_argnames=("cfg", "layers"))
def said(params, cfg, tokens, layers):
    """[T], [T]: what the first layers say behind each token of a text, and how surely."""
    window = Window.at(tokens[None], jnp.zeros(1, jnp.int32), is_causal=True)
    hidden = decoder.forward(params, cfg, window, layers=tuple(range(layers))).hidden[0]
    law = jax.nn.softmax(vocab.logits(vocab.head(params), hidden))
    return jnp.argmax(law, axis=1), law.max(axis=1)


def behind(params, cfg, text, layers):
    padded = np.pad(np.int32(text), (0, 40 - len(text)))
    return [np.asarray(x)[: len(text)] for x in said(params, cfg, padded, layers)]


def test_rounds_are_those_of_plain_python(deep):
    """Shadow tokens, the choice, the drafts and where they end, round by round and row by row."""
    cfg, params, prompts, expected = deep
    drafter = DynamicExit(EXITS, J, num_shadow=4, memory=0.8, prior=0.6, weight=2.0)
    method = SpeculativeMethod(drafter)
    state = init_state(cfg, method, prompts, gen_len=G, chunk=16)
    state = prefill(params, cfg, method, state)
    matches, seen = np.zeros((B, len(EXITS))), np.zeros(B)
    for b, prompt in enumerate(prompts):
        given = prompt[:-1][-4:]  # positions that were read
        seen[b] = len(given)
        if given:
            right = behind(params, cfg, prompt[:-1], L)[0][-4:]
            for i, e in enumerate(EXITS):
                matches[b, i] = (behind(params, cfg, prompt[:-1], e)[0][-4:] == right).sum()
    kinds = set()
    before = jax.device_get(state)
    for after in stream(params, cfg, method, state):
        np.testing.assert_allclose(before.drafter.matches, matches, atol=1e-4)
        np.testing.assert_allclose(before.drafter.seen, seen, atol=1e-4)
        after = jax.device_get(after)
        for b in range(B):
            if before.has_stopped[b]:
                matches[b], seen[b] = after.drafter.matches[b], after.drafter.seen[b]
                continue
            text = before.tokens[b, : before.length[b]].tolist()
            rates = np.minimum((matches[b] + 2 * 0.6) / (seen[b] + 2), 0.99)
            value = np.array(
                [
                    [sum(a**i for i in range(d + 1)) / (d * e + L) for d in range(J + 1)]
                    for a, e in zip(rates, EXITS, strict=True)
                ]
            )
            place, num = np.unravel_index(value.argmax(), value.shape)
            drafts, sure = [], 1.0
            while len(drafts) < num and sure >= rates[place] ** num:
                tokens, surely = behind(params, cfg, [*text, *drafts], EXITS[place])
                drafts.append(int(tokens[-1]))
                sure *= surely[-1]
            kinds.add((int(place), len(drafts), int(num)))
            assert after.draft_forwards[b] - before.draft_forwards[b] == len(drafts)
            new = after.tokens[b, before.length[b] : after.length[b]].tolist()
            own = [*behind(params, cfg, [*text, *drafts], L)[0][len(text) - 1 :]]
            kept = 0
            while kept < len(drafts) and drafts[kept] == own[kept]:
                kept += 1
            assert [*drafts[:kept], own[kept]][: len(new)] == new
            assert after.acceptance_histogram[b, kept] == before.acceptance_histogram[b, kept] + 1
            for i, e in enumerate(EXITS):
                shadow = behind(params, cfg, [*text, *drafts], e)[0][len(text) - 1 :]
                right = sum(shadow[j] == own[j] for j in range(kept + 1))
                matches[b, i] = 0.8 * matches[b, i] + right
            seen[b] = 0.8 * seen[b] + kept + 1
        before = after
    assert texts(before, B) == expected
    assert len({place for place, *_ in kinds}) > 1  # different exits were chosen,
    assert any(0 < made < num for _, made, num in kinds)  # and drafts ended early


@pytest.mark.exhaustive
def test_no_exit_changes_a_text(deep):
    """GREEDY-ID for every exit, however much is expected of it; expectations are data."""
    cfg, params, prompts, expected = deep
    for exits in ((1,), (3,)):
        sizes = set()
        for prior in (0.0, 0.99):
            drafter = DynamicExit(exits, J, num_shadow=4, prior=prior, weight=50.0)
            state = decoded(cfg, params, SpeculativeMethod(drafter), prompts)
            assert texts(state, B) == expected
            check_statistics(state, J)
            assert (int(state.draft_forwards.sum()) > 0) == (prior > 0)
            sizes.add(decode._cache_size())
        assert len(sizes) == 1


def test_what_leaves_the_last_layer_is_what_the_head_reads(deep):
    """Card: the shadow token at layer L is the target's own; going on from an exit is exact."""
    cfg, params, prompts, _ = deep
    tokens = jnp.array([[*prompts[1], *prompts[2]]])

    @jax.jit
    def streams(params):
        window = Window.at(tokens, jnp.zeros(1, jnp.int32), is_causal=True)
        output = decoder.forward(params, cfg, window, feature_layers=(2, L))
        at_exit, last = jnp.split(output.features, 2, axis=-1)
        cut = decoder.forward(params, cfg, window, layers=(0, 1)).hidden
        return output.hidden, *(decoder.final_hidden(params, cfg, x) for x in (last, at_exit)), cut

    whole, last, at_exit, cut = streams(params)
    np.testing.assert_allclose(last, whole, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(at_exit, cut, atol=1e-5)


@pytest.mark.exhaustive
def test_under_a_controller_texts_are_the_same(deep):
    cfg, params, prompts, expected = deep
    drafter = DynamicExit(EXITS, J, num_shadow=4, prior=0.9)
    made = Controller(widths=(1, 3, 5), tolerance=0.1, memory=0.8, savings=1.0, credit=0.1)
    method = SpeculativeMethod(
        drafter, controller=made.replace(costs=np.float32([1.0, 1.05, 1.2, 1.3]))
    )
    state = decoded(cfg, params, method, prompts)
    assert texts(state, B) == expected
    assert (np.asarray(state.control.rounds)[:, 2:].sum(axis=1) > 0).any()


# ---- The law of drawn texts ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(toy_cfg):
    return enumerated(dataclasses.replace(toy_cfg, n_layers=3), num_tokens=5, gen_len=3)


DRAWN = DynamicExit((1, 2), 2, is_sampled=True, prior=0.9, weight=20.0)


@pytest.mark.parametrize(
    ("drafter", "rule", "num"),
    [
        (DRAWN, SpeculativeSampling(), N),
        *more(
            (DRAWN, SpeculativeSampling(), MANY),
            (DRAWN, BlockVerification(), MANY),
            (dataclasses.replace(DRAWN, is_sampled=False), Match(), MANY),
        ),
    ],
)
def test_drawn_texts_follow_the_targets_law(small, drafter, rule, num):
    far, accepted = small.distance(drafter, rule, num)
    assert far < 4 and accepted > 0.3


@struct.dataclass
class OtherLaw(DynamicExit):
    """The law that is said to be the exit's is flatter than that which was drawn from."""

    def propose(self, cfg, context, state):
        proposal = DynamicExit.propose(self, cfg, context, state)
        laws = Sampling(2.0).probs(jnp.log(proposal.tree.probs))
        return proposal.replace(tree=proposal.tree.replace(probs=laws))


@pytest.mark.exhaustive
def test_another_law_is_noticed(small):
    wrong = OtherLaw((1, 2), 2, is_sampled=True, prior=0.9, weight=20.0)
    assert small.distance(wrong, SpeculativeSampling(), N)[0] > 8


def test_what_cannot_be_is_refused(deep):
    cfg, *_ = deep
    for exits in ((), (0,), (2, 1), (L,), 2):
        with pytest.raises(ValueError, match=r"must be rising numbers of layers in \[1, 3\]"):
            DynamicExit(exits).validate(cfg)
    blocks = dataclasses.replace(cfg, block_len=4, shifted_logits=False, mask_token_id=3)
    with pytest.raises(ValueError, match="the model says a token where MASK stands"):
        DynamicExit(EXITS).validate(blocks)
