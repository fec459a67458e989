"""EAGLE's networks: what they draft and learn, against a network run pair by pair."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import Sampling
from decode.speculative.drafters.eagle import Eagle, EagleBest
from decode.speculative.loop import SpeculativeMethod, init_state, prefill, stream
from decode.speculative.state import context_of
from decode.speculative.tree import TreeShape, from_paths
from dlm.heads.draft_vocab import spread
from dlm.heads.eagle_1 import Eagle1Heads
from dlm.heads.eagle_3 import Eagle3Heads
from dlm.heads.published import eagle_1, eagle_3
from dlm.trainable import Learned
from tests.lib.gradients import check_gradients
from tests.lib.heads import features_of, init, shaken, simulated_length
from tests.lib.models import MOST
from tests.lib.objectives import CONTEXT, loss_of, make_batch
from tests.lib.speculation import random_prompts
from tests.lib.tiers import more, often
from train.objectives.eagle_1 import Eagle1Loss
from train.objectives.eagle_3 import Eagle3Loss, unroll
from train.reading import read_text

SOME = tuple(range(2, 20))  # a draft vocabulary
KINDS = {
    "1": Eagle1Heads(),
    "3": Eagle3Heads(d_ff=40),
    "3, some tokens": Eagle3Heads(layers=(0, 2, 1), vocab=SOME),
    "3.1": Eagle3Heads(n_layers=2, fc_norm=True, norm_output=True, norm_before_residual=True),
}
TREE = from_paths([[0], [1], [2], [0, 0], [0, 1], [2, 0], [0, 0, 0], [2, 0, 1], [2, 0, 0]])


def network_of(kind, cfg, params):
    heads = KINDS[kind]
    fresh = init(heads, cfg)
    network = heads.network(cfg, shaken(heads.start(cfg, params, fresh)))
    if kind == "3.1":  # the first layer sees five positions, as published ones may
        pattern = ("dense sliding rotary", "dense global rotary")
        sliding = dataclasses.replace(network.cfg, sliding_window=5, pattern=pattern)
        network = network.replace(cfg=sliding)
    return network


def last_state(network, params, pairs):
    """What the network leaves at the last of pairs (u, token, position), all in a row."""
    n = len(pairs)
    if network.cfg.n_layers > 1:
        return last_of_all(network, params, pairs)
    states, tokens, positions = (
        np.asarray([*x, *[x[0]] * (MOST - n)]) for x in zip(*pairs, strict=True)
    )
    q, k, v, residual = _entered(network, params["embed"], states, tokens, positions)
    q, k, v = (np.asarray(a[:n], np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
    s = np.einsum("nh,snh->ns", q[-1], k) / np.sqrt(q.shape[-1])
    w = np.exp(s - s.max(axis=1, keepdims=True))
    attended = np.einsum("ns,snh->nh", w / w.sum(axis=1, keepdims=True), v)
    return np.asarray(_left(network, attended.astype(np.float32), np.asarray(residual)[n - 1]))


@jax.jit
def _entered(network, embed, states, tokens, positions):
    x, residual = network.enter(embed[tokens][None], states[None])
    return *(a[0] for a in network.project(x, positions[None])), residual[0]


@jax.jit
def _left(network, attended, residual):
    return network.leave(attended[None, None], residual[None, None])[0, 0]


@jax.jit
def _begun(network, features):
    return network.begin(features[None])[0]


@jax.jit
def _fed(network, state):
    return network.feed(state[None, None])[0, 0]


def last_of_all(network, params, pairs):
    """As `last_state`, of any number of layers, each attending by hand."""
    n = len(pairs)
    states, tokens, positions = (
        np.asarray([*x, *[x[0]] * (MOST - n)]) for x in zip(*pairs, strict=True)
    )
    return np.asarray(_ran(network, params["embed"], states, tokens, positions))[n - 1]


@jax.jit
def _ran(network, embed, states, tokens, positions):
    seen = np.tri(MOST, dtype=bool)
    gap = positions[:, None] - positions[None]

    def attention(i, q, k, v):
        k, v = (jnp.repeat(a[0], q.shape[2] // a.shape[2], axis=1) for a in (k, v))
        s = jnp.einsum("tnh,snh->nts", q[0], k) / q.shape[-1] ** 0.5
        within = seen if network.reach[i] is None else seen & (gap < network.reach[i])
        w = jax.nn.softmax(jnp.where(within[None], s, -jnp.inf), axis=-1)
        return jnp.einsum("nts,snh->tnh", w, v)[None]

    return network.run(embed[tokens][None], states[None], positions[None], attention)[0]


@jax.jit
def said_by(network, params, state):
    """Logits of the network, [V], of a state [D]."""
    logits = network.logits(params, state[None, None])[0, 0]
    if network.ids is None:
        return logits
    return spread(logits, network.ids, params["embed"].shape[0])


def log_softmax(z):
    return z - np.log(np.exp(z - z.max()).sum()) - z.max()


def proposal(cfg, params, method, state):
    """The tree that a method's drafter proposes in a state."""
    context = context_of(params, method, state)
    return jax.jit(method.drafter.propose, static_argnums=0)(cfg, context, state.drafter).tree


