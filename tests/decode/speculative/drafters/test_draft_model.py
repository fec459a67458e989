"""Draft models whose embedding is padded otherwise, or whose context is shorter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import Sampling
from decode.speculative.accept import Match, SpeculativeSampling
from decode.speculative.drafters.draft_model import DraftModel, DraftModelBest, DraftModelTree
from decode.speculative.drafters.no_draft import NoDraft
from decode.speculative.drafters.opt_tree import DraftModelOpt
from decode.speculative.drafters.rsd import DraftModelBeam
from decode.speculative.drafters.smaller_model import SmallerModel
from decode.speculative.drafters.specdec_pp import SpecDecPP
from decode.speculative.loop import SpeculativeMethod
from decode.speculative.tree import branching, from_paths
from dlm.config import ModelConfig
from dlm.params import Params
from tests.lib.speculation import random_prompts, run, texts
from tests.lib.tiers import more

SHAPE = from_paths([[0], [1], [0, 0]])


def padded(cfg: ModelConfig, params: Params, rows: int) -> tuple[ModelConfig, Params]:
    """The same model with more rows of embedding, each of which would be the arg-max."""
    loud = {"embed": 0.0, "unembed": 50.0}
    pad = {
        name: jnp.pad(params[name], ((0, rows), (0, 0)), constant_values=value)
        for name, value in loud.items()
        if name in params
    }
    return dataclasses.replace(cfg, vocab_size=cfg.vocab_size + rows), params | pad


def drafters(params: Params, cfg: ModelConfig) -> dict:
    return {
        "chain": DraftModel(params, cfg, num_drafts=3),
        "tree": DraftModelTree(params, cfg, shape=SHAPE),
        "best": DraftModelBest(params, cfg, width=2, levels=2, budget=4),
        "sampled": DraftModel(params, cfg, num_drafts=3, is_sampled=True),
        "opt": DraftModelOpt(params, cfg, budget=4, levels=3),
        "beam": DraftModelBeam(params, cfg, width=2, levels=2),
        "stops": SpecDecPP.example(cfg, params).replace(layers=None),
    }


@pytest.mark.parametrize("name", more("chain", "tree", "best", "sampled"))
def test_padding_of_the_draft_model_is_never_drafted(toy_cfg, toy_params, name):
    """It drafts what it drafts without the padding: round for round the same is accepted."""
    prompts = random_prompts(toy_cfg, 2)
    sampling, rule = Sampling(None), Match()
    if name == "sampled":
        sampling, rule = Sampling(0.8), SpeculativeSampling()
    bare, other = (
        run(toy_params, toy_cfg, SpeculativeMethod(drafters(*reversed(pair))[name], rule, sampling),
            prompts, gen_len=10)
        for pair in ((toy_cfg, toy_params), padded(toy_cfg, toy_params, 7))
    )  # fmt: skip
    assert texts(bare, 2) == texts(other, 2)
    assert bare.acceptance_histogram.tolist() == other.acceptance_histogram.tolist()


@pytest.mark.exhaustive
def test_padding_of_the_target_is_nothing_to_draft(toy_cfg, toy_params):
    cfg, params = padded(toy_cfg, toy_params, 7)
    params = params | {"unembed": params["unembed"].at[-7:].set(-50.0)}  # nor to write
    prompts = random_prompts(toy_cfg, 2)
    for name, drafter in drafters(toy_params, toy_cfg).items():
        if name == "sampled":
            continue
        state = run(params, cfg, SpeculativeMethod(drafter), prompts, gen_len=10)
        itself = SpeculativeMethod(drafters(params, cfg)[name])
        assert texts(state, 2) == texts(run(params, cfg, itself, prompts, gen_len=10), 2)
        assert int(state.acceptance_histogram[:, 1:].sum()) > 0


def test_diffusion_models_are_no_drafts(toy_cfg, toy_params):
    for change, message in (
        (dict(never_causal=True), "the draft model is a diffusion model, which never"),
        (dict(block_len=4, shifted_logits=False), "the draft model says a token where MASK stands"),
    ):
        for drafter in drafters(toy_params, dataclasses.replace(toy_cfg, **change)).values():
            with pytest.raises(ValueError, match=message):
                drafter.validate(toy_cfg)


def test_a_draft_model_is_parameters_and_configuration(toy_cfg, toy_params):
    message = r"draft is a dict, .* params a ModelConfig, .*: DraftModel\(lm.params, lm.cfg\)"
    with pytest.raises(ValueError, match=message):
        DraftModel(toy_cfg, toy_params).validate(toy_cfg)
    with pytest.raises(ValueError, match="draft is a NoneType, which must be a ModelConfig"):
        DraftModel(toy_params, None).validate(toy_cfg)


def test_trees_wider_than_the_vocabulary_are_refused(toy_cfg, toy_params):
    with pytest.raises(ValueError, match="25 children, and there are 24 different tokens to draft"):
        DraftModelTree(toy_params, toy_cfg, branching(25)).validate(toy_cfg)


def test_other_vocabularies_are_refused(toy_cfg, toy_params):
    far = dataclasses.replace(toy_cfg, vocab_size=toy_cfg.vocab_size + 1025)
    message = f"vocabulary of {toy_cfg.vocab_size} tokens and the target one of {far.vocab_size}"
    with pytest.raises(ValueError, match=message):
        DraftModel(toy_params, toy_cfg).validate(far)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("name", ["tree", *more("chain", "best")])
def test_nothing_is_drafted_beyond_the_context_of_the_draft_model(toy_cfg, toy_params, name):
    """The text goes on, one token per forward; before, it is drafted as ever."""
    prompts = random_prompts(toy_cfg, 1)
    limit = len(prompts[0]) + 8
    target = dataclasses.replace(toy_cfg, eos_token_id=20)  # which does not come up
    short = dataclasses.replace(toy_cfg, max_seq_len=limit)
    whole, cut = (
        run(toy_params, target, SpeculativeMethod(drafters(toy_params, draft)[name]), prompts,
            gen_len=20)
        for draft in (toy_cfg, short)
    )  # fmt: skip
    assert texts(cut, 1) == texts(whole, 1) and len(texts(cut, 1)[0]) == 20
    rounds = np.asarray(cut.step_map[0])
    position = len(prompts[0]) + np.arange(20)
    # A draft at a position is guessed from the one before, which the draft model must be able to
    # see; the last such position is `limit`. What is written later comes one token a round.
    assert len(set(rounds[position > limit + 1])) == (position > limit + 1).sum()
    early = position <= limit - 4
    assert rounds[early].tolist() == np.asarray(whole.step_map[0])[early].tolist()
    assert len(set(rounds[early])) < early.sum()


@pytest.mark.parametrize("name", ["chain", *more("tree", "best", "opt", "beam", "stops")])
def test_what_has_outgrown_the_draft_model_costs_no_forward_of_it(
    toy_cfg, toy_params, name, monkeypatch
):
    """Neither of a prompt that begins beyond its context nor of what is written there; beside
    another row, only the forwards of that one are counted."""
    ran = []
    forward = SmallerModel._forward

    def counted(self, context, window, slots):
        jax.debug.callback(lambda: ran.append(1))
        return forward(self, context, window, slots)

    monkeypatch.setattr(SmallerModel, "_forward", counted)
    short = dataclasses.replace(toy_cfg, max_seq_len=11)
    method = SpeculativeMethod(drafters(toy_params, short)[name])
    plain = SpeculativeMethod(NoDraft())
    new, old = list(range(3)), [i % 20 for i in range(19)]
    prompts, options = [new, old], dict(gen_len=6, chunk=4)
    state = run(toy_params, toy_cfg, method, prompts, **options)
    jax.effects_barrier()
    assert texts(state, 2) == texts(run(toy_params, toy_cfg, plain, prompts, **options), 2)
    assert int(state.draft_forwards[0]) > 0 == int(state.draft_forwards[1])
    assert ran
    ran.clear()
    state = run(toy_params, toy_cfg, method, [old, old[:12]], **options)
    jax.effects_barrier()
    assert int(state.draft_forwards.sum()) == 0
    assert len(ran) == 3  # pieces of the prompt that begin before its end
