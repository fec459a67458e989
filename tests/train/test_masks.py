"""Masks: who sees whom, what they draft and learn, against forwards of a text and one set."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from decode.core.sampling import Sampling
from decode.core.streams import fold_in, uniforms
from decode.speculative import loop
from decode.speculative.accept import BlockVerification, SpeculativeSampling
from decode.speculative.controller import Controller
from decode.speculative.drafters.masks import Masks
from decode.speculative.loop import SpeculativeMethod, init_state, prefill, stream
from decode.speculative.state import context_of
from dlm.cache import init_cache
from dlm.heads import masks
from dlm.heads.masks import MaskHeads
from dlm.lm import LanguageModel
from dlm.models import decoder
from dlm.params import Apart, apart, param_specs
from dlm.trainable import Learned
from dlm.window import Slots, Window
from tests.lib.gradients import check_gradients
from tests.lib.heads import init, shaken
from tests.lib.kinds import KINDS, model
from tests.lib.models import TOY_CFG, hidden_of
from tests.lib.objectives import CONTEXT, loss_of, make_batch
from tests.lib.paths import GOLDEN
from tests.lib.speculation import (
    assert_same_law,
    check_statistics,
    random_prompts,
    run,
    texts,
)
from tests.lib.tiers import more, often
from train.config import OptimConfig
from train.objectives.masks import MaskRows, MasksLoss, draw_masks, read_masks
from train.reading import scored_tokens
from train.step import init_state as init_state_of_run
from train.step import train_step

J = 3
HEADS = MaskHeads(num_masks=J, rank=2)
SOME = tuple(range(2, 20))  # a draft vocabulary
MOST = 40  # tokens of texts; one length, so that little is compiled


def network_of(cfg, params, heads=HEADS):
    """Whose change is not zero."""
    return heads.network(cfg, shaken(heads.start(cfg, params, init(heads, cfg))))


def alone(network, params, cfg, prefixes):
    """Final states [n, J, D] of a set of masks behind each of some texts, by two forwards.

    The model reads the text; with the change added to its weights it reads the masks.
    """
    lengths = np.array([len(text) for text in prefixes], np.int32)
    tokens = np.zeros((len(prefixes), MOST), np.int32)
    for row, text in zip(tokens, prefixes, strict=True):
        row[: len(text)] = text
    return np.asarray(_alone(network, params, cfg, tokens, lengths))


def next_masks(network, params, cfg, state):
    """As `alone`, of the texts of a state without their roots."""
    return np.asarray(_alone(network, params, cfg, state.tokens[:, :MOST], state.length - 1))


@functools.partial(jax.jit, static_argnames="cfg")
def _alone(network, params, cfg, tokens, lengths):
    zeros = jnp.zeros_like(lengths)
    cache = decoder.forward(
        params,
        cfg,
        Window.at(tokens, zeros, is_causal=True),
        Slots.append(init_cache(cfg, len(tokens), MOST), zeros),
    ).cache
    if network.lora is not None:
        params = network.lora.merge(params, network.own["change"])
    vectors = jnp.resize(network.own["vectors"], (J, cfg.d_model)).astype(jnp.float32)
    window = Window.at(jnp.zeros((len(tokens), J), jnp.int32), lengths, is_causal=True)
    vectors = jnp.broadcast_to(vectors[None], (len(tokens), *vectors.shape))
    window = window.replace(mix=(jnp.ones(window.tokens.shape), vectors))
    return decoder.forward(params, cfg, window, Slots.below(cache, lengths)).hidden


# ---- Rows of training ---------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(3))
def test_golden_rows(index):
    """What PARD's rows stand at, learn and see, of those behind a token."""
    case = json.loads((GOLDEN / "pard_rows" / "pard_rows.json").read_text())["cases"][index]
    N, K = case["length"], case["groups_K"]
    position, group = (np.array(case[f"rows_{name}"]) for name in ("position", "group"))
    last = position - group
    kept = np.flatnonzero(last >= 0)
    seen = np.asarray(jax.jit(masks.sees)(last[kept], group[kept]))
    for row, r in zip(seen, kept, strict=True):
        assert kept[row].tolist() == case["visible"][r]
    tokens = [token for token, g in zip(case["rows_token"], group, strict=True) if g == 0]
    following = [*tokens[1:], -100]
    of_rows = np.array([following[t] for t in position])
    expected = np.array(case["rows_predict"])
    is_lost = (expected < 0) & (np.arange(len(expected)) == len(expected) - 1)  # as there
    np.testing.assert_array_equal(np.where(is_lost, expected, of_rows)[kept], expected[kept])
    sizes = MasksLoss(keep=case["drop_ratio"], least=case["drop_min"]).sizes(N, K - 1)
    assert [(group == g).sum() for g in range(1, K)] == list(sizes)


