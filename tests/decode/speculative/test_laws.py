"""The laws that every drafter and acceptance rule obeys: whoever is in the table is tried here.

What is written is what the target alone writes; a row of a batch gives what it gives alone, another
number compiles nothing, a run that was interrupted goes on as if it had not been, a round at a time
and rows spread over devices give what all rounds on one device give, and what a docstring rules out
is refused. What a drafter is for, its own tests say.
"""

import contextlib
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.loop import FOREVER
from decode.core.sampling import Sampling
from decode.speculative.components import (
    ACCEPTANCE_RULES,
    ADED,
    DRAFTERS,
    DraftModelBeam,
    DraftModelBest,
    DraftModelOpt,
    DraftModelTree,
    DynamicExit,
    Eagle,
    EagleBest,
    EagleOpt,
    Lookahead,
    NoDraft,
    TokenRecycling,
)
from decode.speculative.drafters.draft_model import DraftModel
from decode.speculative.loop import SpeculativeMethod, decode, init_state, prefill, stream
from decode.speculative.renewal import renew
from decode.speculative.state import context_of
from dlm.config import ModelConfig
from dlm.params import param_shardings
from dlm.sharding import make_mesh
from tests.lib.docs import check_refusals, check_wrong_kinds
from tests.lib.speculation import check_statistics, texts
from tests.lib.tiers import more, often

B, P, G = 16, 13, 12
REPORTED = (
    "tokens", "length", "step_map", "log_prob", "num_forwards", "draft_forwards",
    "acceptance_histogram",
)  # fmt: skip
# Forwards of a draft model per round of the example, where there is one; trees read what was kept
# in the next round.
COST = {
    "DraftModel": 5, "DraftModelTree": 5, "DraftModelBest": 4, "DraftModelBeam": 3,
    "Eagle": 2, "EagleBest": 3,
    "DFlash": 1, "DDTree": 1, "SelfSpeculation": 1, "Medusa": 0, "Hydra": 0, "NoDraft": 0,
    "Hybrid": None,
    "Swift": None,  # as far as it is sure
}  # fmt: skip
REMEMBER = (ADED, TokenRecycling, Lookahead, DynamicExit)  # more than the text
# Read in a round what was kept before.
LATE = (
    DraftModelTree, DraftModelBest, DraftModelOpt, DraftModelBeam, Eagle, EagleBest, EagleOpt,
)  # fmt: skip
FIRST = [(rule, DraftModel) for rule in ACCEPTANCE_RULES]
EVERY = {*itertools.product(ACCEPTANCE_RULES, DRAFTERS)}
PAIRS = [*often(*FIRST), *more(*sorted(EVERY - {*FIRST}, key=str))]
ALWAYS = (NoDraft, DraftModelTree, Eagle)
every_drafter = pytest.mark.parametrize(
    "kind", [*ALWAYS, *often(*(kind for kind in DRAFTERS if kind not in ALWAYS))]
)
some_drafters = pytest.mark.parametrize("kind", more(*DRAFTERS))


@pytest.fixture(scope="module")
def examples(plain, toy_params):
    """Of a drafter: its example for the target, made once."""
    made = {}

    def example(kind):
        if kind not in made:
            made[kind] = kind.example(plain[0], toy_params)
        return made[kind]

    return example


@pytest.fixture(scope="module")
def target(plain, toy_params):
    return Target(
        toy_params,
        plain[0],
        plain[1][:B],
        [row[: gen_len(b)] for b, row in enumerate(plain[2][:B])],
    )


def gen_len(b):
    """What is asked for in row b."""
    return G - b % 4


