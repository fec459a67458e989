"""Medusa's and Hydra's heads: their losses by hand, their training, their files, their drafts."""

import collections
import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm
from configs import draft_heads
from decode.speculative.drafters.dflash import DFlash
from decode.speculative.drafters.eagle import Eagle, EagleBest
from decode.speculative.drafters.hydra import Hydra, HydraState
from decode.speculative.drafters.medusa import Medusa
from decode.speculative.loop import SpeculativeMethod, init_state, prefill, stream
from decode.speculative.state import context_of
from decode.speculative.tree import branching, chain
from dlm import vocab
from dlm.heads import dflash, eagle_1, eagle_3, hydra, medusa
from dlm.heads.hydra import HydraHeads
from dlm.heads.medusa import MedusaHeads
from dlm.models import decoder
from dlm.trainable import Learned
from dlm.window import Window
from tests.lib.gradients import check_gradients
from tests.lib.heads import KINDS, TREE, fresh, shaken, simulated_length
from tests.lib.jitted import as_one_program
from tests.lib.models import MOST, hidden_of
from tests.lib.objectives import CONTEXT, loss_of, make_batch
from tests.lib.speculation import random_prompts, run, texts
from tests.lib.tiers import more
from train import loop
from train.config import ConfigError, build
from train.objectives.hydra import HydraLoss
from train.reading import read_text


@functools.partial(jax.jit, static_argnames="k")
def said(own, seen, k):
    """Logits [V] of head k, of a hidden state and, for Hydra, the embeddings behind it: [n]."""
    head_hidden = hydra.head_hidden if "first" in own else medusa.head_hidden
    return (head_hidden(own, seen[None], k) @ own["unembed"][k].T)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_heads_say_what_the_model_says(toy_cfg, toy_params, kind):
    _, own = fresh(kind, toy_cfg, toy_params, num_blocks=2)
    hidden = jax.random.normal(jax.random.key(3), (5, toy_cfg.d_model))
    expected = vocab.logits(vocab.head(toy_params), hidden)
    for k in range(3):
        behind = np.full((k + 1) * 16 * (kind == "hydra"), 7, np.float32)
        for row, logits in zip(np.asarray(hidden), expected, strict=True):
            seen = np.concatenate([row, behind])
            np.testing.assert_allclose(said(own, seen, k), logits, atol=1e-5)


def test_a_head_of_hydra_sees_the_tokens_before_it_and_no_others(toy_cfg, toy_params):
    """Card: changing y_j changes head i >= j only; the tree is drafted as the loss reads it."""
    _, own = fresh("hydra", toy_cfg, toy_params)
    own = shaken(own)
    params = toy_params | {"embed": 10 * toy_params["embed"]}  # so that tokens matter
    embed = np.asarray(params["embed"])
    hidden = np.random.default_rng(4).normal(size=16).astype(np.float32)

    def logits(tokens, i):
        return said(own, np.concatenate([hidden, *(embed[t] for t in tokens[: i + 1])]), i)

    base = [3, 5, 7]
    for j in range(3):
        changed = [*base[:j], 9, *base[j + 1 :]]
        for i in range(3):
            same = np.allclose(logits(base, i), logits(changed, i), atol=1e-6)
            assert same == (i < j)

    prompts = [[3]]
    method = SpeculativeMethod(Hydra(own, TREE))
    state = init_state(toy_cfg, method, prompts, gen_len=4)
    drafted = HydraState(jnp.asarray(hidden[None]), None)
    context = context_of(params, method, state)
    propose = jax.jit(method.drafter.propose, static_argnums=0)
    tree = propose(toy_cfg, context, drafted).tree
    tokens = np.asarray(tree.tokens[0])
    for v in range(1, TREE.num_nodes):
        way, u = [], v
        while u:
            u = TREE.parents[u - 1]
            way.insert(0, int(tokens[u]))
        best = np.argsort(-np.asarray(logits(way, len(way) - 1)))
        assert tokens[v] == best[TREE.ranks[v - 1]]


