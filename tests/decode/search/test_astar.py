"""A*-decoding: pop orders by hand and by a textbook, the least drop of quality, and budgets."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import dlm
from decode.complete import choose, complete, stream_text, warm_up
from decode.search import astar
from decode.search.astar import AStar, Found, State, best_first
from decode.search.planner import Continuation, Writer, root_key
from decode.search.scorers import Partial, SelfConfidence, ValueHead, Verifier
from decode.speculative.loop import SpeculativeMethod
from dlm import rope
from dlm.tasks import countdown
from tests.lib.models import hidden_of
from tests.lib.untrained import byte_lm


class World:
    """A tree that is known: node -> (r, children, is_goal). Nodes are tuples of numbers."""

    def __init__(self, nodes):
        self.nodes = nodes
        self.scored = []

    def expand(self, states):
        return [
            [
                State(child, np.zeros(2), start=len(s.tokens), is_goal=self.nodes[child][2])
                for child in self.nodes[s.tokens][1]
            ]
            for s in states
        ]

    def score(self, states):
        self.scored += [s.tokens for s in states]
        return [self.nodes[s.tokens][0] for s in states]

    def search(self, **options):
        root = State((), np.zeros(2))
        return best_first(root, self.expand, self.score, AStar(max_expansions=1000, **options))


def random_world(seed, depth=4):
    rng = np.random.default_rng(seed)
    nodes = {}

    def add(node):
        leaf = len(node) == depth or (len(node) > 1 and rng.random() < 0.2)
        count = 0 if leaf else int(rng.integers(1, 4))
        children = [(*node, i) for i in range(count)]
        nodes[node] = (
            float(rng.integers(1, 8)) / 8,
            children,
            leaf and rng.random() < 0.6,
        )
        for child in children:
            add(child)

    add(())
    return World(nodes)


def textbook(world, path_cost, num_goals):
    """The states in the order in which they are taken out, and f of all that were seen."""
    h = lambda n: 1 - world.nodes[n][0]
    g, seen = {(): 0.0}, [()]
    waiting, popped, goals = [()], [], []
    while waiting and len(goals) < num_goals:
        key = lambda n: (g[n] + h(n), -len(n), seen.index(n))
        best = min(waiting, key=key)
        waiting.remove(best)
        popped.append(best)
        if world.nodes[best][2]:
            goals.append(best)
            continue
        for child in world.nodes[best][1]:
            drop = h(child) - h(best)
            g[child] = g[best] + max(0, -drop if path_cost == "consistent" else drop)
            waiting.append(child)
            seen.append(child)
    return popped, {n: g[n] + h(n) for n in seen}


def test_the_order_of_a_tree_by_hand():
    """f = 0.5 + drops. A drop is never made good: (0, 0) is better than (1, 0), with equal r."""
    world = World({
        (): (0.5, [(0,), (1,), (2,)], False),
        (0,): (0.9, [(0, 0), (0, 1)], False),  # no drop: f = 0.5
        (1,): (0.4, [(1, 0)], False),  # 0.6
        (2,): (0.3, [], True),  # 0.7, a goal
        (0, 0): (0.8, [], True),  # 0.6, a goal, and deeper than (1,)
        (0, 1): (0.2, [], False),  # 1.2
        (1, 0): (0.8, [], True),  # 0.6, a goal that comes behind (1,)
    })  # fmt: skip
    found = world.search(num_goals=3)
    order = [found.states[i].tokens for i in found.popped]
    assert order == [(), (0,), (0, 0), (1,), (1, 0), (2,)]
    assert [round(s.f, 6) for s in found.goals] == [0.6, 0.6, 0.7]
    assert [s.tokens for s in found.goals] == [(0, 0), (1, 0), (2,)]
    assert found.num_expansions == 3 and found.num_scored == 7 == len(set(world.scored))
    drops = world.search(path_cost="drops")
    values = {s.tokens: round(s.f, 6) for s in drops.states}
    assert values[(0,)] == 0.1 and values[(0, 0)] == 0.3  # f has fallen
    assert [s.tokens for s in drops.goals] == [(0, 0)]


@pytest.mark.parametrize("path_cost", ["consistent", "drops"])
@pytest.mark.parametrize("num_goals", [1, 3])
def test_pops_are_those_of_the_textbook(path_cost, num_goals):
    for seed in range(40):
        world = random_world(seed)
        found = world.search(path_cost=path_cost, num_goals=num_goals)
        popped, f = textbook(world, path_cost, num_goals)
        assert [found.states[i].tokens for i in found.popped] == popped
        for state in found.states:
            assert state.f == pytest.approx(f[state.tokens])


def test_the_goal_has_the_least_drop_and_f_never_falls():
    """Against all goals there are; f is what the module says."""
    num_found = 0
    for seed in range(60):
        world = random_world(seed)
        h = {node: 1 - r for node, (r, _, _) in world.nodes.items()}

        def f(node, h=h):
            way = [node[:n] for n in range(len(node) + 1)]
            return h[()] + sum(max(0, h[b] - h[a]) for a, b in itertools.pairwise(way))

        found = world.search()
        for state in found.states:
            assert state.f == pytest.approx(f(state.tokens))
            if state.parent >= 0:
                assert state.f >= found.states[state.parent].f - 1e-12
        goals = [node for node, (_, _, is_goal) in world.nodes.items() if is_goal]
        assert bool(goals) == bool(found.goals)
        if goals:
            num_found += 1
            assert found.goals[0].f == pytest.approx(min(map(f, goals)))
    assert num_found > 30


def test_equal_texts_are_one_state():
    """(1, 2) is reached in one step and in two; the cheaper way counts, and it is scored once."""
    world = World({
        (): (0.9, [(1,), (1, 2), (1, 2)], False),
        (1,): (0.9, [(1, 2)], False),
        (1, 2): (0.2, [(1, 2, 3)], False),
        (1, 2, 3): (0.2, [], True),
    })  # fmt: skip
    found = world.search()
    assert world.scored == [(), (1,), (1, 2), (1, 2, 3)]
    assert len(found.states) == 4 and found.num_tokens == 1 + 2 + 2 + 1 + 1
    costly = World(world.nodes | {(1,): (0.95, [(1, 2)], False), (): (0.1, [(1,), (1, 2)], False)})
    state = next(s for s in costly.search().states if s.tokens == (1, 2))
    assert state.parent == 0 and state.g == pytest.approx(0.1)  # and not 0.85


def test_what_finishes_the_best_state_is_counted(monkeypatch):
    """Two tokens behind one, where no goal was found."""

    class Greedy:
        num_tokens = num_forwards = 2

        def __init__(self, *asked): ...

        def go_on(self, *asked, **options):
            none = np.zeros((2, 0))
            return [[Continuation(np.array([5, 6]), np.zeros(2), None, False, none, none)]]

    monkeypatch.setattr(astar, "Writer", Greedy)
    found, writer = Found([State((4,), None, np.zeros(1))], num_tokens=1), Greedy()
    state = AStar()._finish(None, [3], found, writer, 16, 8, 8)
    assert state.tokens == (4, 5, 6)
    assert (found.num_tokens, writer.num_forwards) == (3, 4)


def test_a_constant_scorer_goes_deep_first():
    nodes = {}
    for node in itertools.chain.from_iterable(
        itertools.product((0, 1), repeat=n) for n in range(4)
    ):
        nodes[node] = (0.5, [] if len(node) == 3 else [(*node, 0), (*node, 1)], len(node) == 3)
    found = World(nodes).search()
    assert [len(found.states[i].tokens) for i in found.popped] == [0, 1, 2, 3]


def test_budgets_are_exceeded_by_one_expansion_at_most():
    for seed in range(20):
        for name in ("tokens", "scored"):
            world = random_world(seed, depth=6)
            found = world.search(num_goals=9, **{f"max_{name}": 6})
            assert getattr(found, f"num_{name}") < 6 + 3  # at most three children
        world = random_world(seed, depth=6)
        for width in (1, 3):
            method = AStar(max_expansions=4, num_parents=width, num_goals=9)
            done = best_first(State((), np.zeros(2)), world.expand, world.score, method)
            assert done.num_expansions <= 4
            assert done.num_scored == len(done.states) and len(done.open) == len(set(done.open))
    few = random_world(3, depth=6).search(max_open=2, num_goals=9)
    assert len(few.open) <= 2


def test_scores_outside_of_their_range_are_refused():
    world = World({(): (1.5, [], False)})
    with pytest.raises(ValueError, match=r"scorer gave r=1.5, which must be in \[0, 1\]"):
        world.search()


# ---- Models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    return byte_lm()


@pytest.fixture(scope="module")
def mark(lm):
    """A byte that comes up in drawn texts now and then: it may end steps."""
    drawn = complete(lm, "ab", gen_len=60, temperature=0.8, seed=5)
    values, counts = np.unique(drawn.tokens[drawn.tokens < 128], return_counts=True)
    return chr(values[np.argmax(counts)])


def test_with_one_sample_it_is_plain_sampling(lm, mark):
    """Token for token, though it is drawn in steps, each behind a prefix that is read anew."""
    method = AStar(num_samples=1, delimiter=mark, step_len=9, max_expansions=60)
    plain = complete(lm, "ab", gen_len=24, temperature=0.8, seed=5)
    answer = complete(lm, "ab", gen_len=24, method=method, seed=5)
    assert answer.tokens.tolist() == plain.tokens.tolist()
    np.testing.assert_allclose(answer.log_prob, plain.log_prob, atol=1e-4)
    nodes = answer.explored.nodes
    assert [node.parent for node in nodes] == list(range(-1, len(nodes) - 1))
    assert len(nodes) > 3 and all(mark not in node.text[:-1] for node in nodes)
    assert "".join(node.text for node in nodes) == answer.text
    assert {node.fate for node in nodes} == {"won"} and answer.explored.num_tokens == 24


def won(nodes):
    """Numbers of the nodes of the best text, each behind the one before."""
    found = [i for i, node in enumerate(nodes) if node.fate == "won"]
    assert [nodes[i].parent for i in found] == [-1, *found[:-1]]
    return found


def test_thousands_of_delimiters_are_one_argument(lm):
    """A program with an argument for each takes minutes to compile."""
    writer = Writer(lm, SpeculativeMethod(stop_ids=tuple(range(3, 250))), [1], 64)
    assert len(jax.tree.leaves(writer.method)) < 20
    found = choose(lm, {"stop_ids": range(3, 250)})
    assert len(jax.tree.leaves(found)) < 20 and found.stop_ids.tolist() == [*range(3, 250)]


def test_a_prompt_is_read_once(lm):
    """What stands behind it is read, and the text is that of the whole; else it is another one."""
    prompt, behind = lm.tokenizer.encode("the cat sat"), lm.tokenizer.encode(" on")
    writer = Writer(lm, SpeculativeMethod(), prompt, 256)
    asks = lambda: writer.go_on(
        [[*prompt, *behind], prompt], [12, 9], [root_key(0)] * 2, times=1, rows=3, G=16
    )
    right = complete(lm, [[*prompt, *behind], prompt], gen_len=[12, 9])
    for (one,), answer in zip(asks(), right, strict=True):
        assert one.tokens.tolist() == answer.canvas.tolist()
        np.testing.assert_allclose(one.log_prob, answer.log_prob, atol=1e-5)
    found = [one.tokens.tolist() for (one,) in asks()]
    writer._prompt = writer._prompt.replace(cache=jax.tree.map(np.zeros_like, writer._prompt.cache))
    assert [one.tokens.tolist() for (one,) in asks()] != found


@pytest.mark.exhaustive(every=4)
def test_a_prompt_whose_angles_depend_on_the_text_is_read_again(lm):
    """Texts of at most 24 tokens have other keys than longer ones, for which it was read."""
    scaled = rope.Dynamic(factor=8.0, original_max_seq_len=24)
    lm = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, rope_scaling=scaled))
    prompt = lm.tokenizer.encode("the cat sat")
    writer = Writer(lm, SpeculativeMethod(), prompt, 256)
    ((one,),) = writer.go_on([prompt], [8], [root_key(0)], times=1, rows=1, G=16)
    right = complete(lm, prompt, gen_len=8)
    np.testing.assert_allclose(one.log_prob, right.log_prob, atol=1e-5)


@pytest.mark.exhaustive
def test_a_search_with_a_verifier(lm, mark):
    """Of all that was drawn the best is given back; what is counted is what was drawn."""
    wanted = lambda prompt, text, is_whole: 1 / (1 + sum(map(ord, text)) % 7)
    method = AStar(
        scorer=Verifier(wanted), num_samples=3, delimiter=mark, step_len=4, max_expansions=6,
        num_parents=2,
    )  # fmt: skip
    answers = complete(lm, ["ab", "c"], gen_len=8, method=method, seed=1)
    for answer in answers:
        explored = answer.explored
        assert explored.num_expansions <= 6 and explored.num_scored == 1 + len(explored.nodes)
        assert explored.nodes[won(explored.nodes)[-1]].score == pytest.approx(answer.score)
        assert len(answer.tokens) <= 8
    alone = complete(lm, "ab", gen_len=8, method=method, seed=1)
    assert answers[0].tokens.tolist() == alone.tokens.tolist()


def test_scorers(lm):
    def partial(ids, log_prob=(), text=""):
        return Partial(tuple(ids), "15,44,79,50\n", text, np.array(log_prob, np.float32), False)

    said = SelfConfidence().score(lm, [partial([1]), partial([1], [-1.0, -3.0])])
    assert said == [1.0, pytest.approx(np.exp(-2.0))]
    verifier = Verifier(countdown.progress)
    assert verifier.score(lm, [partial([1], text="44-15=29,"), partial([1], text="44-15=2,")]) == [
        1,
        0,
    ]
    weight = np.random.default_rng(0).normal(size=lm.cfg.d_model).astype(np.float32)
    texts = [[1, 2, 3], [4], list(range(30)), [5, 6], [7, 8]]
    scores = ValueHead(lambda states: states @ weight, num_rows=4).score(
        lm, list(map(partial, texts))
    )
    logits = [hidden_of(lm.params, lm.cfg, text)[-1] @ weight for text in texts]
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-np.array(logits))), atol=1e-5)


def test_bad_options_are_refused(lm):
    for make, message in (
        (lambda: AStar(num_samples=0), "num_samples=0 must be at least 1"),
        (lambda: AStar(max_tokens=0), "max_tokens=0 must be at least 1"),
        (lambda: AStar(path_cost="x"), "path_cost='x' must be 'consistent' or 'drops'"),
        (lambda: AStar(delimiter=""), "delimiter='' must be some text"),
        (lambda: AStar(delimiter=5), "delimiter=5 must be some text"),
        (lambda: AStar(num_samples=2.5), "num_samples=2.5 must be a whole number"),
        (lambda: AStar(scorer=len), "must be of class StepScorer"),
        (
            lambda: complete(lm, "a", gen_len=4, method=AStar(sampling=0.8)),
            "sampling=0.8 must be of class Sampling",
        ),
        (
            lambda: complete(lm, "a", gen_len=4, method="a_star", stop_ids=[9999]),
            "stop_ids has 9999, not in",
        ),
        (lambda: ValueHead(len, num_rows=0), "num_rows=0 must be at least 1"),
        (lambda: complete(lm, "a", method="a_star", num_return=2), "num_return=2 must be in"),
        (lambda: complete(lm, "a", method="a_star", stop="x"), "looks for no strings"),
        (lambda: complete(lm, "a", method="a_star", batch_size=2), "batch_size=2 must be None"),
        (lambda: complete(lm, "", gen_len=4, method="a_star"), "prompt 0 is empty"),
        (lambda: complete(lm, "a", method="a_star", gen_len=999), "more than the model's max_seq"),
        (lambda: complete(lm, "a", method="a_star", top_logprobs=1), "must be left out with AStar"),
        (lambda: next(stream_text(lm, "a", method="a_star")), "knows its text at the end only"),
        (lambda: warm_up(lm, "a", method="a_star"), "decides on the host what it needs"),
        (
            lambda: complete(dlm.LanguageModel(lm.params, lm.cfg), [1], gen_len=4, method="a_star"),
            "the checkpoint has no tokenizer",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()
