import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from decode.diffusion.components import (
    DreamQuota,
    DualCache,
    EntropyThreshold,
    Eos,
    Factor,
    Filled,
    FixedBlocks,
    Keep,
    Margin,
    NegEntropy,
    NoCache,
    PrefixCache,
    Probability,
    Quota,
    Random,
    Threshold,
    TokenBan,
    by_name,
)
from decode.diffusion.contracts import CommitRule, Confidence, Constraint, Reviser
from decode.diffusion.loop import DiffusionMethod, _step_jitted, decode, init_state, stream
from decode.diffusion.points import METHODS
from decode.diffusion.round import Revision
from dlm.sharding import make_mesh
from tests.lib import oracle
from tests.lib.batches import PROMPTS
from tests.lib.rows import assert_same, rows, run
from tests.lib.tiers import more, often
from tests.lib.weights import init_params


@pytest.mark.parametrize("cache", ["dual", *often("none", "prefix")])
def test_each_row_equals_itself_alone_for_every_quorum_and_padding(toy_cfg, toy_params, cache):
    method = DiffusionMethod(FixedBlocks(4), by_name("cache", cache), rule=Threshold(0.4))
    method = method.replace(temperature=0.5, stopper=Eos())
    alone = [
        run(toy_params, toy_cfg, method, [prompt], gen_len=12, seeds=[7 + b], prompt_len=10)[0]
        for b, prompt in enumerate(PROMPTS)
    ]
    assert len({row["num_forwards"] for row in alone}) > 1  # rows really differ in pace
    for quorum in (0.0, 0.5, 1.0):
        if cache != "none":
            method = method.replace(cache=method.cache.replace(quorum=quorum))
        together = run(
            toy_params, toy_cfg, method, gen_len=12, seeds=7, prompt_len=20, batch_size=8
        )
        for got, expected in zip(together, alone, strict=True):
            assert_same(got, expected)


def test_streaming_makes_the_same_rounds(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), DualCache(), rule=Threshold(0.4))
    expected = run(toy_params, toy_cfg, method, gen_len=12)
    first = init_state(toy_cfg, method, PROMPTS, gen_len=12)
    steps = []
    for state in stream(toy_params, toy_cfg, method, first):
        steps.append(int((state.step_map >= 0).sum()))
    assert rows(state) == expected
    assert steps == sorted(set(steps)) and steps[-1] == 4 * 12  # every round commits something


def test_one_compile_for_thresholds_seeds_and_lengths_in_a_bucket(toy_cfg, toy_params):
    decode.clear_cache()
    method = DiffusionMethod(FixedBlocks(4), DualCache(), rule=Threshold(0.5), temperature=1.0)
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9):
        for seed in (0, 1, 2):
            for prompts in ([[1, 2]], [[1, 2, 3, 4, 5]]):
                point = method.replace(rule=Threshold(threshold))
                run(toy_params, toy_cfg, point, prompts, gen_len=8, seeds=seed, prompt_len=8)
    assert decode._cache_size() == 1


def test_cache_is_donated_and_the_loop_never_talks_to_the_host(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), DualCache(), rule=Threshold(0.5))
    state = init_state(toy_cfg, method, PROMPTS, gen_len=12)
    cache_bytes = state.cache.kv.num_bytes
    compiled = decode.lower(toy_params, toy_cfg, method, state).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes
    placed = jax.device_put((toy_params, method, state))
    decode(placed[0], toy_cfg, *placed[1:])  # compiles
    placed = jax.device_put((toy_params, method, init_state(toy_cfg, method, PROMPTS, gen_len=12)))
    with jax.transfer_guard("disallow"):
        out = decode(placed[0], toy_cfg, *placed[1:])
    assert placed[2].cache.kv.k.is_deleted()
    assert bool(out.has_stopped.all())


def test_components_of_different_types_are_different_pytrees():
    """Otherwise the jit cache may take one for the other; JAX itself forgets the types."""
    alike = [Probability(), Margin(), NegEntropy(), Random(), NoCache(), Keep(), Filled(), Eos()]
    alike += [Threshold(), EntropyThreshold(), PrefixCache(), DualCache(), Quota()]
    structures = [jax.tree.structure(component) for component in alike]
    for i, a in enumerate(structures):
        assert [j for j, b in enumerate(structures) if a == b] == [i]
    again = jax.tree.unflatten(*reversed(jax.tree.flatten(Threshold(0.3))))
    assert again == Threshold(0.3) and type(again) is Threshold