@dataclasses.dataclass(frozen=True)
class Target:
    """A model with prompts and its greedy texts."""

    params: dict
    cfg: ModelConfig
    prompts: list
    texts: list

    def begin(self, method, rows=range(B)):
        """Before the first round: some of the rows, each with the length and seed it always has.

        Prompts are read by a greedy method, whatever `method` is: that changes nothing.
        """
        reader = SpeculativeMethod(method.drafter)
        state = init_state(
            self.cfg, reader, [self.prompts[b] for b in rows], gen_len=list(map(gen_len, rows)),
            seeds=list(rows), prompt_len=P, canvas_len=G, batch_size=B, chunk=8,
        )  # fmt: skip
        return prefill(self.params, self.cfg, reader, state)

    def run(self, method, rows=range(B)):
        return self.go_on(method, self.begin(method, rows))

    def go_on(self, method, state, rounds=FOREVER):
        """Always with `max_rounds`, without which it is another program."""
        return decode(self.params, self.cfg, method, state, rounds)


def report(state, rows=range(B)):
    state = jax.device_get({name: getattr(state, name) for name in REPORTED})
    return {name: value[list(rows)] for name, value in state.items()}


def assert_same(a, b):
    for name in REPORTED:
        np.testing.assert_allclose(a[name], b[name], atol=2e-5, err_msg=name)


def other_numbers(part):
    """The same choice with other weights and thresholds."""
    is_real = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    scaled = lambda x: jnp.asarray(0.9 * np.asarray(x)) if is_real(x) else x
    return jax.tree.map(lambda x: 0.9 * x if isinstance(x, float) else scaled(x), part)


def check_rows_and_pieces(target, method):
    """Rows do not see each other; interrupted every two rounds is not interrupted."""
    whole = target.run(method)
    for rows in ([5], range(7, -1, -1), range(15, 7, -1)):  # alone; elsewhere, in other company
        assert_same(report(target.run(method, rows), range(len(rows))), report(whole, rows))
    state, calls = target.begin(method), 0
    while not state.has_stopped.all():
        state = jax.tree.map(jnp.array, jax.device_get(state))  # as if it had been on a disk
        state, calls = target.go_on(method, state, 2), calls + 1
        assert int(state.num_steps) == min(2 * calls, int(whole.num_steps))
    assert_same(report(state), report(whole))
    return whole


@every_drafter
def test_the_text_is_the_targets_own(target, examples, kind):
    """Token for token in every row, with any weights of a draft, all of them by one program."""
    method = SpeculativeMethod(examples(kind))
    before = decode._cache_size()
    state = check_rows_and_pieces(target, method)
    assert texts(state, B) == target.texts
    check_statistics(state, method.drafter.depth)
    cost = COST.get(kind.__name__, 0 if kind.points() else None)
    if cost is not None:
        first = kind in (DraftModelTree, DraftModelBest, DraftModelBeam)
        spent = cost * np.asarray(state.num_forwards) - first
        assert (np.asarray(state.draft_forwards) == spent).all()
    other = method.replace(drafter=other_numbers(method.drafter))
    assert texts(target.run(other), B) == target.texts
    assert decode._cache_size() == before + 1


@every_drafter
def test_a_text_that_begins_like_another(target, examples, kind):
    """What both share is not read again, and drafts are those of who reads all of it."""
    method = SpeculativeMethod(examples(kind))
    rows = [b for b in range(B) if 4 < len(target.prompts[b]) < 10]
    asked = dict(gen_len=[gen_len(b) for b in rows], seeds=rows, chunk=8)
    for most in (P - 4, 4):  # of one row all that it has written, or less
        state = target.go_on(method, target.begin(method, rows), 3)
        written, lengths = jax.device_get((state.tokens, state.length))
        n = min(most, *lengths[: len(rows)])
        prompts = [
            [*written[i, :n].tolist(), int(written[i, n]) ^ 1, 7, 3, 5][: n + 3 + i % 2]
            for i in range(len(rows))
        ]
        before = prefill._cache_size()
        scratch = init_state(
            target.cfg, method, prompts, **asked, prompt_len=P, canvas_len=G, batch_size=B
        )
        state = renew(target.cfg, method, state, prompts, num_kept=n, **asked)
        (num_read,) = set(np.asarray(state.num_read).tolist())
        lag = method.drafter.depth if kind in LATE else 0
        assert n - lag - 2 <= num_read <= n and num_read > 0
        kept, scratch = (prefill(target.params, target.cfg, method, s) for s in (state, scratch))
        assert prefill._cache_size() == before
        if kind not in REMEMBER:
            found = [trees(target.params, target.cfg, method, s) for s in (kept, scratch)]
            jax.tree.map(np.testing.assert_array_equal, *found)
        kept, scratch = (target.go_on(method, s) for s in (kept, scratch))
        assert texts(kept, len(rows)) == texts(scratch, len(rows))
        np.testing.assert_allclose(kept.log_prob, scratch.log_prob, atol=2e-5)


