"""Eotp against a loop that really takes the tail off the canvas, and on hand-made rounds."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import DualCache, FixedBlocks, PrefixCache, Quota, Threshold
from decode.diffusion.loop import DiffusionMethod, init_state
from decode.diffusion.stoppers.eotp import Eotp
from decode.generate import collect
from tests.lib import oracle
from tests.lib.batches import LENGTHS, PROMPTS, run
from tests.lib.rounds import make_round
from tests.lib.tiers import more


def row(state, b):
    P, length = state.prompt_len, int(state.end[b]) - state.prompt_len
    return {
        "tokens": state.tokens[b, P : P + length].tolist(),
        "step_map": state.step_map[b, :length].tolist(),
        "num_forwards": int(state.num_forwards[b]),
    }


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    ("rule", "block_len", "cut_at"),
    [
        (("threshold", 0.7), 12, "committed"),
        *more(
            (("quota", 4), 4, "predicted"),
            (("quota", 4), 4, "committed"),
            (("quota", 4), 12, "predicted"),
            (("quota", 4), 12, "committed"),
            (("threshold", 0.7), 4, "predicted"),
            (("threshold", 0.7), 4, "committed"),
            (("threshold", 0.7), 12, "predicted"),
        ),
    ],
)
def test_masking_behind_the_end_is_taking_the_tail_off(toy_model, rule, block_len, cut_at):
    """Card, check 5: what stands before the cut is what a model gives that never saw the rest."""
    cfg, params = toy_model
    name, value = rule
    method = DiffusionMethod(
        FixedBlocks(block_len), rule={"quota": Quota, "threshold": Threshold}[name](value)
    )
    full = run(params, cfg, method)
    came_up = np.unique(np.asarray(full.tokens)[np.asarray(full.tokens) != cfg.pad_token_id])
    shorter = 0
    for eot in came_up.tolist():
        cut = method.replace(stopper=Eotp(cut_at, jnp.int32(eot)))  # an id is data: one program
        state = run(params, cfg, cut, prompt_len=8)
        for b, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
            expected = oracle.decode(  # on a canvas that really becomes shorter
                oracle.Model(params, cfg), prompt, length, scheduler=("fixed", block_len),
                rule=rule, stopper=("eotp", eot, cut_at), banned=(cfg.mask_token_id,),
            )  # fmt: skip
            assert row(state, b) == {name: expected[name] for name in row(state, b)}
            shorter += len(expected["tokens"]) < length
            if cut_at == "committed" and len(expected["tokens"]) < length:
                assert expected["tokens"][-1] == eot
    assert shorter > 0


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    ("cache", "cut_at"), [(PrefixCache(), "predicted"), *more((DualCache(), "committed"))]
)
def test_quotas_never_need_more_forwards(toy_cfg, toy_params, cache, cut_at):
    method = DiffusionMethod(FixedBlocks(4), cache, rule=Quota(4), temperature=0.5)
    full = run(toy_params, toy_cfg, method, seeds=3)
    tokens = np.asarray(full.tokens)[:, full.prompt_len :]
    eot = int(np.bincount(tokens[tokens != toy_cfg.pad_token_id]).argmax())
    cut = run(toy_params, toy_cfg, method.replace(stopper=Eotp(cut_at, eot)), seeds=3)
    saved = np.asarray(full.num_forwards) - np.asarray(cut.num_forwards)
    assert (saved >= 0).all() and saved.sum() > 0


@pytest.mark.exhaustive(every=4)
def test_the_models_end_of_text_is_the_default(toy_model):
    cfg, params = toy_model
    method = DiffusionMethod(FixedBlocks(4), rule=Quota(4))
    tokens = run(params, cfg, method).tokens[0, 6:].tolist()
    cfg = dataclasses.replace(cfg, eos_token_id=tokens[2])
    given = run(params, cfg, method.replace(stopper=Eotp(eot_id=tokens[2])))
    default = run(params, cfg, method.replace(stopper=Eotp()))
    np.testing.assert_array_equal(default.tokens, given.tokens)
    assert int(default.end[0]) < int(default.tokens.shape[1])


def test_any_of_several_ends_cuts(toy_cfg):
    """Position i proposes token i: the surest of ends 3 and 5, then the first that is committed."""
    cfg = dataclasses.replace(toy_cfg, eos_token_id=5, more_eos_ids=(3,))
    round = make_round([0.1, 0.2, 0.3, 0.6, 0.5, 0.9])
    state = Eotp().init(cfg, 1, 6)
    none = jnp.zeros((1, 6), bool)
    assert Eotp().cut(round, none, state).tolist() == [6]
    assert Eotp().cut(round, none.at[0, 3:].set(True), state).tolist() == [4]
    assert Eotp(eot_id=3).cut(round, none, Eotp(eot_id=3).init(cfg, 1, 6)).tolist() == [4]


def test_a_completion_ends_at_the_cut(toy_model):
    """Every array has one entry per position that is left."""
    cfg, params = toy_model
    method = DiffusionMethod(FixedBlocks(4), rule=Quota(4))
    eot = int(run(params, cfg, method).tokens[0, 6 + 2])
    cfg = dataclasses.replace(cfg, eos_token_id=eot)
    state = run(params, cfg, method.replace(stopper=Eotp("committed")))
    lm = types.SimpleNamespace(cfg=cfg, tokenizer=None)
    for b, got in enumerate(collect(state, lm, method, num=len(PROMPTS))):
        n = int(state.end[b]) - state.prompt_len
        assert len(got.canvas) == len(got.step_map) == len(got.confidence) == n
        assert (got.step_map >= 0).all() and eot not in got.tokens
        assert len(got.tokens) == (n - 1 if got.finish_reason == "eos" else n)
        assert got.num_forwards > got.step_map.max()
        if n < LENGTHS[b]:
            assert got.finish_reason == "eos" and got.canvas[-1] == eot


# Hand-made rounds: eight positions that propose EOT (7) or something else, completion positions 4
# to 11 of 10: the last two do not exist.
CONFIDENCE = [0.9, 0.2, 0.6, 0.3, 0.8, 0.6, 0.95, 0.99]


def ends(cut_at, eots, commit=(), undecided=range(8), confidence=CONFIDENCE):
    """Where the row ends, as a position of the window; 6: nowhere earlier."""
    mark = lambda places: jnp.asarray([[i in places for i in range(8)]])
    view = make_round(confidence, eligible=mark(list(undecided)))
    view = view.replace(
        proposal=jnp.where(mark(eots), 7, 1), index=4 + view.index, gen_len=jnp.array([10])
    )
    end = Eotp(cut_at).cut(view, mark(commit), jnp.array([[7]]))
    return int(end[0]) - 4


@pytest.mark.parametrize(
    ("options", "predicted", "committed"),
    [
        (dict(eots=[]), 6, 6),  # nobody proposes EOT
        (dict(eots=[], commit=[1, 3]), 6, 6),
        (dict(eots=[1, 2], commit=[1, 2]), 2, 2),  # the first committed
        (dict(eots=[2, 4], commit=[2, 3]), 3, 3),  # even if an undecided one is surer
        (dict(eots=[0, 4], commit=[4], undecided=[4, 5]), 5, 5),
        (dict(eots=[1, 4], commit=[0]), 5, 6),  # the surest, not the first
        (dict(eots=[2, 5], commit=[0]), 3, 6),  # on ties the first
        (dict(eots=[0, 1], commit=[3], undecided=[1, 3]), 2, 6),  # only undecided ones may hope
        (dict(eots=[0], commit=[3], undecided=[1, 3]), 6, 6),
        (dict(eots=[1, 6, 7], commit=[3]), 2, 6),  # 6 and 7 are past the end
        (dict(eots=[6, 7], commit=[6]), 6, 6),
        (dict(eots=[3, 5], confidence=[0.0] * 8), 4, 6),  # no confidence at all: the first
    ],
)
def test_hand_made_rounds(options, predicted, committed):
    assert ends("predicted", **options) == predicted
    assert ends("committed", **options) == committed


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DiffusionMethod(stopper=Eotp("maybe")), "cut_at='maybe' must be 'predicted' or"),
        (DiffusionMethod(stopper=Eotp(eot_id=99)), r"eot_id=99 must be in \[0, 23\]"),
        (
            DiffusionMethod(cache=DualCache(), stopper=Eotp()),
            "Eotp must see the whole suffix, but DualCache recomputes only the block",
        ),
    ],
)
def test_refusals(toy_cfg, method, message):
    with pytest.raises(ValueError, match=message) as refusal:
        init_state(toy_cfg, method, [[1]], gen_len=4)
    assert str(refusal.value).count(". ") == 0
    for cut_at, cache in (("committed", DualCache()), ("predicted", PrefixCache())):
        method = DiffusionMethod(cache=cache, stopper=Eotp(cut_at))
        init_state(toy_cfg, method, [[1]], gen_len=4)
