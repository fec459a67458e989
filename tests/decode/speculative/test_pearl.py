"""PEARL: whoever drafts, and where, the text is the target's own; no number is used twice."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

import dlm
from decode.complete import complete
from decode.core.sampling import Sampling
from decode.core.streams import fold_in, uniforms
from decode.speculative import pearl
from decode.speculative.accept import AcceptanceRule, BlockVerification, SpeculativeSampling, Walk
from decode.speculative.contracts import Drafter, Proposal, spent
from decode.speculative.controller import Controller
from decode.speculative.drafters.draft_model import DraftModel, DraftModelTree
from decode.speculative.drafters.jacobi import Jacobi
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.loop import SpeculativeMethod
from decode.speculative.pearl import Pearl
from decode.speculative.tree import chain, from_paths
from dlm.params import param_shardings
from dlm.sharding import make_mesh
from tests.lib.drafters import Adversary
from tests.lib.models import markov, random_model
from tests.lib.paths import SHARED
from tests.lib.speculation import check_statistics, random_prompts, run, texts
from tests.lib.tiers import more

TRACES = SHARED / "goldens" / "pearl"
MANY = 20_000  # texts


def decoded(params, cfg, method, prompts, gen_len=12, **options):
    """The finished state."""
    state = pearl.prepare(params, cfg, method, prompts, gen_len=gen_len, chunk=8, **options)
    return pearl.decode(params, cfg, method, state)


def elsewhere(tree, mesh):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


@pytest.fixture(scope="module")
def away():
    """A mesh of one device, which is not the target's."""
    return make_mesh(devices=jax.devices()[1:2])


@pytest.fixture(scope="module")
def small(toy_cfg):
    """A draft model of one layer."""
    cfg = dataclasses.replace(toy_cfg, n_layers=1)
    return random_model(9, cfg), cfg


# ---- Greedy -----------------------------------------------------------------------------------


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(("seed", "g"), [(0, 3), *more((1, 1), (2, 2), (3, 5), (4, 8))])
def test_every_chain_writes_the_greedy_text(plain, toy_params, seed, g):
    """64 rows each: drafts that are never right, always right, do not exist, and in between."""
    cfg, prompts, expected, truth = plain
    rate = jnp.concatenate([jnp.zeros(8), jnp.ones(8), jnp.linspace(0.2, 0.99, 48)])
    truth = jnp.pad(jnp.asarray(truth), ((0, 0), (0, 2 * g)))
    method = Pearl(Adversary(truth, rate, shape=chain(g)))
    for rule in (method.acceptance, SpeculativeSampling(), *more_rules(seed)):
        state = decoded(toy_params, cfg, method.replace(acceptance=rule), prompts, seeds=seed)
        assert texts(state, 64) == expected
        check_statistics(state, g)
    assert (state.acceptance_histogram[:, g] == 0).all()  # at most g tokens per round


def more_rules(seed):
    return () if seed == 0 else (BlockVerification(),)


@struct.dataclass
class Scripted(Drafter):
    """Drafts the right token at some positions, and another one elsewhere.

    Attributes:
      truth: [B, S] int32. The text of each row, prompt included.
      is_right: [B, S] bool. Where.
    """

    reads_text = True
    truth: jax.Array
    is_right: jax.Array
    shape = chain(3)

    def propose(self, cfg, context, state):
        place = context.length[:, None] - 1 + jnp.arange(4)[None]
        take = lambda x: jnp.take_along_axis(x, place, axis=1, mode="clip")
        right = take(self.truth)
        tokens = jnp.where(take(self.is_right), right, (right + 1) % cfg.vocab_size)
        tokens = tokens.at[:, 0].set(context.root)
        return Proposal(self.shape.tree(tokens), spent(context, 3), state)


def rounds_by_hand(n, end, is_right, g):
    """Tokens of each round, as the card says."""
    written, pending = [], 0
    while n < end:
        for i in range(pending + 1):  # what is pending, and Y_1
            if not is_right[n + i]:
                written.append(i + 1)
                pending = 0
                break
        else:
            written.append(pending + 1)
            pending = g - 1
        n += written[-1]
    written[-1] -= n - end
    return written


