"""PG-TD: selections by hand, an oracle in plain Python, caches that change nothing, programs."""

import math

import numpy as np
import pytest

from decode.complete import complete
from decode.search.pg_td import PGTD
from decode.search.plan import Plan, Run
from decode.search.rewards import ProgramTests
from tests.lib.untrained import byte_lm

END = 3  # a token


class Toy:
    """A model of texts of at most four of four tokens, by a table."""

    def __init__(self, seed, k=3, sharp=1.0):
        self.rng, self.k, self.calls = np.random.default_rng(seed), k, []
        self.laws, self.seed, self.sharp = {}, seed, sharp

    def law(self, prefix):
        if prefix not in self.laws:
            rng = np.random.default_rng([self.seed, *prefix, len(prefix)])
            p = rng.dirichlet(np.full(4, self.sharp))
            self.laws[prefix] = np.log(p)
        return self.laws[prefix]

    def top(self, prefix):
        best = np.argsort(-self.law(prefix), kind="stable")[: self.k]
        return tuple(best.tolist()), tuple(self.law(prefix)[best].tolist())

    def complete(self, prefixes):
        runs = []
        for prefix in prefixes:
            self.calls.append(prefix)
            text, log_prob, top = prefix, [], []
            while not is_terminal(text):
                top.append(self.top(text))
                text = (*text, top[-1][0][0])
                log_prob.append(top[-1][1][0])
            runs.append(Run(text[len(prefix) :], tuple(log_prob), tuple(top)))
        return runs


class Coin(Toy):
    """0.6 and 0.4, whatever stands before."""

    def law(self, prefix):
        return np.log([0.6, 0.4, 1e-12, 1e-12])


def is_terminal(text):
    return bool(text) and (text[-1] == END or len(text) >= 4)


def rewards(seed):
    """A reward of each text, not 1; and what was asked for."""
    asked = []

    def reward(text):
        asked.append(text)
        return float(np.random.default_rng([seed, *text, len(text)]).integers(0, 9)) / 10

    return reward, asked


def plan_of(seed, toy=None, **options):
    reward, asked = rewards(seed)
    toy = toy or Toy(seed)
    plan = Plan(PGTD(reward=None, **options), toy, reward, is_terminal)
    plan.run()
    return plan, toy, asked


def by_hand(seed, rollouts, *, c=4.0, base=10.0, policy="var_p_uct", mode="best"):
    """Returns, in order, as the card says: dictionaries by prefix, and no caches."""
    toy, (reward, _) = Toy(seed), rewards(seed)
    visits, returns, found = {(): 1}, {}, []
    for _ in range(rollouts):
        node, way = (), []
        while node in visits and not is_terminal(node):
            tokens, lp = toy.top(node)
            p = np.exp(lp) / np.exp(lp).sum()
            values = []
            for token, prior in zip(tokens, p, strict=True):
                r = returns.get((node, token), [])
                q = (max(r) if mode == "best" else sum(r) / len(r)) if r else 0
                spread = math.sqrt(math.log(visits[node]))
                if policy == "uct":
                    values.append(q + c * spread / math.sqrt(len(r)) if r else math.inf)
                else:
                    grown = (
                        math.log((visits[node] + base + 1) / base) if policy == "var_p_uct" else 0
                    )
                    values.append(q + (c + grown) * prior * spread / (1 + len(r)))
            token = tokens[int(np.argmax(values))]
            way.append((node, token))
            node = (*node, token)
        text = node
        while not is_terminal(text):
            text = (*text, toy.top(text)[0][0])
        found.append(reward(text))
        visits.setdefault(node, 1)
        for action in way:
            returns.setdefault(action, []).append(found[-1])
        for prefix in {prefix for prefix, _ in way} | {node}:
            visits[prefix] += 1
    return found, visits, returns


def visits_of(plan):
    found, todo = {}, [plan.root]
    while todo:
        node = todo.pop()
        found[node.prefix] = node.visits
        todo += [a.child for a in node.actions or () if a.child is not None]
    return found


# ---- By hand ------------------------------------------------------------------------------------


