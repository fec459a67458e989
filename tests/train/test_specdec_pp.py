"""SpecDec++: the rule by which drafting stops, what the head learns, and what drafts cost."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import dlm
from configs import stop_head
from decode.core.sampling import Sampling
from decode.speculative.accept import Match, SpeculativeSampling
from decode.speculative.drafters.draft_model import DraftModel
from decode.speculative.drafters.specdec_pp import SpecDecPP
from decode.speculative.loop import SpeculativeMethod, init_state, prefill
from decode.speculative.state import context_of
from dlm.heads import specdec_pp
from dlm.heads.specdec_pp import Judged, StopHead, log_verdict
from dlm.models import decoder
from dlm.trainable import Learned
from tests.lib.heads import init
from tests.lib.models import hidden_of, laws_of, markov, random_model
from tests.lib.objectives import CONTEXT, loss_of, make_batch
from tests.lib.paths import SHARED
from tests.lib.speculation import random_prompts, run, texts
from tests.lib.tiers import more
from train import loop
from train.objectives.specdec_pp import StopLoss
from train.reading import read_text

TRACES = SHARED / "goldens" / "specdec_pp_stop"
MANY = 20_000  # texts


@pytest.fixture(scope="module")
def small(toy_cfg):
    """A draft model of one layer, and a head that is not sure of anything."""
    cfg = dataclasses.replace(toy_cfg, n_layers=1, eos_token_id=None)
    own = init(StopHead(num_blocks=2), cfg)
    return random_model(9, cfg), cfg, own | {"w": 8 * own["w"]}


# ---- When drafting stops ----------------------------------------------------------------------


@struct.dataclass
class Replay(SpecDecPP):
    """Whose hidden state of draft step s is the s-th unit vector."""

    def _forward(self, context, window, slots):
        step = window.positions - (context.length[:, None] - 1)
        hidden = jax.nn.one_hot(step, self.draft.d_model)
        return decoder.ForwardOutput(hidden, slots.cache)


@pytest.mark.skipif(not TRACES.is_dir(), reason="the shared goldens are not here")
@pytest.mark.parametrize("case", range(6))
def test_the_published_rule(toy_cfg, case):
    """As many drafts as there, of the same head outputs."""
    said = json.loads((TRACES / "specdec_pp_stop.json").read_text())["cases"][case]
    logits = np.array(said["head_logits"], np.float32)
    least, most = said["bounds"] or (1, len(logits))
    D = len(logits)
    cfg = dataclasses.replace(toy_cfg, d_model=D, vocab_size=D + 1, eos_token_id=D)
    # Draft step s says token s, or the end of the text.
    says = np.zeros((D + 1, D), np.float32)
    said_at = [D if s == said["eos_at_draft"] else s for s in range(D)]
    says[said_at, range(D)] = 1
    own = {"blocks": [], "w": jnp.asarray(logits), "b": jnp.zeros(2)}
    drafter = Replay(
        {"unembed": jnp.asarray(says)}, cfg, own=own, threshold=said["threshold"], least=least,
        num_drafts=most,
    )  # fmt: skip
    target = dataclasses.replace(toy_cfg, vocab_size=D + 1, eos_token_id=D, mask_token_id=None)
    method = SpeculativeMethod(drafter)
    state = init_state(target, method, [[3, 5, 1]], gen_len=8)
    propose = jax.jit(drafter.propose, static_argnums=0)
    found = propose(target, context_of({}, method, state), state.drafter)
    assert int(found.cost[0]) == said["drafted"] == int(found.tree.is_valid.sum()) - 1
    assert found.tree.tokens[0, 1 : 1 + said["drafted"]].tolist() == said_at[: said["drafted"]]


def test_chains_by_hand_and_what_they_cost(toy_cfg, toy_params, small):
    """Row by row, with the draft model's states of a fresh forward; a forward per draft."""
    params, cfg, own = small
    target = dataclasses.replace(toy_cfg, eos_token_id=None, mask_token_id=None)
    prompts = random_prompts(target, 6, seed=1)
    drafter = SpecDecPP(params, cfg, own=own, threshold=0.7, least=2, num_drafts=7)
    method = SpeculativeMethod(drafter)
    state = prefill(toy_params, target, method, init_state(target, method, prompts, gen_len=9))
    propose = jax.jit(drafter.propose, static_argnums=0)
    found = propose(target, context_of(toy_params, method, state), state.drafter)
    verdict = jax.jit(log_verdict)
    lengths = []
    for b, prompt in enumerate(prompts):
        text, reach = list(prompt), 1.0
        for k in range(1, 8):
            hidden = hidden_of(params, cfg, text)[-1]
            if k > 1:
                reach *= float(np.exp(verdict(own, hidden)[1]))
            text.append(int(np.argmax(hidden @ np.asarray(params["unembed"]).T)))
            if k >= 2 and 1 - reach > 0.7:
                break
        lengths.append(k)
        assert found.tree.tokens[b, : k + 1].tolist() == text[len(prompt) - 1 :]
        assert found.tree.is_valid[b].tolist() == [i <= k for i in range(8)]
    assert found.cost.tolist() == lengths and 2 < np.mean(lengths) < 7