def test_modes_change_as_the_card_says(plain, toy_params):
    cfg, prompts, expected, truth = plain
    truth = np.pad(truth, ((0, 0), (0, 8)))
    is_right = np.random.default_rng(0).random(truth.shape) < np.linspace(0.5, 1, 64)[:, None]
    method = Pearl(Scripted(jnp.asarray(truth), jnp.asarray(is_right)))
    state = decoded(toy_params, cfg, method, prompts)
    for b, (prompt, text) in enumerate(zip(prompts, expected, strict=True)):
        n = len(prompt)
        counts = rounds_by_hand(n, n + len(text), is_right[b], 3)
        steps = np.repeat(np.arange(len(counts)), counts)
        assert state.step_map[b, : len(text)].tolist() == steps.tolist()
        assert state.draft_forwards[b] == 3 * len(counts)


# ---- Two devices ------------------------------------------------------------------------------


@pytest.mark.exhaustive(every=4)
def test_on_two_devices_it_is_the_same(plain, toy_params, small, away):
    """Drafts and forwards are made where they should be; of a round the host waits for nothing."""
    cfg, prompts, expected, _ = plain
    method = Pearl(DraftModel(*small, num_drafts=3))
    here = decoded(toy_params, cfg, method, prompts)
    there = Pearl(elsewhere(method.drafter, away), mesh=away)
    first = pearl.prepare(toy_params, cfg, there, prompts, gen_len=12, chunk=8)
    held = first.cache.k, first.drafter.memory.cache.k
    assert [x.devices() for x in held] == [{jax.devices()[i]} for i in (0, 1)]
    second = pearl.step(toy_params, cfg, there, first)  # compiles
    assert all(x.is_deleted() for x in held)
    with jax.transfer_guard_device_to_host("disallow_explicit"):
        third = pearl.step(toy_params, cfg, there, second)
    assert third.drafter.tokens.devices() == {jax.devices()[1]}
    state = pearl.decode(toy_params, cfg, there, third)
    assert texts(state, 64) == expected == texts(here, 64)
    for name in ("num_forwards", "draft_forwards", "acceptance_histogram", "step_map"):
        np.testing.assert_array_equal(getattr(state, name), getattr(here, name))