def test_sets_lose_their_last_masks():
    """COD: n_g are 7, 4, 3 of 10; every mask has those before it; no position is drawn twice."""
    objective = MasksLoss(keep=0.7, least=0.2)
    assert objective.sizes(10, 3) == (7, 4, 3) and objective.sizes(100, 7)[4:] == (20, 20, 20)
    batch = make_batch(TOY_CFG, rows=6, completion_len=10)
    is_scored = jax.jit(scored_tokens, static_argnums=1)(batch, False)
    drawn = jax.jit(draw_masks, static_argnames="sizes")
    found = [
        jax.device_get(
            drawn(jax.random.key(seed), is_scored, batch["prompt_start"], sizes=(7, 4, 3))
        )
        for seed in range(3)
    ]
    assert not np.array_equal(found[0].last, found[1].last)
    for rows in found:
        groups = [np.split(x, (7, 11), axis=1) for x in (rows.last, rows.is_scored)]
        for g, (last, counts) in enumerate(zip(*groups, strict=True), start=1):
            for b in range(6):
                start, end = int(batch["prompt_start"][b]), 5 + int(batch["completion_len"][b])
                may_begin = [s for s in range(start, 15) if 5 <= s + 2 < end and s + 2 > start]
                first = last[b][: len(may_begin)]
                assert len(set(last[b])) == len(last[b]) and set(first) <= set(may_begin)
                np.testing.assert_array_equal(last[b], rows.last[b, : len(last[b])])
                expected = [s in may_begin and s + g + 1 < end for s in last[b]]
                assert counts[b].tolist() == expected


# As programs are compiled outside of tests: fused, which must not change what tokens say.
FAST = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
read = jax.jit(read_masks, static_argnames="cfg", compiler_options=FAST)


@pytest.mark.parametrize("kind", ["toy", *more(*KINDS)])
def test_rows_are_those_of_a_text_and_a_set_alone(toy_cfg, toy_params, kind):
    """And rows of tokens are, to the bit, what they are without the change."""
    cfg, params = (toy_cfg, toy_params) if kind == "toy" else model(kind, mask_token_id=None)
    network = network_of(cfg, params)
    batch = jax.device_get(make_batch(toy_cfg))
    tokens = np.concatenate([batch["prompt"], batch["completion"]], axis=1)
    (B, T), start = tokens.shape, batch["prompt_start"]
    last = np.tile(np.int32([7, 3, 9, 5, 10, 5, 9, 10, 9, 10]), (B, 1))
    group = np.repeat([1, 2, 3], [5, 3, 2])
    rows = MaskRows(last, np.ones((B, 10), bool), (5, 3, 2))
    (of_text, hidden), (plain_text, plain) = (
        jax.device_get(read(masks, params, cfg, tokens, start, rows))
        for masks in (network, network.replace(lora=None))
    )
    places = [(b, s) for b in range(B) for s in (7, 3, 9, 5, 10) if s >= start[b]]
    expected = alone(network, params, cfg, [tokens[b, start[b] : s + 1] for b, s in places])
    for (b, s), states in zip(places, expected, strict=True):
        at = np.flatnonzero(last[b] == s)
        np.testing.assert_allclose(hidden[b, at], states[group[at] - 1], atol=2e-5)
    is_real = np.arange(T)[None] >= start[:, None]
    np.testing.assert_array_equal(of_text[is_real], plain_text[is_real])
    assert np.abs(hidden - plain).max() > 0.1