def test_no_two_arrays_of_a_state_share_memory(toy_cfg):
    """They are donated: one would be overwritten with another."""
    for block_len in (None, 4):
        method = DiffusionMethod(FixedBlocks(block_len), DualCache())
        state = init_state(toy_cfg, method, PROMPTS, gen_len=12)
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
        assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize(
    "axes",
    [
        dict(fsdp=2, tensor=2),
        dict(data=2, sequence=4),
        *more(
            dict(data=8),
            dict(data=4, tensor=2),
            dict(data=2, tensor=4),
            dict(tensor=8),
            dict(tensor=2, sequence=2),
        ),
    ],
    ids=str,
)
def test_sharded_equals_unsharded(toy_cfg, toy_params, axes):
    """Also where the mesh does not divide the key/value heads, or any heads; slots may be split."""
    from dlm.params import param_shardings

    method = DiffusionMethod(FixedBlocks(4), DualCache(), rule=Threshold(0.4))
    expected = run(toy_params, toy_cfg, method, gen_len=12, batch_size=8)
    mesh = make_mesh(**axes)
    params = jax.device_put(toy_params, param_shardings(toy_cfg, mesh))
    with jax.set_mesh(mesh):
        state = init_state(toy_cfg, method, PROMPTS, gen_len=12, batch_size=8)
        assert len(state.cache.kv.k.sharding.device_set) == mesh.size
        state = decode(params, toy_cfg, method, state)
    for got, one in zip(rows(state), expected, strict=False):
        assert_same(got, one)


def test_threshold_at_its_ends(toy_cfg, toy_params):
    """Fast-dLLM card: tau = 1 is one token per step, tau = 0 one step per block."""
    method = DiffusionMethod(FixedBlocks(4), NoCache())
    one = run(toy_params, toy_cfg, method.replace(rule=Threshold(1.0)), gen_len=12)
    quota = run(toy_params, toy_cfg, method.replace(rule=Quota(4)), gen_len=12)
    assert one == quota
    assert {r["num_forwards"] for r in one} == {12}
    zero = run(toy_params, toy_cfg, method.replace(rule=Threshold(0.0)), gen_len=12)
    assert {r["num_forwards"] for r in zero} == {3}


def test_block_of_one_is_left_to_right(toy_cfg, toy_params):
    for r in run(toy_params, toy_cfg, DiffusionMethod(FixedBlocks(1), NoCache()), gen_len=6):
        assert r["step_map"] == list(range(6))


def test_quota_spreads_masks_evenly(toy_cfg, toy_params):
    for steps in (1, 2, 3, 5, 7, 12):
        method = DiffusionMethod(FixedBlocks(None), rule=Quota(steps))
        counts = np.bincount(run(toy_params, toy_cfg, method, gen_len=12)[0]["step_map"])
        assert counts.sum() == 12 and len(counts) == steps
        assert counts.max() - counts.min() <= 1 and (np.diff(counts) <= 0).all()


@pytest.mark.parametrize("steps", [24, *more(8, 50)])
def test_dream_schedule_commits_what_the_public_sampler_does(toy_cfg, toy_params, steps):
    """Dream card: 0, 1, ..., 1, 2 for as many steps as tokens."""
    method = DiffusionMethod(FixedBlocks(None), rule=DreamQuota(steps, may_idle=True))
    step_map = run(toy_params, toy_cfg, method, [[1]], gen_len=steps)[0]["step_map"]
    assert np.bincount(step_map).tolist() == [0, *[1] * (steps - 2), 2]
    method = DiffusionMethod(FixedBlocks(None), rule=DreamQuota(steps))
    assert max(run(toy_params, toy_cfg, method, [[1]], gen_len=steps)[0]["step_map"]) < steps


def test_guidance_of_zero_changes_nothing_but_the_cost(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), DualCache(), rule=Threshold(0.4))
    plain = run(toy_params, toy_cfg, method, gen_len=8)
    guided = run(toy_params, toy_cfg, method.replace(guidance=0.0), gen_len=8)
    for a, b in zip(plain, guided, strict=True):
        assert a["tokens"] == b["tokens"] and b["num_forwards"] == 2 * a["num_forwards"]