@pytest.mark.parametrize(
    ("kind", "options", "vocab"),
    [
        ("medusa", {}, tuple(range(0, 24, 2))),
        ("hydra", {}, ()),
        ("hydra", {"teacher": True}, tuple(range(0, 24, 2))),
        *more(("medusa", {}, ()), ("hydra", {"teacher": True}, ())),
    ],
)
def test_losses_by_hand(toy_cfg, toy_params, kind, options, vocab):
    batch = make_batch(toy_cfg)
    heads, own = fresh(kind, toy_cfg, toy_params, num_blocks=1, vocab=vocab)
    own = shaken(own)
    ids = list(vocab or range(toy_cfg.vocab_size))
    learned = heads.attach(toy_cfg, Learned(toy_params), own)
    tokens = np.concatenate([batch["prompt"], batch["completion"]], axis=1)
    B, T = tokens.shape
    P = batch["prompt"].shape[1]
    hidden = np.zeros((B, T, 16), np.float32)
    for b in range(B):
        start = int(batch["prompt_start"][b])
        hidden[b, start:] = hidden_of(toy_params, toy_cfg, tokens[b, start:])
    embed, head = (np.asarray(toy_params[name]) for name in ("embed", "unembed"))
    for on_prompt in (False, True):
        total, right = 0.0, [{}, {}, {}]
        for k in range(3):
            losses = []
            for b in range(B):
                start = int(batch["prompt_start"][b])
                first = start if on_prompt else P
                for target in range(max(first, start + k + 2), P + int(batch["completion_len"][b])):
                    t = target - 2 - k
                    behind = [] if kind == "medusa" else embed[tokens[b, t + 1 : t + 2 + k]]
                    z = np.asarray(said(own, np.concatenate([hidden[b, t], *behind]), k), float)
                    right[k][b, t] = ids[z.argmax()] == tokens[b, target]
                    if tokens[b, target] not in ids:
                        continue
                    p = np.eye(len(z))[ids.index(tokens[b, target])]
                    if options:  # the model's own law of that token
                        logits = hidden[b, target - 1].astype(float) @ head[ids].T
                        p = np.exp(log_softmax(logits))
                    losses.append(-(p * log_softmax(z)).sum())
            total += 0.8**k * np.mean(losses)
        objective = KINDS[kind][2](on_prompt=on_prompt, **options)
        loss, metrics = loss_of(objective, learned, toy_cfg, batch)
        np.testing.assert_allclose(loss, total, rtol=1e-4)
        for k in range(3):
            accuracy = np.mean([*right[k].values()])
            np.testing.assert_allclose(metrics[f"accuracy_{k + 2}"], accuracy, atol=1e-6)
        length = simulated_length(right)
        np.testing.assert_allclose(metrics["acceptance_length"], length, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_draft_tokens_of_their_vocabulary(toy_cfg, toy_params, kind):
    ids = np.arange(1, 24, 3)
    heads, own = fresh(kind, toy_cfg, toy_params, vocab=tuple(ids.tolist()))
    own = shaken(own)
    learned = heads.attach(toy_cfg, Learned(toy_params), own)
    method = SpeculativeMethod(KINDS[kind][1](learned.own, TREE))
    state = init_state(toy_cfg, method, [[3]], gen_len=4)
    hidden = np.random.default_rng(4).normal(size=16).astype(np.float32)
    last = jnp.asarray(hidden[None])
    context = context_of(toy_params, method, state)
    propose = jax.jit(method.drafter.propose, static_argnums=0)
    drafted = propose(toy_cfg, context, HydraState(last, None) if kind == "hydra" else last)
    tokens, embed = np.asarray(drafted.tree.tokens[0]), np.asarray(toy_params["embed"])
    for v in range(1, TREE.num_nodes):
        way, u = [], TREE.parents[v - 1]
        while u:
            way.insert(0, embed[tokens[u]])
            u = TREE.parents[u - 1]
        behind = [] if kind == "medusa" else [embed[3], *way]
        z = np.asarray(said(own, np.concatenate([hidden, *behind]), TREE.depths[v] - 1))
        assert tokens[v] == ids[np.argsort(-z)[TREE.ranks[v - 1]]]


def log_softmax(z):
    return z - np.log(np.exp(z - z.max()).sum()) - z.max()


def prefix_by_hand(own, cfg, hidden):
    """c [n, D] of hidden states [n, D] of a whole text."""
    x = np.pad(np.asarray(hidden), ((0, MOST - len(hidden)), (0, 0)))[None]
    return np.asarray(_prefix(own, cfg, x))[: len(hidden)]


@functools.partial(jax.jit, static_argnames="cfg")
def _prefix(own, cfg, x):
    layer, ones = dataclasses.replace(cfg, n_layers=1), jnp.ones(cfg.d_model)
    params = {"embed": jnp.zeros((1, cfg.d_model)), "layers": own["prefix"], "final_norm": ones}
    window = Window.at(jnp.zeros((1, MOST), jnp.int32), jnp.zeros(1, jnp.int32), is_causal=True)
    window = window.replace(mix=(jnp.ones((1, MOST)), x))
    return decoder.forward(params, layer, window, feature_layers=(1,)).features[0]


def test_the_layer_of_hydra_plus_plus_reads_the_whole_text(toy_cfg, toy_params):
    """In the middle of texts c is what the layer makes of all hidden states before the root."""
    cfg = dataclasses.replace(toy_cfg, eos_token_id=None)
    _, own = fresh("hydra", cfg, toy_params, num_blocks=2, has_prefix=True)
    own = shaken(own)
    method = SpeculativeMethod(Hydra(own, TREE))
    prompts = [[3], *(p for p in random_prompts(cfg, 8) if len(p) > 5)][:3]
    first = prefill(toy_params, cfg, method, init_state(cfg, method, prompts, gen_len=9, chunk=4))
    checked = 0
    for state in stream(toy_params, cfg, method, first):
        for b in np.flatnonzero(~np.asarray(state.has_stopped)):
            num = int(state.length[b]) - 1
            hidden = hidden_of(toy_params, cfg, np.asarray(state.tokens[b])[:num])
            expected = prefix_by_hand(own, cfg, hidden)[-1]
            checked += 1
            np.testing.assert_allclose(state.drafter.hidden[b], expected, atol=2e-5)
    assert checked > 6


def test_the_loss_of_hydra_plus_plus(toy_cfg, toy_params):
    """As Hydra's, of what the layer makes of the hidden states."""
    batch = make_batch(toy_cfg)
    _, own = fresh("hydra", toy_cfg, toy_params, has_prefix=True)
    own = shaken(own)
    text = jax.device_get(as_one_program(read_text)(toy_params, toy_cfg, batch, False))
    losses, embed = [], np.asarray(toy_params["embed"])
    for b in range(len(text.tokens)):
        start = int(text.start[b])
        c = prefix_by_hand(own, toy_cfg, text.hidden[b, start:])
        row = np.asarray(text.tokens[b, start:])
        for t in range(len(row) - 2):
            if bool(text.is_scored[b, start + t + 2]):
                seen = np.concatenate([c[t], embed[row[t + 1]]])
                z = np.asarray(said(own, seen, 0), float)
                losses.append(np.log(np.exp(z).sum()) - z[row[t + 2]])
    one = own | {"unembed": own["unembed"][:1], "first": own["first"][:1]}
    loss, _ = loss_of(HydraLoss(), Learned(toy_params, one), toy_cfg, batch)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("teacher", [False, True])
def test_gradients_against_finite_differences(toy_cfg, toy_params, teacher):
    """Of the heads; the model has none, for it is not what is learned."""
    batch = make_batch(toy_cfg)
    _, own = fresh("hydra", toy_cfg, toy_params)
    own = shaken(own)

    objective = HydraLoss(teacher=teacher)
    loss = lambda own: objective.loss(Learned(toy_params, own), toy_cfg, batch, CONTEXT)[0]
    check_gradients(loss, own)


@pytest.mark.slow
@pytest.mark.parametrize("kind", more("eagle_1", "eagle_3", "dflash"))
def test_smoke_tests_of_networks(scan_target, tmp_path, kind):
    lm = dlm.load(scan_target)
    config = draft_heads.get_config(f"scan,{kind},runlocal")
    config.train.init_from = str(scan_target)
    if kind == "eagle_3":
        (tmp_path / "vocab.json").write_text(json.dumps([*range(2, 12), lm.cfg.eos_token_id]))
        config.train.trainable.vocab = str(tmp_path / "vocab.json")
    result = loop.run(config, tmp_path / "heads")
    module = {"eagle_1": eagle_1, "eagle_3": eagle_3, "dflash": dflash}[kind]
    network = module.load(result.model_path, lm)
    if kind == "eagle_3":
        assert network.num_ids == 11
    prompts = random_prompts(lm.cfg, 8)
    expected = texts(run(lm.params, lm.cfg, SpeculativeMethod(), prompts), 8)
    drafters = (DFlash(network),)
    if kind != "dflash":
        drafters = (Eagle(network, TREE), EagleBest(network, 3, 3, 8))
    for drafter in drafters:
        assert texts(run(lm.params, lm.cfg, SpeculativeMethod(drafter), prompts), 8) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", more("hydra", "medusa"))
def test_smoke_tests_from_target_to_drafts(scan_target, tmp_path, kind):
    """Train a target, then heads beside it; they draft its own greedy text."""
    lm = dlm.load(scan_target)
    config = draft_heads.get_config(f"scan,{kind},runlocal")
    with pytest.raises(ConfigError, match=r"train\.init_from"):
        loop.run(config, tmp_path / "heads")
    config.train.init_from = str(scan_target)
    result = loop.run(config, tmp_path / "heads")
    module = {"medusa": medusa, "hydra": hydra}[kind]
    heads, own = module.load(result.model_path, lm)
    assert heads.num_heads == 4
    prompts = random_prompts(lm.cfg, 8)
    expected = texts(run(lm.params, lm.cfg, SpeculativeMethod(), prompts), 8)
    method = SpeculativeMethod(KINDS[kind][1](own, TREE))
    state = run(lm.params, lm.cfg, method, prompts)
    assert texts(state, 8) == expected
    other = dataclasses.replace(lm, params=jax.tree.map(lambda x: x * 1.01, lm.params))
    with pytest.raises(ValueError, match=r"trained for model .* train heads for it"):
        module.load(result.model_path, other)
    wrong = {"medusa": hydra, "hydra": medusa}[kind]
    with pytest.raises(ValueError, match=r"holds (Medusa|Hydra)Heads, not"):
        wrong.load(result.model_path, lm)
    with pytest.raises(FileNotFoundError, match=r"holds no draft heads"):
        module.load(tmp_path, lm)


def test_heads_that_do_not_fit_are_refused(toy_cfg, toy_params):
    _, own = fresh("medusa", toy_cfg, toy_params)
    with pytest.raises(ValueError, match="the tree has depth 4, more than the 3 heads"):
        init_state(toy_cfg, SpeculativeMethod(Medusa(own, chain(4))), [[1]], gen_len=4)
    with pytest.raises(ValueError, match="own is a tuple, which must be the heads' parameters"):
        init_state(toy_cfg, SpeculativeMethod(Medusa((None, own))), [[1]], gen_len=4)
    with pytest.raises(ValueError, match="25 children, and there are 24 different tokens to draft"):
        init_state(toy_cfg, SpeculativeMethod(Hydra(own, branching(25))), [[1]], gen_len=4)
    other = dataclasses.replace(toy_cfg, vocab_size=30)
    with pytest.raises(ValueError, match="the heads are for a model of vocab_size=24"):
        init_state(other, SpeculativeMethod(Hydra(own, TREE)), [[1]], gen_len=4)
    for make in (lambda: MedusaHeads(num_heads=0), lambda: HydraHeads(num_blocks=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            make()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_draft_vocabulary_is_what_comes_up_most(scan_target, tmp_path):
    lm = dlm.load(scan_target)
    task = build({"make": "dlm.tasks.scan:Scan", "split": "train"}, "task")
    counts = collections.Counter()
    for i in range(50):
        counts.update(lm.tokenizer.encode(task[i].completion))
    out = subprocess.run(
        [sys.executable, "-m", "scripts.draft_vocab", "--config=configs/causal_lm.py:scan",
         f"--model={scan_target}", "--size=3", "--num_examples=50",
         f"--out={tmp_path / 'vocab.json'}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    chosen = json.loads((tmp_path / "vocab.json").read_text())
    assert lm.cfg.eos_token_id in chosen and len(chosen) == 3
    best = [token for token, _ in counts.most_common(2)]
    assert chosen == sorted([lm.cfg.eos_token_id, *best])
    assert out.stdout.startswith("3 of ") and "% of the text" in out.stdout