# ---- Drafts -------------------------------------------------------------------------------------


@struct.dataclass
class Told(Masks):
    """Drafts the text with some probability per token, whatever the masks say."""

    truth: jax.Array | None = None
    rate: float = 0.7

    def _read(self, cfg, context, hidden):
        place = context.length[:, None] + jnp.arange(J)[None]
        right = jnp.take_along_axis(self.truth, place, axis=1)
        coin = uniforms(fold_in(context.key, 10), J) < self.rate
        return jnp.where(coin, right, right ^ 1), None


@pytest.fixture(scope="module")
def written(toy_cfg, toy_params):
    """A target whose texts do not end, prompts, and [B, S] prompts with texts behind them."""
    cfg = dataclasses.replace(toy_cfg, eos_token_id=None, mask_token_id=None)
    prompts = [[3], *random_prompts(cfg, 7)]
    state = run(toy_params, cfg, SpeculativeMethod(), prompts, gen_len=24)
    truth = np.pad(np.asarray(state.tokens), ((0, 0), (0, 8)))
    return cfg, prompts, texts(state, 8), jnp.asarray(truth)


@pytest.mark.parametrize("is_quadratic", [True, *often(False)])
def test_drafts_are_those_of_a_second_forward(written, toy_params, is_quadratic):
    """Whatever was accepted; what is judged is, to the bit, what it is without the change."""
    cfg, prompts, expected, truth = written
    network = network_of(cfg, toy_params)
    method = SpeculativeMethod(Told(network, is_quadratic=is_quadratic, truth=truth))
    plain = method.replace(drafter=method.drafter.replace(network=network.replace(lora=None)))
    begin = lambda method: prefill(
        toy_params, cfg, method, init_state(cfg, method, prompts, gen_len=24, chunk=8)
    )
    both = zip(*(stream(toy_params, cfg, m, begin(m)) for m in (method, plain)), strict=True)
    is_known, length, accepted = np.zeros(8, bool), np.array([len(p) for p in prompts]), set()
    for state, other in both:
        state, other = jax.device_get((state, other))
        for name in ("tokens", "length", "log_prob"):
            np.testing.assert_array_equal(getattr(state, name), getattr(other, name))
        num = state.length - length - 1
        going = ~state.has_stopped
        was_known, is_known = is_known, state.drafter.is_known
        accepted |= {*num[going].tolist()}
        right = np.full(8, True) if is_quadratic else num == np.where(was_known, J, 0)
        np.testing.assert_array_equal(is_known[going], right[going])
        states = next_masks(network, toy_params, cfg, state)
        np.testing.assert_allclose(
            state.drafter.hidden[going & is_known], states[going & is_known], atol=2e-5
        )
        for b in range(8):  # what is kept of the window are keys of the nodes
            kept = slice(0, int(state.length[b]) - 1)
            np.testing.assert_array_equal(
                state.cache.k[:, b, :, kept], other.cache.k[:, b, :, kept]
            )
        length = state.length
    assert accepted == {0, 1, 2, 3} and texts(state, 8) == expected
    check_statistics(state, J)


