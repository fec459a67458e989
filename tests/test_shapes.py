"""Docstrings of structs say what their arrays are; here they are made, mostly without numbers.

Rounds and steps are traced on abstract parameters in bfloat16, so that what is said to be float32
is seen to be so, and sizes are all different.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decode
import dlm
import kernels_pallas
import train
from decode import long_likelihood
from decode.complete import complete
from decode.constraints.hosted import HostConstraint, pack
from decode.core.component import Part
from decode.core.hso import HSO
from decode.core.requests import read_requests
from decode.core.sampling import Sampling
from decode.diffusion import loop as diffusion
from decode.diffusion import step as rounds
from decode.diffusion.caches import block_cache, canvas, delayed_cache, exact_blocks, in_block_cache
from decode.diffusion.components import P2, FixedBlocks, Quota
from decode.diffusion.method import DiffusionMethod
from decode.diffusion.recorded import GreedyOracle, Recorded
from decode.diffusion.routing import Routing
from decode.generate import generate
from decode.long_likelihood import LongLikelihood
from decode.search import astar, planner
from decode.search import hosted as search_hosted
from decode.search import loop as search
from decode.search.components import STRATEGIES, Beam
from decode.search.loop import SearchMethod
from decode.search.planner import Continuation
from decode.search.scorers import Partial
from decode.speculative import hosted as speculative_hosted
from decode.speculative import loop as speculative
from decode.speculative import pearl
from decode.speculative.accept import SpeculativeSampling
from decode.speculative.components import DRAFTERS, DFlash, PromptLookup, SpecDecPP, Suffix
from decode.speculative.controller import Controller
from decode.speculative.drafters import opt_tree
from decode.speculative.loop import SpeculativeMethod
from dlm import vocab
from dlm.cache import init_cache
from dlm.heads.eagle_3 import Eagle3Heads
from dlm.heads.learn2pd import init_filter
from dlm.lm import LanguageModel
from dlm.lora import Lora
from dlm.models import decoder
from dlm.params import abstract_params
from dlm.tasks import Encoded
from dlm.trainable import Learned
from dlm.window import Slots, Window
from kernels_pallas.unembed_stats import Noise
from tests.lib.docs import attributes, check_shapes, states_shape
from tests.lib.kinds import KINDS
from tests.lib.methods import CASES, method_with
from tests.lib.models import TOY_CFG
from tests.lib.objectives import make_batch
from train.config import OptimConfig
from train.objectives.block_diffusion import BlockDiffusion
from train.objectives.causal import Causal
from train.objectives.eagle_3 import Eagle3Loss
from train.objectives.masks import draw_masks
from train.step import init_state, train_step

CFG = dataclasses.replace(TOY_CFG, dtype="bfloat16", n_layers=5)
PARAMS = abstract_params(CFG)
SIZES = dict(B=3, D=CFG.d_model, V=CFG.vocab_size)
PROMPTS, P, G = [[3, 7, 1], [5, 2, 9, 4, 4, 8, 6], [11]], 7, 9
CHECKED: set[type] = set()
# Of no step: see who makes them. `_Reading` may have no shadow, `Rounds` come from files, what a
# `Recording` has of its own is no array. `_Drafting` never leaves its loop.
UNSEEN = {"_Reading", "Rounds", "Recording", "DraftRound", "_Drafting"}


def check(made, **letters):
    check_shapes(made, CHECKED, SIZES, **letters)


@pytest.fixture
def watch(monkeypatch):
    """Has functions of a module or class check all structs they are given, and return."""

    def check_all(x):
        if dataclasses.is_dataclass(x) and not isinstance(x, Part | type):
            if any(states_shape(text) for text in attributes(type(x)).values()):
                check(x)
        elif isinstance(x, tuple | dict):
            for part in x.values() if isinstance(x, dict) else x:
                check_all(part)

    def watch(owner, *names):
        for name in names:

            def watched(*args, original=getattr(owner, name), **options):
                out = original(*args, **options)
                check_all((args, tuple(options.values()), out))
                return out

            monkeypatch.setattr(owner, name, watched)

    return watch


# ---- Diffusion --------------------------------------------------------------------------------


def trace(method, step=diffusion.step):
    """The state after one round of 3 rows."""

    def round_of(params):
        state = diffusion.init_state(
            CFG, method, PROMPTS, gen_len=[9, 7, 9], prompt_len=P, canvas_len=G
        )
        return step(params, CFG, method, state)

    return jax.eval_shape(round_of, PARAMS)


def judge_and_apply(params, cfg, method, state):
    round, cache, served = rounds.judge(params, cfg, method, state)
    return rounds.apply(cfg, method, state.replace(cache=cache), round, served)


def has_shapes(axis, cls):
    """Whether a component holds arrays, remembers something, or makes more than others do."""
    component = cls.example(TOY_CFG)
    state = jax.eval_shape(lambda: component.init(CFG, 3, 4))
    holds = any(map(states_shape, attributes(cls).values()))
    makes = component.needs & {"occurred", "logits", "expected", "standing", "shadow", "given"}
    return axis == "cache" or holds or makes or jax.tree.leaves(state)


@pytest.mark.parametrize(("axis", "cls"), [case for case in CASES if has_shapes(*case)])
def test_a_round_of_diffusion(watch, axis, cls):
    method = method_with(axis, cls)
    watch(rounds, "make_frame", "judge", "_choose")
    watch(type(method.scheduler), "advance")
    watch(type(method.cache), "judge")
    for module in (block_cache, canvas, delayed_cache, exact_blocks, in_block_cache):
        watch(module, "forward")
    if isinstance(method.cache, block_cache.BlockCache):
        watch(type(method.cache), "span")
    state = trace(method, judge_and_apply)
    check(state, P=P, G=G, S=P + G)
    check(getattr(method, axis))
    remembered = state.cache if axis == "cache" else getattr(state.components, axis)
    make = cls.allocate if axis == "cache" else cls.init
    if hasattr(remembered, "shape"):
        check_returned(remembered, make)
    elif dataclasses.is_dataclass(remembered):
        check(remembered)


def check_returned(array, make):
    """An array is what the function that makes it says in its docstring's first line."""
    said = dataclasses.make_dataclass(make.__qualname__, [("returned", jax.Array)])
    said.__doc__ = f"See below.\n\nAttributes:\n  returned: {' '.join(make.__doc__.split())}"
    check_shapes(said(array), set(), SIZES)


