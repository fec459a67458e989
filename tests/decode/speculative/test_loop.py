"""Whatever is drafted, what is written is what the target alone would have written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm
from decode.core.sampling import Sampling
from decode.speculative.accept import (
    BlockVerification,
    Match,
    SpeculativeSampling,
    TraversalVerification,
    Typical,
)
from decode.speculative.drafters.draft_model import DraftModel, DraftModelBest, DraftModelTree
from decode.speculative.drafters.eagle import Eagle, EagleBest
from decode.speculative.drafters.jacobi import Jacobi
from decode.speculative.drafters.layer_skip import layer_skip
from decode.speculative.drafters.no_draft import NoDraft
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.drafters.suffix import Suffix
from decode.speculative.drafters.token_recycling import TokenRecycling
from decode.speculative.loop import SpeculativeMethod, decode, init_state, prefill, stream
from decode.speculative.tree import TreeShape, chain, from_paths
from dlm import vocab
from dlm.heads.eagle_1 import Eagle1Heads
from dlm.heads.eagle_3 import Eagle3Heads
from dlm.models import decoder
from dlm.params import init_params, param_shardings
from dlm.sharding import make_mesh
from dlm.window import Slots, Window
from tests.lib.drafters import Adversary
from tests.lib.paths import GOLDEN
from tests.lib.speculation import check_statistics, random_prompts, run, texts
from tests.lib.tiers import more, often

CAUSAL = ("llama_target", "llama_draft", "qwen2_small")
BUSHY = from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0, 0]])


# ---- Plain decoding ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CAUSAL[:1], *more(*CAUSAL[1:])])
def test_golden_logits(name):
    lm = dlm.load(GOLDEN / name)
    golden = np.load(GOLDEN / name / "logits.npz")
    tokens = jnp.asarray(golden["tokens"])
    window = Window.at(tokens, jnp.zeros(len(tokens), jnp.int32), is_causal=True)
    output = decoder.forward(lm.params, lm.cfg, window)
    np.testing.assert_allclose(
        vocab.logits(vocab.head(lm.params), output.hidden), golden["logits"], atol=1e-4
    )


@pytest.mark.parametrize("name", CAUSAL)
def test_golden_greedy(name):
    lm = dlm.load(GOLDEN / name)
    traces = json.loads((GOLDEN / name / "traces.json").read_text())
    (case,) = (case for case in traces["cases"] if case["method"] == "greedy")
    expected = [result["sequences"][0] for result in case["results"]]
    prompts = traces["prompts"]
    state = run(lm.params, lm.cfg, SpeculativeMethod(), prompts, gen_len=32)
    got = [p + t for p, t in zip(prompts, texts(state, len(prompts)), strict=True)]
    assert got == expected


def test_prompts_are_read_in_chunks_of_any_length(plain, toy_params):
    cfg, prompts, expected, _ = plain
    for chunk in (1, 3, 256):
        state = run(toy_params, cfg, SpeculativeMethod(), prompts, chunk=chunk)
        assert texts(state, 64) == expected


def test_the_cache_is_that_of_a_fresh_prefill(plain, toy_params):
    """KV-EQ: after rounds of a tree, keys and values of what was kept lie in order."""
    cfg, prompts, _, truth = plain
    drafter = Adversary(jnp.asarray(truth), jnp.full(64, 0.7), shape=BUSHY)
    method = SpeculativeMethod(drafter)
    first = prefill(toy_params, cfg, method, init_state(cfg, method, prompts, gen_len=12))
    length = first.tokens.shape[1]

    @jax.jit
    def read(tokens):
        zeros = jnp.zeros(64, jnp.int32)
        slots = Slots.append(dlm.cache.init_cache(cfg, 64, length), zeros)
        return decoder.forward(toy_params, cfg, Window.at(tokens, zeros, is_causal=True), slots)

    for state in stream(toy_params, cfg, method, first):
        fresh = read(state.tokens).cache
        is_kept = np.arange(length)[None] < np.asarray(state.length)[:, None] - 1
        is_kept &= ~np.asarray(state.has_stopped)[:, None]
        for got, expected in ((state.cache.k, fresh.k), (state.cache.v, fresh.v)):
            got, expected = (np.asarray(x)[..., :length, :] for x in (got, expected))
            difference = np.abs(got - expected).max(axis=(0, 2, 4))
            assert difference[is_kept].max(initial=0) < 1e-5


# ---- Losslessness, greedy ---------------------------------------------------------------------


def random_shape(seed):
    """Any tree, its nodes in any order that has parents first."""
    rng = np.random.default_rng(seed)
    size, parents, ranks = int(rng.integers(1, 12)), [], []
    for v in range(1, size):
        parents.append(int(rng.integers(0, v)))
        ranks.append(sum(p == parents[-1] for p in parents[:-1]))
    return TreeShape(tuple(parents), tuple(ranks))


@pytest.mark.parametrize("seed", [2, *more(0, 1, *range(3, 8))])
def test_every_tree_writes_the_greedy_text(plain, toy_params, seed):
    """64 rows each: drafts that are never right, always right, and anything in between."""
    cfg, prompts, expected, truth = plain
    shape = (
        [chain(1), chain(5), BUSHY][seed] if seed < 3 else random_shape(np.random.default_rng(seed))
    )
    rate = jnp.concatenate([jnp.zeros(8), jnp.ones(8), jnp.linspace(0.2, 0.9, 48)])
    drafter = Adversary(jnp.asarray(truth), rate, shape=shape)
    state = run(toy_params, cfg, SpeculativeMethod(drafter), prompts, seeds=seed)
    assert texts(state, 64) == expected
    check_statistics(state, shape.depth)
    rules = [SpeculativeSampling(), TraversalVerification()]
    for rule in (*rules, *[BlockVerification()] * shape.is_chain):
        sampled = SpeculativeMethod(drafter, rule, Sampling(temperature=None))
        assert texts(run(toy_params, cfg, sampled, prompts, seeds=seed), 64) == expected


def test_always_right_and_always_wrong(plain, toy_params):
    """The first takes ceil(n / (J + 1)) forwards, the second as many as without drafts."""
    cfg, prompts, expected, truth = plain
    lengths = np.array([len(row) for row in expected])
    wrong = Adversary(jnp.asarray(truth), jnp.zeros(64), low=24, high=30)
    state = run(toy_params, cfg, SpeculativeMethod(wrong), prompts)
    assert (np.asarray(state.num_forwards) == lengths).all()
    right = Adversary(jnp.asarray(truth), jnp.full(64, 1.1))
    state = run(toy_params, cfg, SpeculativeMethod(right), prompts)
    assert (np.asarray(state.num_forwards) >= -(-lengths // 4)).all()
    # Now and then the drafter leaves nodes out, so a forward more may be needed.
    assert np.asarray(state.num_forwards).sum() < 0.5 * lengths.sum()


def drafter_of(name, toy_cfg, toy_params):
    smaller = dataclasses.replace(toy_cfg, n_layers=1)
    small = lambda: jax.jit(init_params, static_argnums=1)(jax.random.key(5), smaller)

    def network(heads):
        return heads.network(toy_cfg, heads.fresh(jax.random.key(6), toy_cfg, toy_params))

    drafters = {
        "itself": lambda: DraftModel(toy_params, toy_cfg, num_drafts=3),
        "sampled": lambda: DraftModel(small(), smaller, num_drafts=3, is_sampled=True),
        "sampled tree": lambda: DraftModelTree(toy_params, toy_cfg, shape=BUSHY, is_sampled=True),
        "latest lookup": lambda: PromptLookup(num_drafts=4, latest=True),
        "recycling": lambda: TokenRecycling(shape=BUSHY),
        "suffix": lambda: Suffix(jnp.arange(30) % 7, num_drafts=5, factor=2.0),
        "layer skip": lambda: layer_skip(toy_params, toy_cfg, [0], num_drafts=3),
        "best tree": lambda: DraftModelBest(toy_params, toy_cfg, width=3, levels=3, budget=9),
        "best chain": lambda: DraftModelBest(toy_params, toy_cfg, width=1, levels=3, budget=3),
        "eagle 1": lambda: Eagle(network(Eagle1Heads()), BUSHY),
        "eagle 3": lambda: Eagle(network(Eagle3Heads()), BUSHY, is_sampled=True),
        "eagle 3, best": lambda: EagleBest(network(Eagle3Heads(vocab=tuple(range(20)))), 3, 3, 9),
    }
    return drafters[name]()


DRAFTERS = [
    "itself",
    *often("sampled tree", "best chain"),
    *more("best tree", "sampled", "latest lookup", "recycling", "suffix", "layer skip", "eagle 1",
          "eagle 3", "eagle 3, best"),
]  # fmt: skip


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafters_of_other_settings_write_the_greedy_text(plain, toy_params, name):
    cfg, prompts, expected, _ = plain
    drafter = drafter_of(name, cfg, toy_params)
    state = run(toy_params, cfg, SpeculativeMethod(drafter), prompts)
    assert texts(state, 64) == expected
    check_statistics(state, drafter.depth)
    forwards = np.asarray(state.num_forwards)
    if name == "best tree":  # the best chain of the target itself is in it
        assert forwards.sum() < 0.6 * sum(map(len, expected))
    if name in ("itself", "best chain", "sampled tree"):  # a way down the tree is always right
        lengths = np.array([len(row) for row in expected])
        assert (forwards == -(-lengths // (drafter.depth + 1))).all()


# ---- Rows and shapes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "temperature"),
    more(("sampled", 0.8), ("eagle 3, best", None), ("recycling", None), ("eagle 3", 0.8)),
)
def test_a_row_alone_gives_the_same(toy_cfg, toy_params, name, temperature):
    drafter = drafter_of(name, toy_cfg, toy_params)
    acceptance = SpeculativeSampling() if name in ("sampled", "eagle 3") else Match()
    method = SpeculativeMethod(drafter, acceptance, Sampling(temperature=temperature))
    prompts = random_prompts(toy_cfg, 4, seed=3)
    lengths = [3, 12, 7, 9]
    together = run(toy_params, toy_cfg, method, prompts, gen_len=lengths, seeds=5, prompt_len=20,
                   canvas_len=16, batch_size=8)  # fmt: skip
    for b in range(4):
        alone = run(
            toy_params, toy_cfg, method, prompts[b : b + 1], gen_len=lengths[b], seeds=[5 + b],
            prompt_len=14, canvas_len=12,
        )  # fmt: skip
        assert texts(alone, 1)[0] == texts(together, 4)[b]
        for field in ("num_forwards", "draft_forwards", "acceptance_histogram"):
            assert getattr(alone, field)[0].tolist() == getattr(together, field)[b].tolist()
        n = lengths[b]
        assert np.allclose(alone.log_prob[0][:n], together.log_prob[b][:n], atol=1e-5)


SPLIT = dict(data=2, tensor=2, sequence=2)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("recycling", SPLIT),
        *more(
            ("eagle 3, best", SPLIT),
            *[
                ("recycling", axes)
                for axes in (
                    dict(data=8), dict(data=4, tensor=2), dict(data=2, tensor=4), dict(tensor=8),
                    dict(fsdp=2, tensor=2), dict(data=2, sequence=4),
                )
            ],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_sharded_equals_unsharded(toy_cfg, toy_params, name, axes):
    """Heads and key/value heads that the mesh does not divide are replicated, rows are not."""
    prompts = random_prompts(toy_cfg, 8, seed=4)
    method = SpeculativeMethod(drafter_of(name, toy_cfg, toy_params))
    expected = texts(run(toy_params, toy_cfg, method, prompts), 8)
    mesh = make_mesh(**axes)
    params = jax.device_put(toy_params, param_shardings(toy_cfg, mesh))
    with jax.set_mesh(mesh):
        assert texts(run(params, toy_cfg, method, prompts), 8) == expected


def test_one_compile_for_prompts_seeds_and_temperatures(toy_cfg, toy_params):
    decode.clear_cache()
    for temperature in (0.5, 1.0):
        for prompt in ([1], [1, 2, 3]):
            method = SpeculativeMethod(PromptLookup(), Match(), Sampling(temperature=temperature))
            run(toy_params, toy_cfg, method, [prompt], prompt_len=8, seeds=len(prompt))
    assert decode._cache_size() == 1


def test_the_loop_never_talks_to_the_host_and_gives_its_cache_away(toy_cfg, toy_params):
    method = SpeculativeMethod(PromptLookup(num_drafts=3))
    make = lambda: prefill(
        toy_params, toy_cfg, method, init_state(toy_cfg, method, [[1, 2, 3]], gen_len=8)
    )
    state = make()
    cache_bytes = state.cache.num_bytes
    compiled = decode.lower(toy_params, toy_cfg, method, state).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes
    rounds = jax.device_put(100)
    placed = jax.device_put((toy_params, method, state))
    decode(placed[0], toy_cfg, *placed[1:], rounds)
    placed = jax.device_put((toy_params, method, make()))
    with jax.transfer_guard("disallow"):
        out = decode(placed[0], toy_cfg, *placed[1:], rounds)
    assert placed[2].cache.k.is_deleted() and bool(out.has_stopped.all())


def test_decoding_in_pieces_is_decoding(plain, toy_params):
    cfg, prompts, expected, _ = plain
    method = SpeculativeMethod(PromptLookup(num_drafts=3))
    state = prefill(toy_params, cfg, method, init_state(cfg, method, prompts, gen_len=12))
    for rounds in range(1, 30):
        state = decode(toy_params, cfg, method, state, 1)
        assert int(state.num_steps) == rounds
        if bool(state.has_stopped.all()):
            break
    assert texts(state, 64) == expected


def test_stop_ids_end_a_text(plain, toy_params):
    """Also where drafts go on behind them, all of them right."""
    cfg, prompts, expected, truth = plain
    stops = [expected[0][0], expected[1][2]]
    right = Adversary(jnp.asarray(truth), jnp.full(64, 1.1))
    method = SpeculativeMethod(right, stop_ids=tuple(stops))
    cut = [
        row[: min([row.index(s) + 1 for s in stops if s in row], default=len(row))]
        for row in expected
    ]
    assert texts(run(toy_params, cfg, method, prompts), 64) == cut


def test_a_penalty_counts_the_drafts_above(plain, toy_params):
    """Drafts of which all are right: none comes up twice."""
    cfg, prompts, _, _ = plain
    method = SpeculativeMethod(sampling=Sampling(None, repetition_penalty=1e4))
    state = run(toy_params, cfg, method, prompts, gen_len=9)
    right = Adversary(jnp.asarray(np.asarray(state.tokens)), jnp.full(64, 1.1))
    fast = run(toy_params, cfg, method.replace(drafter=right), prompts, gen_len=9)
    assert texts(fast, 64) == texts(state, 64)
    assert int(fast.num_forwards.sum()) < 0.5 * int(state.num_forwards.sum())


@pytest.mark.exhaustive(every=4)
def test_log_probs_are_the_targets_own(plain, toy_params):
    cfg, prompts, _, _ = plain
    for sampling in (Sampling(temperature=None), Sampling(0.7, top_k=5)):
        state = run(toy_params, cfg, SpeculativeMethod(PromptLookup(), Match(), sampling), prompts)
        tokens, length = state.tokens, int(state.length.max())
        window = Window.at(tokens[:, :length], jnp.zeros(64, jnp.int32), is_causal=True)
        output = decoder.forward(toy_params, cfg, window)
        log_p = jax.nn.log_softmax(vocab.logits(vocab.head(toy_params), output.hidden))
        for b in range(64):
            first, last = int(state.prompt_len[b]), int(state.length[b])
            places = np.arange(first, last)
            own = np.asarray(log_p)[b, places - 1, np.asarray(tokens)[b, places]]
            assert np.allclose(state.log_prob[b, : last - first], own, atol=1e-4)


# ---- Refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompts=[]), "empty list"),
        (dict(prompts=[[]]), "prompt 0 is empty"),
        (dict(prompts=[[24]]), r"token 24, which must be in \[0, vocab_size=24\)"),
        (dict(prompts=[[1] * 60]), "60 tokens, which with gen_len=8 is more than .*64"),
        (dict(gen_len=0), "gen_len=0 of prompt 0 must be at least 1"),
        (dict(seeds=[1, 2]), "seeds has 2 entries"),
        (dict(prompt_len=1), "prompt_len=1"),
    ],
)
def test_bad_requests_are_refused(toy_cfg, options, message):
    options = dict(prompts=[[1, 2]], gen_len=8) | options
    prompts = options.pop("prompts")
    with pytest.raises(ValueError, match=message):
        init_state(toy_cfg, SpeculativeMethod(), prompts, **options)


def test_bad_methods_are_refused(toy_cfg, toy_params):
    for method, message in (
        (SpeculativeMethod(TokenRecycling(), BlockVerification()), "judges chains"),
        (SpeculativeMethod(PromptLookup(num_drafts=0)), "num_drafts=0 must be at least 1"),
        (SpeculativeMethod(PromptLookup(max_ngram=0)), "min_ngram=1 must be at least 1 and at"),
        (SpeculativeMethod(sampling=Sampling(-1.0)), "temperature=-1 must be positive"),
        (SpeculativeMethod(sampling=Sampling(top_p=0.0)), r"top_p=0 must be in \(0, 1\]"),
        (SpeculativeMethod(sampling=Sampling(top_k=99)), r"top_k=99 must be in \[1, vocab"),
        (SpeculativeMethod(acceptance=Typical(epsilon=2.0)), r"epsilon=2 must be in \[0, 1\]"),
        (SpeculativeMethod(stop_ids=(99,)), "stop_ids has 99"),
        (SpeculativeMethod(Jacobi(num_guesses=0)), "num_guesses=0 must be at least 1"),
        (
            SpeculativeMethod(DraftModelBest(toy_params, toy_cfg, width=2, levels=2, budget=7)),
            r"budget=7 in \[1, 6\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            init_state(toy_cfg, method, [[1]], gen_len=4)


def test_layers_to_keep_must_exist(toy_cfg, toy_params):
    for keep in ([], [2], [1, 0], [-1]):
        with pytest.raises(ValueError, match=r"must be rising layers of the 2 there are"):
            layer_skip(toy_params, toy_cfg, keep)


def test_no_draft_is_the_default():
    assert SpeculativeMethod().drafter == NoDraft()