@pytest.mark.parametrize("vocab", [SOME, *more(((),))])
def test_drafts_are_the_best_or_are_drawn(written, toy_params, vocab):
    cfg, prompts, _, _ = written
    drafter = Masks(network_of(cfg, toy_params, dataclasses.replace(HEADS, vocab=vocab)), 2)
    method = SpeculativeMethod(drafter, sampling=Sampling(temperature=0.7))
    state = init_state(cfg, method, prompts, gen_len=4)
    hidden = np.random.default_rng(3).normal(size=(8, 2, cfg.d_model)).astype(np.float32)
    known = state.drafter.replace(hidden=hidden, is_known=np.arange(8) > 0)
    propose = jax.jit(Masks.propose, static_argnums=1)
    context = context_of(toy_params, method, state)
    best, drawn = jax.device_get(
        [
            propose(drafter.replace(is_sampled=is_sampled), cfg, context, known).tree
            for is_sampled in (False, True)
        ]
    )
    logits = hidden @ np.asarray(toy_params["unembed"]).T
    if vocab:
        logits = np.where(np.isin(np.arange(cfg.vocab_size), vocab), logits, -np.inf)
    np.testing.assert_array_equal(best.tokens[:, 1:], logits.argmax(axis=-1))
    assert best.probs is None and best.is_valid.sum(axis=1).tolist() == [1, *[3] * 7]
    laws = np.exp(logits / 0.7)
    laws /= laws.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(drawn.probs[:, :-1], laws, atol=1e-5)
    assert (drawn.tokens[:, 1:] != best.tokens[:, 1:]).any()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("rule", "is_sampled"),
    [(SpeculativeSampling, False), (SpeculativeSampling, True), (BlockVerification, True)],
)
def test_what_is_written_follows_the_targets_law(written, toy_params, rule, is_sampled):
    """CHI2, of the tokens that are drafted first, behind a round without drafts."""
    cfg, *_ = written
    drafter = Masks(network_of(cfg, toy_params), is_sampled=is_sampled)
    plain = SpeculativeMethod(sampling=Sampling(temperature=1.0, top_k=3))
    method = plain.replace(drafter=drafter, acceptance=rule())
    options = {"gen_len": 5, "seeds": range(2048)}
    states = [run(toy_params, cfg, m, [[3, 1, 2]] * 2048, **options) for m in (plain, method)]
    assert states[1].num_forwards.sum() < 0.97 * states[0].num_forwards.sum()
    assert_same_law(*(texts(state, 2048) for state in states), first=1)


@pytest.mark.exhaustive(every=4)
def test_a_controller_may_judge_fewer_nodes(written, toy_params):
    """Then fewer masks are read, and what they say is the same; rounds without any leave none."""
    cfg, prompts, expected, truth = written
    network = network_of(cfg, toy_params)
    drafter = Told(network, truth=truth)
    made = Controller(widths=(1, 2, 4), costs=np.ones(4, np.float32))
    method = SpeculativeMethod(drafter, controller=made)
    state = prefill(toy_params, cfg, method, init_state(cfg, method, prompts, gen_len=24, chunk=8))
    step = jax.jit(loop.step, static_argnames="cfg")
    for choice in (3, 1, 2, 0, 0, 3, 2, 2, 3):
        fixed = method.replace(controller=made.replace(fixed=choice))
        state = step(toy_params, cfg, fixed, state)
        found = jax.device_get(state)
        assert found.drafter.is_known.tolist() == [choice > 0] * 8
        if choice:
            states = next_masks(network, toy_params, cfg, found)
            np.testing.assert_allclose(found.drafter.hidden, states, atol=2e-5)
    num_written = found.length - found.prompt_len
    assert not found.has_stopped.any() and num_written.sum() > 9 * 8
    for row, text in zip(texts(state, 8), expected, strict=True):
        assert row == text[: len(row)]


# ---- Masks that are always right ----------------------------------------------------------------