@pytest.mark.exhaustive(every=4)
def test_ends_of_the_threshold(toy_cfg, toy_params, small):
    """1: always as many as may be, and the rounds of a draft model; 0: always as few."""
    params, cfg, own = small
    target = dataclasses.replace(toy_cfg, eos_token_id=None, mask_token_id=None)
    prompts = random_prompts(target, 4, seed=2)
    made = lambda **kw: run(
        toy_params, target,
        SpeculativeMethod(SpecDecPP(params, cfg, own=own, least=2, num_drafts=4, **kw)), prompts,
    )  # fmt: skip
    always, never = made(threshold=1.0), made(threshold=0.0)
    plainly = SpeculativeMethod(DraftModel(params, cfg, num_drafts=4))
    chain = run(toy_params, target, plainly, prompts)
    assert texts(always, 4) == texts(never, 4) == texts(chain, 4)
    assert (always.acceptance_histogram == chain.acceptance_histogram).all()
    assert (always.draft_forwards == 4 * always.num_forwards).all()
    assert (never.draft_forwards == 2 * never.num_forwards).all()


# ---- Texts that are drawn ---------------------------------------------------------------------


@struct.dataclass
class DropsWhatItSaw(SpecDecPP):
    """Wrong: whether a draft is verified depends on what it is."""

    def propose(self, cfg, context, state):
        found = super().propose(cfg, context, state)
        tree = found.tree
        is_good = (tree.tokens != 1).at[:, 0].set(True)
        is_valid = tree.is_valid & jnp.cumprod(is_good, axis=1).astype(bool)
        return found.replace(tree=tree.replace(is_valid=is_valid))


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    ("kind", "num"), [(SpecDecPP, MANY), *more((DropsWhatItSaw, MANY), (SpecDecPP, 10 * MANY))]
)
def test_texts_follow_the_targets_law(kind, num):
    """Three tokens against all there are, with a random head."""
    V, G, rng = 3, 3, np.random.default_rng(1)
    p, q = (rng.dirichlet(np.full(V, 0.5), size=V) + 0.01 for _ in range(2))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    (params, cfg), (draft, _) = markov(p), markov(q)
    own = {"blocks": [], "w": jnp.array(rng.normal(size=(V, 2)), jnp.float32), "b": jnp.zeros(2)}
    drafter = kind(draft, cfg, own=own, threshold=0.5, least=1, num_drafts=3, is_sampled=True)
    method = SpeculativeMethod(drafter, SpeculativeSampling(), Sampling(1.0))
    state = run(params, cfg, method, [[0]] * num, gen_len=G, seeds=7)
    tokens = np.asarray(state.tokens)[:, 1 : G + 1]
    counts = np.bincount(tokens @ V ** np.arange(G)[::-1], minlength=V**G)
    every = itertools.product(range(V), repeat=G)
    expected = num * np.array([p[0, a] * p[a, b] * p[b, c] for a, b, c in every])
    chi_square = ((counts - expected) ** 2 / expected).sum()  # 26 degrees of freedom
    assert chi_square < 63 if kind is SpecDecPP else chi_square > 200  # once in 15,000 times
    assert len(np.unique(state.draft_forwards)) > 2