def roll(network, params, features, tokens, drafted):
    """The state behind the text x_0 .. x_n, its features f_0 .. f_{n-1}, and some drafts."""
    num = len(tokens) - 1
    padded = np.pad(np.asarray(features[:num]), ((0, MOST - num), (0, 0)))
    begun = np.asarray(_begun(network, padded))
    pairs = [(begun[t], tokens[t + 1], t) for t in range(len(tokens) - 1)]
    state = last_state(network, params, pairs)
    for i, token in enumerate(drafted):
        pairs.append((np.asarray(_fed(network, state)), token, len(tokens) - 1 + i))
        state = last_state(network, params, pairs)
    return state


@pytest.mark.parametrize("kind", [*often("1", "3.1"), *more("3, some tokens", "3")])
def test_trees_are_what_the_network_says_pair_by_pair(toy_cfg, toy_params, kind):
    """In the middle of texts: the network's cache, positions and masks, and the drafts' laws."""
    cfg = dataclasses.replace(toy_cfg, eos_token_id=None)
    network = network_of(kind, cfg, toy_params)
    method = SpeculativeMethod(
        Eagle(network, TREE, is_sampled=True), sampling=Sampling(temperature=0.7)
    )
    greedy = dataclasses.replace(method, drafter=Eagle(network, TREE), sampling=Sampling(None))
    prompts = [p for p in random_prompts(cfg, 8) if len(p) > 1][:3]
    first = prefill(toy_params, cfg, method, init_state(cfg, method, prompts, gen_len=9, chunk=4))
    for rounds, state in enumerate(stream(toy_params, cfg, method, first)):
        if rounds not in (0, 2):
            continue
        drawn, best = (proposal(cfg, toy_params, m, state) for m in (method, greedy))
        for b in np.flatnonzero(~np.asarray(state.has_stopped)):
            text = np.asarray(state.tokens[b, : int(state.length[b])]).tolist()
            features = features_of(network, cfg, toy_params, text)
            for tree in (drawn, best):
                tokens = np.asarray(tree.tokens[b])
                for v in sorted({0, *TREE.parents}):
                    way, u = [], v
                    while u:
                        way.insert(0, int(tokens[u]))
                        u = TREE.parents[u - 1]
                    last = roll(network, toy_params, features, text, way)
                    said = np.asarray(said_by(network, toy_params, last))
                    if tree is drawn:
                        law = np.exp(log_softmax(said / 0.7))
                        np.testing.assert_allclose(tree.probs[b, v], law, atol=2e-5)
                        continue
                    order = np.argsort(-said, kind="stable")
                    for child in np.flatnonzero(np.asarray(TREE.parents) == v):
                        assert tokens[child + 1] == order[TREE.ranks[child]]


@pytest.mark.parametrize("kind", ["1", *more("3.1", "3, some tokens", "3")])
def test_the_best_tree_is_the_best_of_what_the_network_says(toy_cfg, toy_params, kind):
    network = network_of(kind, toy_cfg, toy_params)
    drafter = EagleBest(network, width=3, levels=3, budget=8)
    method = SpeculativeMethod(drafter)
    state = init_state(toy_cfg, method, [[3, 1, 4, 1, 5]], gen_len=6)
    state = prefill(toy_params, toy_cfg, method, state)
    tree = proposal(toy_cfg, toy_params, method, state)
    features = features_of(network, toy_cfg, toy_params, [3, 1, 4, 1, 5])

    def log_law(way):
        last = roll(network, toy_params, features, [3, 1, 4, 1, 5], way)
        return log_softmax(np.asarray(said_by(network, toy_params, last)))

    frontier, seen = {(): 0.0}, {}
    for _ in range(3):
        level = {}
        for way, so_far in frontier.items():
            law = log_law(way)
            level |= {(*way, int(t)): so_far + law[t] for t in np.argsort(-law)[:3]}
        seen |= level
        frontier = dict(sorted(level.items(), key=lambda item: -item[1])[:3])
    expected = sorted(seen, key=lambda way: -seen[way])[:8]
    tokens, parents = np.asarray(tree.tokens[0]), np.asarray(tree.parents[0])
    ways = [()]
    for v in range(1, 9):
        ways.append((*ways[parents[v]], int(tokens[v])))
    assert sorted(ways[1:]) == sorted(expected)


# ---- Learning ---------------------------------------------------------------------------------