def test_banned_tokens_never_appear(toy_cfg, toy_params):
    plain = run(toy_params, toy_cfg, DiffusionMethod(FixedBlocks(4)), gen_len=12)
    used = sorted({token for r in plain for token in r["tokens"]})[:3]
    method = DiffusionMethod(FixedBlocks(4), constraint=TokenBan(tuple(used)))
    for r in run(toy_params, toy_cfg, method, gen_len=12):
        assert not set(r["tokens"]) & {*used, toy_cfg.mask_token_id}


def test_sampled_tokens_follow_softmax_and_seeds_are_per_request(toy_cfg, toy_params):
    """One position, one step: 4096 seeds against the model's law at temperature 0.8."""
    n = 4096
    method = DiffusionMethod(FixedBlocks(1), temperature=0.8)
    options = dict(gen_len=1, seeds=list(range(n)))
    rows = run(toy_params, toy_cfg, method, [[3, 1]] * n, **options)
    model = oracle.Model(toy_params, toy_cfg)
    z = model.logits(model.run([3, 1, toy_cfg.mask_token_id], range(3))[0][-1]) / 0.8
    z[toy_cfg.mask_token_id] = -np.inf
    p = np.exp(z - z.max())
    p /= p.sum()
    counts = np.bincount([r["tokens"][0] for r in rows], minlength=len(p))
    large = p * n >= 5
    chi2 = ((counts - p * n)[large] ** 2 / (p * n)[large]).sum()
    assert chi2 < 60  # 24 tokens: the 0.9999 quantile with 23 degrees of freedom is 57
    again = run(toy_params, toy_cfg, method, [[3, 1]], gen_len=1, seeds=[17])
    assert again[0]["tokens"] == rows[17]["tokens"]


@struct.dataclass
class LogitConfidence(Confidence):
    """Probability read from logits: what a component that needs them looks like."""

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def measure(self, view, state: Any):
        log_p = jax.nn.log_softmax(view.logits)
        log_prob = jnp.take_along_axis(log_p, view.proposal[..., None], axis=-1)[..., 0]
        return view.replace(confidence=log_prob), state


@struct.dataclass
class OddOnly(Constraint):
    """Allows odd ids only, through logits."""

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def banned_ids(self, cfg):
        return None

    def mask_logits(self, frame, logits, state):
        odd = (jnp.arange(logits.shape[-1]) % 2 == 1)[None, None]
        return jnp.where(odd, logits, -jnp.inf)


def test_components_may_ask_for_logits(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), rule=Threshold(0.4))
    plain = run(toy_params, toy_cfg, method, gen_len=8)
    with_logits = run(toy_params, toy_cfg, method.replace(confidence=LogitConfidence()), gen_len=8)
    for a, b in zip(with_logits, plain, strict=True):
        assert_same(a, b)
    odd = run(toy_params, toy_cfg, method.replace(constraint=OddOnly()), gen_len=8)
    assert all(token % 2 for r in odd for token in r["tokens"])


@pytest.mark.parametrize("stride", [5, *more(1)])
def test_no_logits_are_stored_unless_asked_for(toy_cfg, stride):
    """No [batch, positions, vocabulary] in the program of any method that does not declare it."""
    cfg = dataclasses.replace(toy_cfg, d_ff=20)  # no axis of the weights is as long as this one
    params = init_params(jax.random.key(0), cfg)
    logits = re.compile(rf"tensor<\d+x\d+x{cfg.vocab_size}xf32>")

    def stores_logits(method):
        state = init_state(cfg, method, PROMPTS, gen_len=8)
        text = _step_jitted.lower(params, cfg, method, state).as_text()
        return logits.search(text) is not None

    assert stores_logits(DiffusionMethod(FixedBlocks(4), confidence=LogitConfidence()))
    methods = [make(4) for make in METHODS.values()]
    programs = {jax.tree.structure(m): m for m in methods if "logits" not in m.needs}
    assert len(programs) > 20
    some = list(programs.values())[::stride]
    wrong = [m for m in some if "AdaBlock" not in str(m) and stores_logits(m)]
    assert not wrong


@struct.dataclass
class TakeBackOnce(Reviser):
    """Takes every row's first commits back, once: the contract of a reviser."""

    def init(self, cfg, batch_size, window_len):
        return jnp.zeros(batch_size, bool)

    def revise(self, view, commit, state):
        return Revision(commit, commit & ~state[:, None]), state | True


def test_a_reviser_may_take_tokens_back(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), DualCache(), rule=Threshold(0.4))
    plain = run(toy_params, toy_cfg, method, gen_len=8)
    revised = run(toy_params, toy_cfg, method.replace(reviser=TakeBackOnce()), gen_len=8)
    for a, b in zip(plain, revised, strict=True):
        assert b["num_forwards"] >= a["num_forwards"] and min(b["step_map"]) > 0