def test_two_levels_by_hand():
    """Two tokens of equal rewards but one, so that the way can be followed with a pencil.

    P = 0.6, 0.4 everywhere. Rollout 1: ln 1 = 0, all are equal: the likelier, 0. Rollout 2: at the
    root, visits 2, c = 4 + ln 1.3 = 4.262, sqrt(ln 2) = 0.833: action 0 has 0.2 + 4.262 0.6 0.833
    / 2 = 1.264, action 1 0 + 4.262 0.4 0.833 = 1.419: 1. Rollout 3: visits 3, c = 4.336, sqrt(ln 3)
    = 1.048: action 0 has 0.2 + 1.363 = 1.563, action 1 0.9 + 0.909 = 1.809: 1 again, and there,
    visits 2, the likelier again; its text was rewarded before.
    """

    reward = lambda text: 0.9 if text[0] == 1 else 0.2
    plan = Plan(
        PGTD(reward=None, num_children=2, num_rollouts=3), Coin(0, k=2), reward, is_terminal
    )
    plan.run()
    first, second = plan.root.actions
    assert (first.prior, second.prior) == (pytest.approx(0.6), pytest.approx(0.4))
    assert (first.returns, second.returns) == ([0.2], [0.9, 0.9])
    assert second.child.actions[0].returns == [0.9] and not second.child.actions[1].returns
    assert list(plan.rewarded) == [(0, 0, 0, 0), (1, 0, 0, 0)]
    assert visits_of(plan) == {(): 4, (0,): 2, (1,): 3, (1, 0): 2}


@pytest.mark.parametrize("policy", ["var_p_uct", "p_uct", "uct"])
@pytest.mark.parametrize("mode", ["best", "sample"])
def test_plans_are_those_of_plain_python(policy, mode):
    for seed in range(20):
        plan, _, _ = plan_of(seed, num_rollouts=25, policy=policy, mode=mode)
        found, visits, returns = by_hand(seed, 25, policy=policy, mode=mode)
        assert visits_of(plan) == visits
        every, todo = {}, [plan.root]
        while todo:
            node = todo.pop()
            for action in node.actions or ():
                if action.returns:
                    every[node.prefix, action.token] = action.returns
                    todo.append(action.child)
        assert every == returns
        assert plan.best()[0][1].reward == max(found)


# ---- The ends of its settings -------------------------------------------------------------------


def test_one_rollout_gives_the_greedy_text():
    for seed in range(10):
        plan, toy, _ = plan_of(seed, num_rollouts=1)
        assert [text for text, _ in plan.best()] == [toy.complete([()])[0].tokens]


def test_without_exploration_the_best_return_is_followed():
    for seed in range(10):
        plan, _, _ = plan_of(seed, num_rollouts=30, exploration=0.0, base=1e9)
        node = plan.root
        while node.actions and any(action.returns for action in node.actions):
            last = max(node.actions, key=lambda action: len(action.returns))
            assert max(last.returns) == max(max(a.returns, default=0) for a in node.actions)
            node = last.child


def test_with_much_exploration_visits_are_as_priors():
    for seed in range(5):
        plan, _, _ = plan_of(seed, toy=Toy(seed, sharp=5.0), num_rollouts=300, exploration=1e6)
        counts = np.array([len(action.returns) for action in plan.root.actions])
        priors = np.array([action.prior for action in plan.root.actions])
        np.testing.assert_allclose((counts + 1) / (counts + 1).sum(), priors, atol=0.01)


def test_it_ends_with_a_reward_of_one_or_without_calls():
    for seed in range(5):
        toy = Toy(seed)
        plan = Plan(
            PGTD(reward=None, num_rollouts=500), toy, lambda t: float(t[:2] == (1, 1)), is_terminal
        )
        plan.run()
        assert (plan.best()[0][1].reward == 1) == (plan.num_rollouts < 500)
        plan, toy, _ = plan_of(seed, num_rollouts=500, max_calls=3)
        assert len(toy.calls) == plan.num_calls == 3
        plan, toy, _ = plan_of(seed, num_rollouts=500, max_calls=1)
        assert len(toy.calls) == plan.num_calls == 1 == len(plan.best())


# ---- Caches -------------------------------------------------------------------------------------


def test_caches_change_nothing_and_no_text_is_rewarded_twice():
    saved = 0
    for seed in range(20):
        ours, toy, asked = plan_of(seed, num_rollouts=30)
        theirs, other, _ = plan_of(seed, num_rollouts=30, is_cached=False)
        assert list(ours.rewarded.items()) == list(theirs.rewarded.items())
        assert visits_of(ours) == visits_of(theirs)
        assert len(asked) == len(set(asked)) == len(ours.rewarded)
        saved += len(other.calls) - len(toy.calls)
    assert saved > 50


def test_more_rollouts_are_never_worse_and_begin_alike():
    for seed in range(10):
        best, before = -1.0, []
        for num in (1, 3, 9, 27):
            plan, _, asked = plan_of(seed, num_rollouts=num)
            assert asked[: len(before)] == before
            assert plan.best()[0][1].reward >= best
            best, before = plan.best()[0][1].reward, asked


@pytest.mark.parametrize("num_leaves", [2, 5])
def test_several_leaves_in_a_round(num_leaves):
    """As many rollouts; leaves of a round are different ones, and nothing is left pending."""
    method = PGTD(reward=None, num_children=2, num_rollouts=2, num_leaves=num_leaves)
    plan = Plan(method, Coin(0, k=2), lambda text: 0.0, is_terminal)
    plan.run()
    assert [len(action.returns) for action in plan.root.actions] == [1, 1]
    for seed in range(10):
        plan, _, asked = plan_of(seed, num_rollouts=21, num_leaves=num_leaves)
        assert plan.num_rollouts == 21 == plan.root.visits - 1 and len(asked) == len(set(asked))
        todo = [plan.root]
        while todo:
            node = todo.pop()
            assert node.pending == 0
            todo += [a.child for a in node.actions or () if a.child is not None and not a.pending]