def test_a_draft_model_makes_one_forward_per_draft(plain, toy_params):
    """The target itself, so that all drafts are right: 1 token, then g in every round."""
    cfg, prompts, expected, _ = plain
    state = decoded(toy_params, cfg, Pearl(DraftModel(toy_params, cfg, num_drafts=3)), prompts)
    assert texts(state, 64) == expected
    lengths = np.array([len(row) for row in expected])
    assert (np.asarray(state.num_forwards) == 1 + -(-(lengths - 1) // 3)).all()
    assert (np.asarray(state.draft_forwards) == 3 * np.asarray(state.num_forwards)).all()


@pytest.mark.parametrize("rows", [4, *more(None)])
@pytest.mark.parametrize("is_split", [False, *more(True)])
@pytest.mark.exhaustive(every=4)
def test_complete_on_meshes_and_with_rows_replaced(plain, toy_params, small, away, rows, is_split):
    cfg, prompts, _, _ = plain
    lm, mesh = dlm.LanguageModel(toy_params, cfg), None
    if is_split:
        mesh = make_mesh(data=2, devices=jax.devices()[2:4])
        params = jax.device_put(toy_params, param_shardings(cfg, mesh))
        lm = dataclasses.replace(lm, params=params, mesh=mesh)
    method = Pearl(elsewhere(DraftModel(*small, num_drafts=3), away), mesh=away)
    plainly = complete(dlm.LanguageModel(toy_params, cfg), prompts[:10], gen_len=9)
    answers = complete(lm, prompts[:10], gen_len=9, method=method, batch_size=rows)
    for ours, theirs in zip(answers, plainly, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.draft_forwards == 3 * ours.num_forwards


# ---- Rows and shapes --------------------------------------------------------------------------


@pytest.mark.exhaustive(every=4)
def test_a_row_alone_gives_the_same_and_numbers_compile_nothing(toy_cfg, toy_params, small):
    """Drawn drafts, tested; with `Match` the text is even that which is drawn without drafts."""
    drafter = DraftModel(*small, num_drafts=3, is_sampled=True)
    prompts, lengths = random_prompts(toy_cfg, 4, seed=3), [3, 12, 7, 9]
    shape = dict(prompt_len=14, canvas_len=12, batch_size=4)
    method = Pearl(drafter, SpeculativeSampling(), Sampling(0.8))
    run_it = lambda rows, method=method: decoded(
        toy_params, toy_cfg, method, [prompts[b] for b in rows],
        gen_len=[lengths[b] for b in rows], seeds=[5 + b for b in rows], **shape,
    )  # fmt: skip
    together = run_it(range(4))
    sizes = [f._cache_size() for f in (pearl.draft, pearl.judge, pearl.settle, pearl.follow)]
    for b in range(4):
        alone = run_it([b])
        assert texts(alone, 1)[0] == texts(together, 4)[b]
        for field in ("num_forwards", "draft_forwards", "acceptance_histogram"):
            assert getattr(alone, field)[0].tolist() == getattr(together, field)[b].tolist()
    run_it(range(3), method.replace(sampling=Sampling(1.1)))
    after = [f._cache_size() for f in (pearl.draft, pearl.judge, pearl.settle, pearl.follow)]
    assert after == sizes
    plainly = SpeculativeMethod(sampling=Sampling(0.8))
    expected = run(toy_params, toy_cfg, plainly, prompts, gen_len=lengths, seeds=5, **shape)
    matched = run_it(range(4), Pearl(drafter, sampling=Sampling(0.8)))
    assert texts(matched, 4) == texts(expected, 4)


# ---- Distribution -----------------------------------------------------------------------------


@struct.dataclass
class Numbers(AcceptanceRule):
    """`SpeculativeSampling` of chains with numbers that are given, as `verdict.key`: two
    [B, g + 1], of every node the one it is tested with and the one by which what is put in its
    place is drawn.

    Attributes:
      how: where they are from: only to have programs of their own.
    """

    needs_probs = True
    how: str = struct.field(pytree_node=False, default="")

    def walk(self, verdict, depth):
        tree, p, (u, r) = verdict.tree, verdict.probs, verdict.key
        rows, num = jnp.arange(len(p)), jnp.zeros(len(p), jnp.int32)
        going, left = jnp.ones(len(p), bool), p[:, 0]
        for v in range(1, depth + 1):
            token, exists = tree.tokens[:, v], tree.is_valid[:, v]
            ratio = p[rows, v - 1, token] / tree.probs[rows, v - 1, token]
            passes = going & exists & (u[:, v] <= ratio)
            rest = jnp.maximum(p[:, v - 1] - tree.probs[:, v - 1], 0)
            rest = jnp.where(exists[:, None], rest, p[:, v - 1])
            left = jnp.where((going & ~passes)[:, None], rest, left)
            going, num = passes, num + passes
        mass = jnp.cumsum(left, axis=1)
        where = r[rows, jnp.minimum(num + 1, depth)][:, None] * mass[:, -1:]
        path = jnp.minimum(jnp.arange(depth + 1)[None], num[:, None])
        return Walk(path, num, jnp.argmax(mass >= where, axis=1).astype(jnp.int32))


def numbers(state, how):
    """Of rounds, as the card has it ("fresh"), or as the published code has it ("reused")."""
    g = state.pending.shape[1] + 1
    place = state.length[:, None] + jnp.arange(-1, g)[None]  # that each node is a token of
    if how == "reused":
        place = place - (state.num_pending > 0)[:, None]
    again = state.num_forwards if how == "fresh" else 0 * state.num_forwards
    key = fold_in(fold_in(state.key, 99), again)
    one = lambda place: uniforms(fold_in(key, place), 2)
    both = jax.vmap(one, 1, 1)(place)
    return both[..., 0], both[..., 1]


@pytest.mark.parametrize(
    ("how", "num"), [("own", MANY), *more(("reused", MANY), ("fresh", MANY), ("own", 10 * MANY))]
)
def test_texts_follow_the_targets_law(monkeypatch, how, num):
    """Three tokens against all there are, of sharp laws; the published code's numbers fail."""
    V, G, rng = 3, 3, np.random.default_rng(1)
    p, q = (rng.dirichlet(np.full(V, 0.5), size=V) + 0.01 for _ in range(2))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    (params, cfg), draft = markov(p), markov(q)
    rule = SpeculativeSampling() if how == "own" else Numbers(how)
    if how != "own":
        give_numbers(monkeypatch, lambda state: numbers(state, how))
    method = Pearl(DraftModel(*draft, num_drafts=2, is_sampled=True), rule, Sampling(1.0))
    state = decoded(params, cfg, method, [[0]] * num, gen_len=G, seeds=7)
    tokens = np.asarray(state.tokens)[:, 1 : G + 1]
    counts = np.bincount(tokens @ V ** np.arange(G)[::-1], minlength=V**G)
    law = [p[0, a] * p[a, b] * p[b, c] for a, b, c in itertools.product(range(V), repeat=3)]
    expected = num * np.array(law)
    assert expected.min() > 5
    chi_square = ((counts - expected) ** 2 / expected).sum()  # 26 degrees of freedom
    assert chi_square < 63 if how != "reused" else chi_square > 200  # once in 15,000 times
    assert (np.asarray(state.num_forwards) < G).any()


def give_numbers(monkeypatch, of_state):
    """Has `Numbers` see those of a state."""
    judge = pearl.judge_tree

    def with_numbers(params, cfg, method, state, proposal):
        output, verdict, *rest = judge(params, cfg, method, state, proposal)
        return output, verdict.replace(key=of_state(state)), *rest

    monkeypatch.setattr(pearl, "judge_tree", with_numbers)


# ---- The published code -----------------------------------------------------------------------


@struct.dataclass
class ByTable(Drafter):
    """Draws by given numbers from a Markov table.

    Attributes:
      table: [V, V] float32.
      u: [n] float32. Of each position.
      num_drafts: static.
    """

    reads_text = True
    table: jax.Array
    u: jax.Array
    num_drafts: int = struct.field(pytree_node=False, default=3)

    @property
    def shape(self):
        return chain(self.num_drafts)

    def propose(self, cfg, context, state):
        tokens, laws = [context.root], []
        for i in range(self.num_drafts):
            law = self.table[tokens[-1]]
            mass, u = jnp.cumsum(law, axis=1), self.u[context.length + i]
            laws.append(law)
            tokens.append(jnp.argmax(mass >= u[:, None], axis=1).astype(jnp.int32))
        laws = jnp.stack([*laws, laws[-1]], axis=1)
        tree = self.shape.tree(jnp.stack(tokens, axis=1), probs=laws)
        return Proposal(tree, spent(context, self.num_drafts), state)


@pytest.mark.skipif(not TRACES.is_dir(), reason="the shared goldens are not here")
@pytest.mark.parametrize("case", [0, *more(1, 2)])
def test_the_published_code_with_its_numbers(monkeypatch, case):
    """Token for token, with the numbers that it uses twice."""
    said = json.loads((TRACES / "pearl.json").read_text())["cases"][case]
    arrays = np.load(TRACES / "pearl.npz")
    get = lambda name: jnp.asarray(arrays[f"{name}_{said['arrays']}"], jnp.float32)
    accept_u, resample_u = get("accept_u"), get("resample_u")

    def of_state(state):
        place = state.length[:, None] + jnp.arange(-1, said["gamma"])[None]
        place = place - (state.num_pending > 0)[:, None]
        return accept_u[place], resample_u[place]

    give_numbers(monkeypatch, of_state)
    params, cfg = markov(np.asarray(get("p"), np.float64))
    drafter = ByTable(get("q"), get("draft_u"), said["gamma"])
    method = Pearl(drafter, Numbers(f"published {case}"), Sampling(1.0))
    prompt = said["prompt"]
    state = pearl.prepare(params, cfg, method, [prompt], gen_len=58 - len(prompt))
    runs, run_len = [], 0
    while int(state.length[0] + state.num_pending[0]) - len(prompt) < said["new_tokens"]:
        before = int(state.length[0])
        state = pearl.step(params, cfg, method, state)
        num = int(state.length[0]) - before
        if int(state.num_pending[0]) or said["gamma"] == 1:
            run_len += num
        else:
            runs.append(run_len + num - 1)
            run_len = 0
    pending = state.pending[0, : int(state.num_pending[0])].tolist()
    assert state.tokens[0, : int(state.length[0])].tolist() + pending == said["tokens_with_pending"]
    assert int(state.num_forwards[0]) == said["target_forwards"]
    assert int(state.draft_forwards[0]) == said["draft_forwards"]
    assert runs == said["accepted_runs"]


# ---- Refusals ---------------------------------------------------------------------------------


def test_what_reads_the_target_cannot_draft_beside_it(toy_cfg, toy_params, small):
    pair = from_paths([[0], [1]])
    for method, message in (
        (Pearl(Jacobi()), "drafter=Jacobi needs more than the text that was judged last"),
        (Pearl(DraftModelTree(*small, shape=pair)), "drafter=DraftModelTree must draft chains"),
        (
            Pearl(PromptLookup(), controller=Controller(costs=jnp.ones(5))),
            "controller must be None",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pearl.prepare(toy_params, toy_cfg, method, [[1]], gen_len=4)