@struct.dataclass
class Stubborn(CommitRule):
    """Commits nothing, ever."""

    def commit(self, view, state):
        return jnp.zeros_like(view.eligible), state


def test_the_loop_guarantees_progress(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), rule=Stubborn())
    one = run(toy_params, toy_cfg, method.replace(rule=Quota(4)), gen_len=8)
    assert run(toy_params, toy_cfg, method, gen_len=8) == one


def test_eos_stopper_gives_the_same_text_with_no_more_forwards(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), rule=Threshold(0.5))
    used = run(toy_params, toy_cfg, method, gen_len=16)
    eos = max(used[0]["tokens"], key=used[0]["tokens"].count)  # a token that does come up
    cfg = dataclasses.replace(toy_cfg, eos_token_id=eos)
    full = run(toy_params, cfg, method, gen_len=16)
    short = run(toy_params, cfg, method.replace(stopper=Eos()), gen_len=16)
    saved = 0
    for a, b in zip(full, short, strict=True):
        cut = lambda tokens: (tokens + [eos])[: (tokens + [eos]).index(eos)]
        assert cut(a["tokens"]) == cut(b["tokens"])
        saved += a["num_forwards"] - b["num_forwards"]
    assert saved > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts=[]), "empty list"),
        (dict(prompts=[[1, 23]]), "contains the mask token 23"),
        (dict(prompts=[[24]]), r"token 24, which must be in \[0, vocab_size=24\)"),
        (dict(prompts=[[1] * 60]), "60 tokens, which with gen_len=8 is more than .*64"),
        (dict(gen_len=0), "gen_len=0 of prompt 0 must be at least 1"),
        (dict(gen_len=[8, 8]), "gen_len has 2 entries for 1 prompts"),
        (dict(seeds=[1, 2]), "seeds has 2 entries"),
        (dict(prompt_len=1), "prompt_len=1"),
    ],
)
def test_bad_requests_are_refused(toy_cfg, arguments, message):
    arguments = dict(prompts=[[1, 2]], gen_len=8) | arguments
    prompts = arguments.pop("prompts")
    with pytest.raises(ValueError, match=message):
        init_state(toy_cfg, DiffusionMethod(), prompts, **arguments)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DiffusionMethod(rule=Threshold(1.5)), r"threshold=1.5 must be in \[0, 1\]"),
        (DiffusionMethod(rule=Quota(0)), "steps_per_block=0 must be at least 1"),
        (DiffusionMethod(rule=Factor(-1.0)), "factor=-1 must be at least 0"),
        (DiffusionMethod(rule=EntropyThreshold(-1.0)), "max_entropy=-1 must be at least 0 nats"),
        (DiffusionMethod(rule=DreamQuota(0)), "steps=0"),
        (DiffusionMethod(FixedBlocks(0)), "block_len=0 must be at least 1"),
        (DiffusionMethod(cache=PrefixCache(quorum=2.0)), r"quorum=2 must be in \[0, 1\]"),
        (DiffusionMethod(constraint=TokenBan((99,))), "banned id 99"),
        (DiffusionMethod(temperature=-1.0), "temperature=-1 must be positive"),
        (DiffusionMethod(guidance=-1.0), "guidance=-1 must be at least 0"),
    ],
)
def test_bad_methods_are_refused(toy_cfg, method, message):
    with pytest.raises(ValueError, match=message):
        init_state(toy_cfg, method, [[1]], gen_len=4)


def test_models_without_mask_or_prompt_are_refused(toy_cfg, toy_dream):
    causal = dataclasses.replace(toy_cfg, mask_token_id=None)
    with pytest.raises(ValueError, match="needs a model with a MASK token"):
        init_state(causal, DiffusionMethod(), [[1]], gen_len=4)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        init_state(toy_dream[0], DiffusionMethod(), [[]], gen_len=4)
    init_state(toy_cfg, DiffusionMethod(), [[]], gen_len=4)  # unconditional: fine


def test_random_confidence_and_probability_order_differ(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(8), rule=Quota(8))
    a = run(toy_params, toy_cfg, method.replace(confidence=Probability()), gen_len=8)
    b = run(toy_params, toy_cfg, method.replace(confidence=Random()), gen_len=8)
    assert [r["step_map"] for r in a] != [r["step_map"] for r in b]