# ---- Models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    return byte_lm()


def wanted(prompt, text):
    """A reward that is not 1."""
    return (sum(map(ord, text)) % 97) / 100


@pytest.mark.exhaustive(every=4)
def test_a_plan_with_a_model(lm):
    greedy = complete(lm, "ab", gen_len=8)
    one = complete(lm, "ab", gen_len=8, method=PGTD(reward=wanted, num_rollouts=1))
    assert one.tokens.tolist() == greedy.tokens.tolist()
    np.testing.assert_allclose(one.log_prob, greedy.log_prob, atol=1e-4)
    assert one.score == wanted("ab", one.text) and one.explored.num_expansions == 1
    method = PGTD(reward=wanted, num_rollouts=12, num_return=3)
    best = complete(lm, "ab", gen_len=8, method=method, num_return=3)
    scores = [answer.score for answer in (best, *best.others)]
    assert scores == sorted(scores, reverse=True) and scores[0] >= one.score
    assert best.score == wanted("ab", best.text)
    nodes = best.explored.nodes
    way = [i for i, node in enumerate(nodes) if node.fate == "won"]
    assert [nodes[i].parent for i in way] == [-1, *way[:-1]]
    assert best.text.startswith("".join(nodes[i].text for i in way))
    assert {nodes[i].score for i in way} == {best.score} and 1 < len(nodes) <= 12
    assert sum(node.parts["n"] for node in nodes if node.parent < 0) == 12
    off = complete(lm, "ab", gen_len=8, method=method.replace(is_cached=False), num_return=3)
    assert off.tokens.tolist() == best.tokens.tolist()
    assert off.explored.num_scored == best.explored.num_scored
    assert off.explored.num_expansions > best.explored.num_expansions


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [dict(num_beams=2), dict(mode="sample"), dict(num_leaves=3)])
def test_other_completions(lm, options):
    method = PGTD(reward=wanted, num_rollouts=6, **options)
    answer = complete(lm, ["ab", "xyz"], gen_len=6, method=method)[1]
    assert answer.score == wanted("xyz", answer.text) and len(answer.canvas) == 6
    again = complete(lm, "xyz", gen_len=6, method=method, seed=1)
    assert again.tokens.tolist() == answer.tokens.tolist()


def test_programs_are_rewarded_in_the_sandbox():
    reward = ProgramTests(("assert add(1, 2) == 3", "assert add(1, 1) == 3"))
    assert reward("def add(a, b):\n", "    return a + b\n") == 0.5
    assert ProgramTests(("add(1, 2)",))("def add(a, b):\n", "    return (\n") == 0.0
    assert ProgramTests.public(["a", "b", "c", "d", "e"]).tests == ("a", "b")
    assert ProgramTests.public(["a"]).tests == ("a",)


def test_bad_options_are_refused(lm):
    for options, message in (
        (dict(num_children=0), "num_children=0 must be at least 1"),
        (dict(exploration=-1.0), "exploration=-1 must be finite and at least 0"),
        (dict(exploration=math.inf), "exploration=inf must be finite and at least 0"),
        (dict(num_rollouts=2.5), "num_rollouts=2.5 must be a whole number"),
        (dict(base=0.0), "base=0 must be above 0"),
        (dict(policy="x"), "policy='x' must be 'var_p_uct', 'p_uct' or 'uct'"),
        (dict(mode="x"), "mode='x' must be 'best' or 'sample'"),
        (dict(mode="sample", num_beams=2), "num_beams=2 must be 1 with mode='sample'"),
    ):
        with pytest.raises(ValueError, match=message):
            PGTD(reward=wanted, **options)
    with pytest.raises(ValueError, match="num_children=999 must be at most vocab_size"):
        complete(lm, "a", gen_len=4, method=PGTD(reward=wanted, num_children=999))
    with pytest.raises(ValueError, match="reward=5 must be a function"):
        complete(lm, "a", gen_len=4, method=PGTD(reward=5))
    with pytest.raises(ValueError, match="temperature and filters must be left out"):
        complete(lm, "a", gen_len=4, method=PGTD(reward=wanted), temperature=1.0)
    with pytest.raises(ValueError, match="reward gave nan, which must be a number"):
        Plan(PGTD(reward=wanted), Toy(0), lambda text: math.nan, is_terminal).run()
    with pytest.raises(ValueError, match=r"tests=\(\) must have at least one"):
        ProgramTests(())