# ---- What the head learns ---------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_loss_by_hand(toy_cfg, toy_params, small, temperature):
    """Labels, contexts of drafts, and weights, of rows with prompts of other lengths."""
    params, cfg, own = small
    cfg = dataclasses.replace(cfg, eos_token_id=toy_cfg.eos_token_id)
    batch = make_batch(toy_cfg)
    objective = StopLoss(weight=3.0, share=0.0, temperature=temperature)
    learned = Learned(params, Judged(own, toy_cfg), toy_params)
    drafted = draft_of(objective, learned, cfg, batch)
    loss, metrics = loss_of(objective, learned, cfg, batch)
    text = np.concatenate([batch["prompt"], batch["completion"]], axis=1)
    P, total, norm, labels = batch["prompt"].shape[1], 0.0, 0.0, []
    for b in range(len(text)):
        start, end = int(batch["prompt_start"][b]), P + int(batch["completion_len"][b])
        places = range(max(P, start + 1), end)
        p, q = (
            laws_of(own_, cfg_, text[b, start:], temperature or 1.0)
            for own_, cfg_ in ((toy_params, toy_cfg), (params, cfg))
        )
        mixed = text[b].copy()
        for t in places:
            mixed[t] = drafted[b, t]
            if temperature == 0:
                assert drafted[b, t] == q[t - 1 - start].argmax()
        hidden = hidden_of(params, cfg, mixed[start:])
        for t in places:
            z, of_p, of_q = drafted[b, t], p[t - 1 - start], q[t - 1 - start]
            a = float(of_p.argmax() == z) if temperature == 0 else min(1, of_p[z] / of_q[z])
            bad, good = np.asarray(jax.jit(log_verdict)(own, hidden[t - start]))
            total -= a * good + 3 * (1 - a) * bad
            norm += a + 3 * (1 - a)
            labels.append(a)
    np.testing.assert_allclose(loss, total / norm, rtol=1e-4)
    np.testing.assert_allclose(metrics["acceptance"], np.mean(labels), rtol=1e-4)


@functools.partial(jax.jit, static_argnames=("objective", "cfg"))
def draft_of(objective, learned, cfg, batch):
    """[B, T] tokens that the objective drafts of a batch."""
    read = lambda params, cfg: read_text(params, cfg, batch, False).hidden
    key = jax.random.split(CONTEXT.key)[0]
    ours, theirs = read(learned.target, cfg), read(learned.beside, learned.own.target)
    return objective._draft(learned, ours, theirs, key)[0]


def test_the_texts_own_tokens_have_no_label(toy_cfg, toy_params, small):
    params, cfg, own = small
    batch, learned = make_batch(toy_cfg), Learned(params, Judged(own, toy_cfg), toy_params)
    loss, metrics = loss_of(StopLoss(share=1.0), learned, cfg, batch)
    assert loss == 0 and metrics["acceptance"] == 0


def test_files(toy_cfg, toy_params, small, tmp_path):
    params, cfg, own = small
    draft = dlm.LanguageModel(params, cfg)
    StopHead(num_blocks=2, target="somewhere").export(tmp_path, draft, own)
    heads, found = specdec_pp.load(tmp_path / "model", draft)
    assert heads == StopHead(num_blocks=2)
    jax.tree.map(np.testing.assert_array_equal, found, own)
    other = dlm.LanguageModel(toy_params, toy_cfg)
    with pytest.raises(ValueError, match="were trained for model"):
        specdec_pp.load(tmp_path / "model", other)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_head_learns_from_two_models(scan_target, scan_draft, tmp_path):
    config = stop_head.get_config("scan,runlocal")
    config.train.init_from = str(scan_draft)
    config.train.trainable.target = str(scan_target)
    result = loop.run(config, tmp_path / "stop")
    draft, target = dlm.load(scan_draft), dlm.load(scan_target)
    own = specdec_pp.load(result.model_path, draft)[1]
    drafter = SpecDecPP(draft.params, draft.cfg, own=own, num_drafts=6)
    prompts = random_prompts(target.cfg, 2)
    state, plain = (
        run(target.params, target.cfg, SpeculativeMethod(*by), prompts) for by in ((drafter,), ())
    )
    assert texts(state, 2) == texts(plain, 2)


def test_refusals(toy_cfg, toy_params, small):
    params, cfg, own = small
    for drafter, message in (
        (SpecDecPP(params, cfg), "own is a NoneType, which must be the head's parameters"),
        (SpecDecPP(params, cfg, own=(StopHead(), own)), "own is a tuple, .* the second of what"),
        (SpecDecPP(params, cfg, own=own | {"w": jnp.zeros((4, 2))}), r"shape \(4, 2\), which must"),
        (SpecDecPP(params, cfg, own=own, threshold=1.5), r"threshold=1.5 must be in \[0, 1\]"),
        (SpecDecPP(params, cfg, own=own, least=0), "least=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            init_state(toy_cfg, SpeculativeMethod(drafter, Match()), [[1]], gen_len=4)
    with pytest.raises(ValueError, match="target='' must be the folder of the model that judges"):
        StopHead().attach(toy_cfg, Learned(toy_params), own)