@functools.partial(jax.jit, static_argnames="cfg")
def trees(params, cfg, method, state):
    """What is proposed first."""
    tree = method.drafter.propose(cfg, context_of(params, method, state), state.drafter).tree
    rows = ~state.has_stopped[:, None]
    return [jnp.where(rows & tree.is_valid, x, -1) for x in (tree.tokens, tree.parents)]


@some_drafters
def test_round_by_round_is_all_rounds(target, examples, kind):
    method = SpeculativeMethod(examples(kind))
    for last in stream(target.params, target.cfg, method, target.begin(method)):
        found = report(last)
    assert_same(found, report(target.run(method)))


@some_drafters
def test_sharded_is_unsharded(target, examples, kind):
    method, mesh = SpeculativeMethod(examples(kind)), make_mesh(data=2, tensor=2, sequence=2)
    whole = report(target.run(method))
    params = jax.device_put(target.params, param_shardings(target.cfg, mesh))
    with jax.set_mesh(mesh):
        split = dataclasses.replace(target, params=params).run(method)
    assert_same(report(split), whole)


@pytest.mark.parametrize(("rule", "kind"), PAIRS)
def test_rules(target, examples, rule, kind):
    """As for drafters, where the text is drawn; and greedy, if the rule is lossless."""
    drafter = examples(kind)
    if "is_sampled" in {field.name for field in dataclasses.fields(drafter)}:
        with contextlib.suppress(ValueError):  # most probable trees cannot
            drawn = dataclasses.replace(drafter, is_sampled=True)
            drawn.validate(target.cfg)
            drafter = drawn
    method = SpeculativeMethod(drafter, rule(), Sampling(temperature=0.7))
    if reason := method.acceptance.refuse(method):
        with pytest.raises(ValueError, match=re.escape(reason)):
            method.validate(target.cfg)
        return
    before = decode._cache_size()
    check_rows_and_pieces(target, method)
    other = method.replace(
        acceptance=other_numbers(method.acceptance), sampling=Sampling(temperature=0.9)
    )
    target.run(other)
    assert decode._cache_size() == before + 1
    if rule.is_lossless:
        state = target.run(method.replace(sampling=Sampling(temperature=None)))
        assert texts(state, B) == target.texts
        check_statistics(state, drafter.depth)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_nonsense_of_drafters_is_refused(target, examples, kind):
    check_refusals(examples(kind), refuser(target.cfg, "drafter"), target.cfg)
    check_wrong_kinds(examples(kind), refuser(target.cfg, "drafter"))


@pytest.mark.parametrize(
    ("choice", "kind"),
    [("sampling", Sampling), *(("acceptance", rule) for rule in ACCEPTANCE_RULES)],
)
def test_nonsense_is_refused(toy_cfg, choice, kind):
    check_refusals(kind(), refuser(toy_cfg, choice), toy_cfg)
    check_wrong_kinds(kind(), refuser(toy_cfg, choice))


def refuser(cfg, choice):
    """What checks a method of which one choice is given."""
    return lambda part: init_state(
        cfg, SpeculativeMethod().replace(**{choice: part}), [[1]], gen_len=4
    )