def test_what_diffusion_guesses_ahead_and_records():
    method = DiffusionMethod(FixedBlocks(4), rule=Quota(4))
    state = trace(method.replace(lookahead=2))
    check(state, P=P, G=G, S=P + G)
    assert state.drafts is not None
    state = trace(method.replace(top_logprobs=4))
    check(state, P=P, G=G, S=P + G)
    check(state.top, G=G, n=4)
    check(trace(method.replace(confidence=Recorded(5))).components.confidence)
    oracle = GreedyOracle(np.zeros((5, G), np.int32))
    check(oracle, N=5, G=G)
    check(trace(method.replace(reviser=oracle)).components.reviser, W=4)
    check(trace(method.replace(temperature=0.7, reviser=P2(planner="shadow"))), S=P + G)


# ---- Speculation ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_round_of_speculation(watch, kind):
    watch(kind, "propose", "observe", "prefill")
    watch(DFlash, "marginals")
    watch(opt_tree, "grow")
    watch(SpeculativeSampling, "walk")
    watch(decoder, "forward")

    def round_of(params):
        drafter = kind.example(CFG, params)
        if hasattr(drafter, "is_sampled") and not hasattr(drafter, "budget"):
            drafter = drafter.replace(is_sampled=True)
        check(drafter)
        sampling = Sampling(0.7, repetition_penalty=1.2)
        method = SpeculativeMethod(drafter, SpeculativeSampling(), sampling)
        state = speculative.init_state(CFG, method, PROMPTS, gen_len=[9, 7, 9], chunk=5)
        state = speculative.prefill(params, CFG, method, state)
        return speculative.step(params, CFG, method, state)

    state = jax.eval_shape(round_of, PARAMS)
    check(state, G=G)
    if hasattr(state.drafter, "shape"):
        check_returned(state.drafter, kind.init)


def test_a_chain_that_stops_and_a_round_of_pearl(watch):
    watch(SpecDecPP, "_extend")
    watch(pearl, "settle", "follow")

    def round_of(params):
        drafter = SpecDecPP.example(CFG, params).replace(is_sampled=True)
        method = pearl.Pearl(drafter, SpeculativeSampling(), Sampling(0.7))
        check(method)
        state = pearl.prepare(params, CFG, method, PROMPTS, gen_len=[9, 7, 9], chunk=5)
        return pearl.step(params, CFG, method, state)

    check(jax.eval_shape(round_of, PARAMS), G=G)


def test_a_controlled_round():
    controller = Controller(widths=(1, 3), costs=np.ones(3, np.float32))
    method = SpeculativeMethod(PromptLookup(num_drafts=2), controller=controller)

    def round_of(params):
        state = speculative.init_state(CFG, method, PROMPTS, gen_len=[9, 7, 9], chunk=5)
        return speculative.step(params, CFG, method, state)

    check(controller, K=2)
    check(jax.eval_shape(round_of, PARAMS).control, J=2, K=2)