def oracle():
    """A target that writes by position alone, and masks whose change takes them out of the way.

    Positions have a zero in the last place, where masks have a large number, to which the head
    answers with token 0 whatever the position is. The change has a unit of the MLP take it away.
    """
    cfg = dataclasses.replace(
        TOY_CFG, n_layers=1, pattern=("dense global none",), learned_positions=True, gated=False,
        activation="gelu", eos_token_id=None, mask_token_id=None,
    )  # fmt: skip
    rng, zeros = np.random.default_rng(0), lambda spec: np.full(spec.shape, spec.fill, np.float32)
    params = jax.tree.map(zeros, param_specs(cfg))
    positions = rng.normal(size=params["positions"].shape) * (np.arange(cfg.d_model) < 15)
    positions /= np.sqrt((positions**2).mean(axis=1, keepdims=True))
    params["positions"] = positions.astype(np.float32)
    params["unembed"] = rng.normal(size=params["unembed"].shape).astype(np.float32)
    params["unembed"][0], params["unembed"][0, -1] = 0, 100
    heads = MaskHeads(num_masks=J, is_shared=True, rank=1)
    own = jax.tree.map(zeros, heads.specs(cfg))
    own["vectors"][0, -1] = large = 50.0
    normed = large / np.sqrt(1 + large**2 / cfg.d_model)
    change = own["change"]
    change["up"]["down"][0, -1, 0] = change["up"]["up"][0, 0, 0] = 3.0
    change["down"]["down"][0, 0, 0], change["down"]["up"][0, 0, -1] = 1, -large / (9 * normed)
    return cfg, params, heads.network(cfg, own)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("is_quadratic", [False, *often(True)])