def read(network, cfg, params, batch, on_prompt=False):
    read = jax.jit(read_text, static_argnums=(1, 3), static_argnames="feature_layers")
    text = read(params, cfg, batch, on_prompt, feature_layers=network.feature_layers)
    return jax.device_get(text)


unrolled = jax.jit(lambda *arguments: list(unroll(*arguments)), static_argnums=3)


@jax.jit
def normed(network, states):
    return network.normed(states)


@pytest.mark.parametrize("kind", ["3.1", *more("3", "3, some tokens")])
def test_steps_are_those_of_a_draft(toy_cfg, toy_params, kind):
    """Card: step j at t is the network run over the true pairs up to t, then on its own states."""
    batch = make_batch(toy_cfg)
    network = network_of(kind, toy_cfg, toy_params)
    text = read(network, toy_cfg, toy_params, batch)
    steps = jax.device_get(unrolled(network, toy_params, text, 4))
    tokens = np.asarray(text.tokens)
    checked = 0
    for b in range(len(tokens)):
        start = int(text.start[b])
        row = tokens[b, start:].tolist()
        features = np.asarray(text.features[b, start:])
        for t in range(0, len(row) - 5, 2):
            for j in range(4):
                drafted = row[t + 2 : t + 2 + j]
                expected = roll(network, toy_params, features[: t + 1], row[: t + 2], drafted)
                np.testing.assert_allclose(steps[j][b, start + t], expected, atol=2e-5)
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("on_prompt", [False, True])
@pytest.mark.parametrize("kind", ["3, some tokens", *more("3")])
def test_the_loss_of_eagle_3_by_hand(toy_cfg, toy_params, kind, on_prompt):
    batch = make_batch(toy_cfg)
    network = network_of(kind, toy_cfg, toy_params)
    text = read(network, toy_cfg, toy_params, batch)
    P, tokens = batch["prompt"].shape[1], np.asarray(text.tokens)
    ids = np.arange(toy_cfg.vocab_size) if network.ids is None else np.asarray(network.ids)
    head, own = np.asarray(toy_params["unembed"]), np.asarray(network.own["unembed"])
    total, accuracies, right_at = 0.0, {}, []
    for j, states in enumerate(unrolled(network, toy_params, text, 3)):
        of_states = np.asarray(normed(network, states), np.float64)
        losses, right = [], {}
        for b in range(len(tokens)):
            start = int(batch["prompt_start"][b])
            first = start if on_prompt else P
            for token in range(max(first, start + 2 + j), P + int(batch["completion_len"][b])):
                z = np.asarray(text.hidden[b, token - 1], np.float64) @ head.T
                log_q = log_softmax(of_states[b, token - 2 - j] @ own.T)
                right[b, token - 2 - j] = ids[log_q.argmax()] == tokens[b, token]
                if int(z.argmax()) in ids:
                    losses.append(-(np.exp(log_softmax(z[ids])) * log_q).sum())
        total += 0.7**j * np.mean(losses)
        accuracies[f"accuracy_{j + 2}"] = np.mean([*right.values()])
        right_at.append(right)
    accuracies["acceptance_length"] = simulated_length(right_at)
    objective = Eagle3Loss(num_steps=3, decay=0.7, on_prompt=on_prompt)
    loss, metrics = loss_of(objective, Learned(toy_params, network), toy_cfg, batch)
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    for name, accuracy in accuracies.items():
        np.testing.assert_allclose(metrics[name], accuracy, atol=1e-6)


@pytest.mark.parametrize("on_prompt", [False, True])
def test_the_loss_of_eagle_1_by_hand(toy_cfg, toy_params, on_prompt):
    batch = make_batch(toy_cfg)
    network = network_of("1", toy_cfg, toy_params)
    text = read(network, toy_cfg, toy_params, batch)
    P, head = batch["prompt"].shape[1], np.asarray(toy_params["unembed"], np.float64)
    of_features, of_laws = [], []
    for b in range(len(text.tokens)):
        start = int(batch["prompt_start"][b])
        row = np.asarray(text.tokens[b, start:]).tolist()
        hidden = np.asarray(text.hidden[b, start:])
        first = start if on_prompt else P
        for token in range(max(first, start + 2), P + int(batch["completion_len"][b])):
            t = token - start - 2
            state = roll(network, toy_params, hidden[: t + 1], row[: t + 2], [])
            gap = np.abs(np.asarray(state, np.float64) - hidden[t + 1])
            of_features.append(np.where(gap < 1, gap**2 / 2, gap - 0.5).mean())
            p = np.exp(log_softmax(hidden[t + 1] @ head.T))
            of_laws.append(-(p * log_softmax(np.asarray(state, np.float64) @ head.T)).sum())
    params = Learned(toy_params, network)
    objective = Eagle1Loss(weight=0.3, noise=0, on_prompt=on_prompt)
    loss, metrics = loss_of(objective, params, toy_cfg, batch)
    np.testing.assert_allclose(metrics["feature_loss"], np.mean(of_features), rtol=1e-4)
    np.testing.assert_allclose(metrics["soft_cross_entropy"], np.mean(of_laws), rtol=1e-4)
    np.testing.assert_allclose(loss, np.mean(of_features) + 0.3 * np.mean(of_laws), rtol=1e-4)
    noisy, _ = loss_of(Eagle1Loss(weight=0.3, on_prompt=on_prompt), params, toy_cfg, batch)
    assert abs(float(noisy - loss)) > 1e-3