# ---- Search -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_round_of_search(watch, kind):
    watch(kind, "choose", "finish")
    sampling, stop_ids = Sampling(None, repetition_penalty=1.2), jnp.array([3, 4], jnp.int32)
    method = SearchMethod(kind.example(CFG), sampling, stop_ids=stop_ids)
    check(method, m=2)
    K, n = method.strategy.width, method.strategy.num_candidates

    def round_of(params):
        length = jnp.array(list(map(len, PROMPTS)))
        tokens, key = jnp.zeros((3, P + G + n), jnp.int32), jnp.zeros((3, 2), jnp.uint32)
        state = search._begin(params, CFG, method, tokens, length, length + G, key, G, 5)
        weighed = search.weighed(params, CFG, method, state)
        state = search.step(params, CFG, method, state)
        return state, search.results(method, state), weighed

    sizes = dict(K=K, n=n, G=G, S=P + G + n, R=1)
    state, found, weighed = jax.eval_shape(round_of, PARAMS)
    check(weighed[0], K=K, c=weighed[0].tokens.shape[2])
    check(state.replace(cache=None), **sizes)
    check(state.cache, B=3 * method.num_rows)
    check(found, **sizes)


def test_a_window_of_a_long_text(watch):
    check(HSO())
    watch(HSO, "fit")
    watch(long_likelihood, "forget")

    def window_of(params):
        past = long_likelihood.begin(CFG, 3, 16)
        tokens, length = jnp.zeros((3, 6), jnp.int32), jnp.full(3, 9)
        return long_likelihood.advance(params, CFG, HSO(), past, tokens, jnp.int32(0), length)

    past, log_prob = jax.eval_shape(window_of, PARAMS)
    check(past, S=16)
    assert log_prob.shape == (3, 5) and log_prob.dtype == jnp.float32
    check(LongLikelihood(np.zeros(4, np.float32)))


# ---- The host ---------------------------------------------------------------------------------


def test_rounds_that_ask_the_host():
    masks = pack([(0, 0, np.ones(CFG.vocab_size, bool)), (1, 0, np.ones(CFG.vocab_size, bool))])
    check(masks, n=4)
    method = SpeculativeMethod(PromptLookup(num_drafts=2))
    beams, asked = SearchMethod(Beam(num_beams=2)), dict(gen_len=[9, 7, 9], chunk=5)
    check(speculative_hosted.host(method, HostConstraint()))
    check(search_hosted.host(beams, HostConstraint()))

    def rounds_of(params):
        under = speculative_hosted.host(method, HostConstraint())
        state = speculative_hosted.prepare(params, CFG, under, PROMPTS, **asked)
        begun = speculative_hosted.judge(params, CFG, method, state)
        last = np.full(3, -1, np.int32)
        state, _ = speculative_hosted.settle(params, CFG, method, *begun, masks, last)
        searched = search_hosted.host(beams, HostConstraint())
        found = search_hosted.prepare(params, CFG, searched, PROMPTS, **asked)
        under = searched.at_device(masks)
        check(under.constraint)
        return state, search.step(params, CFG, under, found)

    state, found = jax.eval_shape(rounds_of, PARAMS)
    check(state, G=G)
    check(found.replace(cache=None), K=2, n=1, G=G)


def test_what_searches_on_the_host_hold():
    key, floats = np.zeros(2, np.uint32), np.zeros(3, np.float32)
    check(Continuation(np.zeros(3, np.int32), floats, key, False, np.zeros((3, 2), np.int32),
                       np.zeros((3, 2), np.float32)))  # fmt: skip
    tokens, one = np.ones((1, 33), np.int32), np.ones(1, np.int32)
    read = jax.eval_shape(
        functools.partial(planner._read, cfg=CFG, chunk=16), PARAMS,
        method=SpeculativeMethod(), tokens=tokens, length=8 * one, end=16 * one,
    )  # fmt: skip
    check(read.replace(cache=None))
    check(astar.State((1, 2, 3), key, floats), n=3)
    check(Partial((1, 2), "", "", floats, False))


# ---- Training ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective", [Causal(), BlockDiffusion(block_len=4), Eagle3Loss(num_steps=2)]
)
def test_a_step_of_training(watch, objective):
    watch(decoder, "forward")
    watch(type(objective), "loss")
    if isinstance(objective, Causal | BlockDiffusion):
        watch(type(objective), "predict")
    if not isinstance(objective, BlockDiffusion):
        watch(importlib.import_module(type(objective).__module__), "read_text")
    optim = OptimConfig(learning_rate=1e-2, decay_steps=4, ema_decay=0.9)
    batch = make_batch(CFG, rows=3, prompt_len=P, completion_len=G)
    heads = Eagle3Heads(vocab=(1, 2, 5))
    options = dict(cfg=CFG, objective=objective, optim=optim)
    if objective.goes_with is not None:
        options["trainable"] = heads

    def step(params):
        own = params
        if objective.goes_with is not None:
            own = heads.fresh(jax.random.key(0), CFG, params)
            check(heads.network(CFG, own))
        state = init_state(own, optim=optim)
        return train_step(state, batch, jax.random.key(0), Learned(params), **options)

    check(jax.eval_shape(step, PARAMS)[0])


