"""Lookahead's window, pool and candidates, against the algorithm in plain Python."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import Sampling
from decode.speculative.contracts import Seen
from decode.speculative.drafters.lookahead import Lookahead
from decode.speculative.loop import SpeculativeMethod, init_state, prefill, stream
from decode.speculative.state import context_of
from dlm import vocab
from dlm.models import decoder
from dlm.window import Window
from tests.lib.speculation import random_prompts, run, texts
from tests.lib.tiers import more


def next_token(params, cfg, tokens, positions, run=[]):  # noqa: B006
    """The most probable token behind a row, at positions of its own."""
    if not run:
        run.append(jax.jit(decoder.forward, static_argnames="cfg"))
    padded = jnp.asarray([*tokens, *[0] * (64 - len(tokens))], jnp.int32)[None]
    place = jnp.asarray([*positions, *[0] * (64 - len(positions))], jnp.int32)[None]
    hidden = run[0](params, cfg, Window(padded, place, is_causal=True)).hidden
    return int(jnp.argmax(vocab.logits(vocab.head(params), hidden[:, len(tokens) - 1])))


@pytest.mark.parametrize(("ngram", "window"), [(4, 3), *more((3, 4), (5, 1))])
def test_rounds_are_those_of_plain_python(toy_cfg, toy_params, ngram, window):
    cfg = dataclasses.replace(toy_cfg, eos_token_id=18)
    drafter = Lookahead(ngram, window, num_candidates=2)
    method = SpeculativeMethod(drafter)
    prompts = [[9], *random_prompts(cfg, 4)]
    first = prefill(toy_params, cfg, method, init_state(cfg, method, prompts, gen_len=24))
    pools = [{} for _ in prompts]
    n, before, fillers = ngram - 1, None, None
    checked = accepted = 0
    for rounds, state in enumerate(stream(toy_params, cfg, method, first)):
        context = context_of(toy_params, method, state)
        ahead = np.asarray(drafter._filler(context, n * window))
        after = jax.device_get(state)
        if before is not None:
            for b in range(len(prompts)):
                if before.has_stopped[b]:
                    continue
                text = before.tokens[b, : before.length[b]].tolist()
                p = len(text) - 1
                filler = fillers[b]
                cells = before.drafter.window[b].copy()
                cells = np.where(cells < 0, filler, cells)
                cells[0, 0] = text[-1]
                new = []
                for j in range(window):
                    row = [*text, *cells[0, 1 : j + 1], *cells[1:, j]]
                    place = [*range(p + 1), *range(p + 1, p + j + 1)]
                    place += [p + r + j for r in range(1, n)]
                    new.append(next_token(toy_params, cfg, row, place))
                new = [int(filler[0, j]) if t == cfg.eos_token_id else t for j, t in enumerate(new)]
                grams = [tuple(int(x) for x in (*cells[1:, j], new[j])) for j in range(window)]
                if rounds >= n - 1:  # rows that are no filler
                    for j, gram in enumerate(grams):
                        known = pools[b].setdefault(int(cells[0, j]), [])
                        if gram in known:
                            known.remove(gram)
                        known.append(gram)
                        del known[:-2]
                a = int(after.length[b] - before.length[b]) - 1
                accepted += a
                rows = np.concatenate([cells[1:], np.array(new)[None]])
                moved = np.concatenate([rows[:, a:], filler[:, window - a :]], axis=1)
                if a > window:
                    moved = filler
                if not after.has_stopped[b]:
                    np.testing.assert_array_equal(after.drafter.window[b], moved[:, :window])
                for token, grams in pools[b].items():
                    held = after.drafter.pool[b, token]
                    assert [tuple(g) for g in held.tolist() if g[0] >= 0] == grams
                checked += 1
        before, fillers = after, ahead
    assert checked > 20 and accepted > 0


def test_nothing_follows_an_end(toy_cfg, toy_params):
    toy_cfg = dataclasses.replace(toy_cfg, more_eos_ids=(5,))
    drafter = Lookahead(3, 4, num_candidates=2)
    method = SpeculativeMethod(drafter)
    state = init_state(toy_cfg, method, [[1, 7]], gen_len=4)
    context = context_of(toy_params, method, state)
    head = np.asarray(vocab.head(toy_params))
    ends = np.resize(toy_cfg.eos_ids, (1, drafter.num_extra))  # one after the other
    says_end = head[ends]

    @jax.jit
    def round_of(state):
        proposal = drafter.propose(toy_cfg, context, state)
        tree, before = proposal.tree, proposal.state
        nodes = jnp.zeros((1, drafter.num_nodes, toy_cfg.d_model))
        seen = Seen(
            tokens=tree.tokens[:, :1], hidden=nodes[:, :1], start=context.length - 1,
            count=jnp.ones(1, jnp.int32), tree_hidden=nodes, tree=tree,
            chosen=jnp.full((1, drafter.num_nodes), toy_cfg.eos_token_id), extra_hidden=says_end,
        )  # fmt: skip
        after = drafter.observe(toy_cfg, context, seen, before.replace(rounds=jnp.array([5])))
        return after, vocab.read(head, says_end).token

    after, said = jax.device_get(round_of(state.drafter))
    assert (said == ends).all()
    for end in toy_cfg.eos_ids:
        assert not (after.window == end).any()
        assert not (after.pool == end).any() and (after.pool >= 0).any()


@pytest.mark.exhaustive(every=4)
def test_candidates_share_what_they_begin_with(toy_cfg, toy_params):
    drafter = Lookahead(4, 2, num_candidates=4)
    method = SpeculativeMethod(drafter)
    state = init_state(toy_cfg, method, [[1, 7]], gen_len=4)
    grams = jnp.array([[2, 3, 4], [2, 3, 5], [6, 3, 4]], jnp.int32)
    held = state.drafter.replace(pool=state.drafter.pool.at[0, 7, 1:].set(grams))
    tree = drafter.propose(toy_cfg, context_of(toy_params, method, state), held).tree
    tokens, parents, valid = (np.asarray(x[0]) for x in (tree.tokens, tree.parents, tree.is_valid))
    assert valid[0] and len(tokens) == drafter.num_nodes == 13 and drafter.num_extra == 5
    ways = set()
    for v in np.flatnonzero(valid[1:]) + 1:
        way, u = [], v
        while u:
            way.insert(0, int(tokens[u]))
            assert valid[u] and parents[u] < u and int(tree.depths[0, u]) == _depth(parents, u)
            u = parents[u]
        ways.add(tuple(way))
    expected = [(2,), (2, 3), (2, 3, 4), (2, 3, 5), (6,), (6, 3), (6, 3, 4)]
    assert ways == set(expected) and valid[1:].sum() == len(expected)


def _depth(parents, v):
    return 0 if v == 0 else 1 + _depth(parents, parents[v])


@pytest.mark.exhaustive
def test_the_window_changes_no_law(toy_cfg, toy_params):
    """Card: what is drawn at the root is drawn from the law it has without a window."""
    prompts = random_prompts(toy_cfg, 4, seed=2)
    sampling = Sampling(temperature=0.9)
    plain = run(toy_params, toy_cfg, SpeculativeMethod(sampling=sampling), prompts, gen_len=1)
    method = SpeculativeMethod(Lookahead(), sampling=sampling)
    ahead = run(toy_params, toy_cfg, method, prompts, gen_len=1)
    assert texts(plain, 4) == texts(ahead, 4)
    np.testing.assert_allclose(plain.log_prob, ahead.log_prob, atol=1e-5)


@pytest.mark.exhaustive
def test_repetition_is_found(toy_cfg, toy_params):
    """A text that goes round in circles takes fewer forwards than tokens."""
    cfg = dataclasses.replace(toy_cfg, eos_token_id=None)
    prompts = random_prompts(toy_cfg, 8)
    state = run(toy_params, cfg, SpeculativeMethod(Lookahead()), prompts, gen_len=40)
    assert np.asarray(state.num_forwards).mean() < 30


def test_sizes_that_make_no_sense_are_refused(toy_cfg):
    with pytest.raises(ValueError, match="ngram=2 must be at least 3"):
        SpeculativeMethod(Lookahead(ngram=2)).validate(toy_cfg)