@pytest.mark.parametrize("kind", ["1", *more("3, some tokens", "3")])
def test_gradients_against_finite_differences(toy_cfg, toy_params, kind):
    batch = make_batch(toy_cfg)
    network = network_of(kind, toy_cfg, toy_params)
    objective = Eagle1Loss() if kind == "1" else Eagle3Loss(num_steps=3)

    def loss(own):
        params = Learned(toy_params, network.replace(own=own))
        return objective.loss(params, toy_cfg, batch, CONTEXT)[0]

    check_gradients(loss, network.own)


def test_the_target_learns_nothing(toy_cfg, toy_params):
    batch = make_batch(toy_cfg)
    network = network_of("3", toy_cfg, toy_params)

    def loss(params):
        return Eagle3Loss(num_steps=2).loss(Learned(params, network), toy_cfg, batch, CONTEXT)[0]

    gradient = jax.device_get(jax.jit(jax.grad(loss))(toy_params))
    assert not any(np.any(g != 0) for g in jax.tree.leaves(gradient["layers"]))


# ---- Files and refusals -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_published_files_there_and_back(toy_cfg, toy_params, kind, tmp_path):
    module = eagle_1 if kind == "1" else eagle_3
    network = network_of(kind, toy_cfg, toy_params)
    module.save(tmp_path, network)
    back = module.load(tmp_path, toy_cfg)
    assert jax.tree.structure(back) == jax.tree.structure(network)
    for ours, theirs in zip(*map(jax.tree.leaves, (back, network)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    other = {"1": eagle_3}.get(kind, eagle_1)
    with pytest.raises(ValueError, match=r"config.json: |is missing"):
        other.load(tmp_path, toy_cfg)
    wider = dataclasses.replace(toy_cfg, d_model=32)
    with pytest.raises(ValueError, match=r"to go with this target|the target's d_model=32"):
        module.load(tmp_path, wider)


def test_layers_that_are_read(toy_cfg):
    cfg = lambda n: dataclasses.replace(toy_cfg, n_layers=n)
    for layers, expected in ((32, (2, 16, 29)), (4, (1, 2, 4)), (2, (0, 1, 2))):
        assert Eagle3Heads().feature_layers(cfg(layers)) == expected
    with pytest.raises(ValueError, match=r"must be three different ones in \[0, n_layers=4\]"):
        Eagle3Heads(layers=(1, 2, 5)).specs(cfg(4))
    with pytest.raises(ValueError, match="must be three different ones"):
        Eagle3Heads(layers=(1, 1, 2))


def test_what_does_not_fit_is_refused(toy_cfg, toy_params):
    network = network_of("3, some tokens", toy_cfg, toy_params)
    wide = TreeShape((0,) * 19, tuple(range(19)))
    for drafter, cfg, message in (
        (
            Eagle(network, wide),
            toy_cfg,
            "19 children, and there are 18 different tokens to draft",
        ),
        (EagleBest(network, width=19), toy_cfg, r"width=19 must be in \[1, 18\]"),
        (EagleBest(network, 3, 2, 13), toy_cfg, r"budget=13 in \[1, 12\]"),
        (Eagle(network), dataclasses.replace(toy_cfg, vocab_size=30), "this one has 30 and 16"),
        (Eagle(network), dataclasses.replace(toy_cfg, n_layers=1), "a target that has 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeculativeMethod(drafter).validate(cfg)
    with pytest.raises(ValueError, match=r"vocab has 24, not in \[0, vocab_size=24\)"):
        Eagle3Heads(vocab=(3, 24)).specs(toy_cfg)
    window = "num_steps=5 must be less than the network's sliding window, 5 positions"
    with pytest.raises(ValueError, match=window):
        Eagle3Loss(num_steps=5).loss(
            Learned(toy_params, network_of("3.1", toy_cfg, toy_params)),
            toy_cfg,
            make_batch(toy_cfg),
            CONTEXT,
        )
    with pytest.raises(ValueError, match="num_steps=40 must be at most"):
        Eagle3Loss(num_steps=40).loss(
            Learned(toy_params, network), toy_cfg, make_batch(toy_cfg), CONTEXT
        )