def test_masks_that_are_right_write_as_many_tokens_and_one(is_quadratic):
    """After the first round all drafts are kept, of shared masks as many as one likes."""
    cfg, params, network = oracle()
    prompts, G = [[1, 2, 3], [4]], 25
    expected = texts(run(params, cfg, SpeculativeMethod(), prompts, gen_len=G), 2)
    assert not any(0 in text for text in expected)
    for num, forwards in ((0, 1 + 24 // 4), (5, 1 + 24 // 6)):
        method = SpeculativeMethod(Masks(network, num, is_quadratic=is_quadratic))
        state = run(params, cfg, method, prompts, gen_len=G)
        assert texts(state, 2) == expected
        assert state.num_forwards.tolist() == [forwards] * 2
        assert state.draft_forwards.tolist() == [0, 0]
    closed = network.replace(lora=None)
    state = run(params, cfg, SpeculativeMethod(Masks(closed)), prompts, gen_len=G)
    assert texts(state, 2) == expected and state.num_forwards.tolist() == [G] * 2


# ---- The loss -----------------------------------------------------------------------------------


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("on_prompt", "vocab"), [(False, ()), (False, SOME), *more((True, ()), (True, SOME))]
)
def test_the_loss_by_hand(toy_cfg, toy_params, on_prompt, vocab):
    """With all masks behind all positions whose second next token counts."""
    batch = make_batch(toy_cfg)
    network = network_of(toy_cfg, toy_params, dataclasses.replace(HEADS, vocab=vocab))
    tokens = np.concatenate([batch["prompt"], batch["completion"]], axis=1)
    ids = np.array(vocab or range(toy_cfg.vocab_size))
    head = np.asarray(toy_params["unembed"], np.float64)[ids]
    losses = [[] for _ in range(J)]
    found = [[] for _ in range(J)]  # whether it is right, and those before it, too
    for row, start, n in zip(tokens, batch["prompt_start"], batch["completion_len"], strict=True):
        start, end = int(start), 5 + int(n)
        first = start + 1 if on_prompt else 5
        begin = [s for s in range(start, end - 2) if s + 2 >= first]
        if not begin:
            continue
        prefixes = [row[start : s + 1] for s in begin]
        states = alone(network, toy_params, toy_cfg, (prefixes * 9)[:9])
        log_p = log_softmax(hidden_of(toy_params, toy_cfg, row[start:]).astype(float) @ head.T)
        for s, hidden in zip(begin, states, strict=False):
            is_reached = True
            for g in range(1, min(J, end - 2 - s) + 1):
                theirs = log_p[s + g - start]
                ours = log_softmax(hidden[g - 1].astype(float) @ head.T)
                is_right = ids[ours.argmax()] == row[s + g + 1]
                is_reached &= is_right
                found[g - 1].append((is_right, is_reached))
                if row[s + g + 1] in ids:
                    losses[g - 1].append((np.exp(theirs) * (theirs - ours)).sum())
    objective = MasksLoss(keep=1.0, decay=0.7, on_prompt=on_prompt, remat=True)
    learned = Learned(toy_params, network)
    loss, metrics = loss_of(objective, learned, toy_cfg, batch)
    total = sum(0.7**i * np.mean(each) for i, each in enumerate(losses))
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    for g, of_group in enumerate(found, start=2):
        right = np.mean([is_right for is_right, _ in of_group])
        np.testing.assert_allclose(metrics[f"accuracy_{g}"], right, atol=1e-6)
    accepted = sum(is_reached for of_group in found for _, is_reached in of_group)
    length = 1 + accepted / len(found[0])
    np.testing.assert_allclose(metrics["acceptance_length"], length, atol=1e-5)


def test_masks_that_say_what_the_model_says_have_no_loss():
    """Those of the oracle, whatever is dropped, and all of what it writes is accepted."""
    cfg, params, network = oracle()
    (written,) = texts(run(params, cfg, SpeculativeMethod(), [[1, 2]], gen_len=18), 1)
    batch = {
        "prompt": jnp.asarray([[1, 2]]),
        "prompt_start": jnp.zeros(1, jnp.int32),
        "completion": jnp.asarray([written]),
        "completion_len": jnp.asarray([18]),
    }
    loss, metrics = loss_of(MasksLoss(), Learned(params, network), cfg, batch)
    assert abs(loss) < 1e-4 and metrics["acceptance_length"] > 3.5  # the end cuts some short
    assert [metrics[f"accuracy_{g}"] for g in (2, 3, 4)] == [1, 1, 1]
    closed = Learned(params, network.replace(lora=None))
    loss, metrics = loss_of(MasksLoss(), closed, cfg, batch)
    assert loss > 1 and metrics["acceptance_length"] == 1


@pytest.mark.exhaustive(every=4)
def test_gradients_against_finite_differences(toy_cfg, toy_params):
    batch, network = make_batch(toy_cfg), network_of(toy_cfg, toy_params)
    long = network.own | {"vectors": 4 * network.own["vectors"]}  # whose steps are small beside it

    def loss(own):
        learned = Learned(toy_params, network.replace(own=own))
        return MasksLoss().loss(learned, toy_cfg, batch, CONTEXT)[0]

    check_gradients(loss, long)


@pytest.mark.exhaustive
def test_fewer_forwards_after_training(written, toy_params):
    """On eight texts that the model has written, which their masks then draft."""
    cfg, prompts, expected, _ = written
    heads = dataclasses.replace(HEADS, rank=4)
    padded = [[0] * (13 - len(prompt)) + prompt for prompt in prompts]
    batch = {
        "prompt": np.array(padded, np.int32),
        "prompt_start": np.array([13 - len(prompt) for prompt in prompts], np.int32),
        "completion": np.array(expected, np.int32),
        "completion_len": np.full(8, 24, np.int32),
    }
    optim = OptimConfig(learning_rate=1e-2, decay_steps=200, weight_decay=0.0)
    frozen = Learned(toy_params)

    @jax.jit
    def train(state):
        step = functools.partial(
            train_step, cfg=cfg, objective=MasksLoss(), optim=optim, trainable=heads
        )
        return jax.lax.scan(
            lambda state, _: step(state, batch, jax.random.key(1), frozen), state, None, 200
        )

    own = heads.start(cfg, toy_params, init(heads, cfg))
    state, metrics = jax.device_get(train(init_state_of_run(own, optim=optim)))
    assert metrics["loss"][-10:].mean() < 0.5 * metrics["loss"][:10].mean()
    assert metrics["acceptance_length"][-10:].mean() > 2 > metrics["acceptance_length"][:10].mean()
    method = SpeculativeMethod(Masks(heads.network(cfg, state.params)))
    found = run(toy_params, cfg, method, prompts, gen_len=24)
    assert texts(found, 8) == expected and found.num_forwards.mean() < 0.7 * 24


# ---- What they are ------------------------------------------------------------------------------


def test_fresh_masks_change_nothing(toy_cfg, toy_params):
    """They begin around the mean of the embeddings, where the model reads them as it is."""
    own = jax.device_get(HEADS.fresh(jax.random.key(0), toy_cfg, toy_params))
    mean = np.asarray(toy_params["embed"]).mean(axis=0)
    assert np.abs(own["vectors"] - mean).max() < 0.1 and np.std(own["vectors"], axis=0).all()
    assert set(own["change"]) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert not any(np.any(change["up"]) for change in own["change"].values())
    with pytest.raises(ValueError, match=r"vocab has 24, not in \[0, vocab_size=24\)"):
        dataclasses.replace(HEADS, vocab=(1, 24)).specs(toy_cfg)
    shared = dataclasses.replace(HEADS, is_shared=True, rank=0).specs(toy_cfg)
    assert list(shared) == ["vectors"] and shared["vectors"].shape == (1, toy_cfg.d_model)
    cfg, _ = model("every other has experts")
    assert set(HEADS.specs(cfg)["change"]["experts"]) == {"q", "k", "v", "o"}
    rates = HEADS.rate({"vectors": jnp.ones(2), "change": jnp.ones(2)})
    assert rates["vectors"].tolist() == [5, 5] and rates["change"].tolist() == [1, 1]


@pytest.mark.exhaustive(every=4)
def test_files_there_and_back(toy_cfg, toy_params, tmp_path):
    """Beside weights that lie apart, layer by layer: it is the same change."""
    network, batch = network_of(toy_cfg, toy_params), jax.device_get(make_batch(toy_cfg))
    lm = LanguageModel(toy_params, toy_cfg, None)
    HEADS.export(tmp_path, lm, network.own)
    split = dataclasses.replace(lm, params=apart(toy_params, toy_cfg))
    back, of_layers = (masks.load(tmp_path / "model", some) for some in (lm, split))
    assert jax.tree.structure(back) == jax.tree.structure(network)
    jax.tree.map(np.testing.assert_array_equal, back.own, network.own)
    assert isinstance(of_layers.own["change"]["qkv"]["up"], Apart)
    rows = MaskRows(np.full((4, 3), 9, np.int32), np.ones((4, 3), bool), (1, 1, 1))
    tokens = np.concatenate([batch["prompt"], batch["completion"]], axis=1)
    (of_text, hidden), (same_text, again) = (
        read(masks, params, toy_cfg, tokens, batch["prompt_start"], rows)
        for masks, params in ((back, toy_params), (of_layers, split.params))
    )
    np.testing.assert_allclose(hidden, again, atol=1e-5)
    np.testing.assert_allclose(of_text, same_text, atol=1e-5)
    other = dataclasses.replace(lm, params=toy_params | {"embed": 2 * toy_params["embed"]})
    with pytest.raises(ValueError, match="train heads for it"):
        masks.load(tmp_path / "model", other)


def test_what_does_not_fit_is_refused(toy_cfg, toy_params):
    network = network_of(toy_cfg, toy_params)
    wide = dataclasses.replace(toy_cfg, d_model=32)
    shared = network.replace(own={"vectors": network.own["vectors"][:1]}, lora=None)
    SpeculativeMethod(Masks(shared, 9)).validate(toy_cfg)
    for drafter, cfg, message in (
        (Masks(network, 4), toy_cfg, r"num_drafts=4 must be in \[0, 3\]"),
        (Masks(network), wide, "d_model=16, and this one has 32"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeculativeMethod(drafter).validate(cfg)