def test_what_is_learned_beside_a_model():
    lora = Lora(rank=2, alpha=1.0)

    def attach(params):
        return lora.attach(CFG, Learned(params), lora.fresh(jax.random.key(0), CFG, params)).target

    layers = jax.eval_shape(attach, PARAMS)["layers"]
    for low_rank in (*layers["attention"].values(), *layers["mlp"].values()):
        check(low_rank, L=CFG.n_layers, r=2)
    check(init_filter(jax.random.key(0), 5))
    is_scored, start = np.ones((3, P + G), bool), np.zeros(3, np.int32)
    draw = functools.partial(draw_masks, sizes=(5, 3, 2))
    check(jax.eval_shape(draw, jax.random.key(0), is_scored, start))


def test_models(watch):
    """With experts, whose weights stay where they lie, scaled queries and capped logits."""
    watch(decoder, "rotary_angles", "moe")
    watch(vocab, "head")
    kind = KINDS["every other has experts"] | dict(logit_cap=30.0, query_growth=(0.1, 3))
    cfg = dataclasses.replace(CFG, **kind)

    def logits(params, tokens):
        cache = init_cache(cfg, 3, 8)
        start = jnp.zeros(3, jnp.int32)
        window, slots = Window.at(tokens, start, is_causal=True), Slots.append(cache, start)
        return vocab.logits(vocab.head(params), decoder.forward(params, cfg, window, slots).hidden)

    tokens = jax.ShapeDtypeStruct((3, 7), jnp.int32)
    assert jax.eval_shape(logits, abstract_params(cfg), tokens).shape == (3, 7, CFG.vocab_size)


# ---- The rest ---------------------------------------------------------------------------------


def test_what_is_said_of_the_vocabulary():
    hidden = jax.ShapeDtypeStruct((5, CFG.d_model), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((5, 2), jnp.int32)
    noise = Noise(jax.ShapeDtypeStruct((5, 2), jnp.uint32), jax.ShapeDtypeStruct((), jnp.float32))
    check(noise, M=5)

    def read(params, hidden, noise, ids):
        head = vocab.head(params)
        stats = vocab.read(head, hidden, noise=noise, k=3, given_ids=ids)
        return stats, vocab.score(head, hidden, ids[:, 0])

    for stats in jax.eval_shape(read, PARAMS, hidden, noise, ids):
        check(stats, M=5)


def test_requests_and_completions(toy_params):
    check(read_requests(CFG, PROMPTS, 9, 0, None, None, None, may_be_empty=True))
    check(Sampling(logit_bias=np.zeros(CFG.vocab_size, np.float32)))
    check(Suffix(np.zeros(7, np.int32)))
    for method in (DiffusionMethod, SpeculativeMethod):
        check(method(stop_ids=np.zeros(2, np.int32)))
    lm = LanguageModel(toy_params, TOY_CFG, None)
    for answer in (generate(lm, [1, 2], gen_len=4, block_len=4), complete(lm, [1, 2], gen_len=4)):
        check(answer, gen_len=4)
    check(Encoded(np.zeros(3, np.int32), np.zeros(5, np.int32), np.zeros(5, np.int32)))
    undecided, numbers = np.ones((3, 4), bool), np.ones((3, 4), np.float32)
    check(Routing().route(undecided, numbers, numbers, 50, undecided[:, 0]))


def test_nothing_is_left_out(request):
    """Every class whose docstring has shapes was looked at above."""
    selected = {item.name.split("[")[0] for item in request.session.items}
    if not {name for name in globals() if name.startswith("test_")} <= selected:
        pytest.skip("the tests above were not all selected")
    found = {}
    for package in (decode, dlm, train, kernels_pallas):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not info.name.endswith(("__main__", ".gpu", ".tpu", ".lm_eval")):  # an extra's
                for value in vars(importlib.import_module(info.name)).values():
                    if inspect.isclass(value) and dataclasses.is_dataclass(value):
                        found[value.__name__] = value
    documented = {
        name
        for name, kind in found.items()
        if any(states_shape(attributes(kind).get(f.name)) for f in dataclasses.fields(kind))
    }
    assert documented - UNSEEN <= {kind.__name__ for kind in CHECKED}
