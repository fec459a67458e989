"""Other tools' arguments, here. What their loops do with them is in the golden traces."""

import dataclasses
import inspect
import re

import pytest

from decode.diffusion import public
from decode.diffusion.components import (
    COMPONENTS,
    DualCache,
    EndsLast,
    EntropyBudget,
    EosBlock,
    Factor,
    InBlockCache,
    LeftToRight,
    NegEntropy,
    Nucleus,
    Origin,
    PrefixCache,
    Quota,
    Random,
    Tempered,
    Threshold,
)
from decode.generate import Options
from scripts.docs_tables.arguments import arguments
from tests.lib.models import TOY_CFG

LARGE = dataclasses.replace(TOY_CFG, vocab_size=160_000, max_seq_len=4096)  # has published ids


@pytest.mark.parametrize("decoder", public.DECODERS, ids=lambda f: f.__name__)
def test_published_defaults_make_a_method(decoder):
    decoder().validate(LARGE)
    assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(decoder).parameters.values())


KINDS = {kind.__name__: kind for kinds in COMPONENTS.values() for kind in kinds}


@pytest.mark.parametrize("decoder", public.DECODERS, ids=lambda f: f.__name__)
def test_docstrings_name_what_there_is(decoder):
    """Components by their names, with fields that they have; arguments by theirs."""
    for text in arguments(decoder).values():
        for name, rest in re.findall(r"`([A-Z]\w+)([^`]*)`", text):
            fields = {field.name for field in dataclasses.fields(KINDS[name])}
            named = re.findall(r"[(,.]\s*([a-z]\w*)(?==|`|$)", rest) if "." in rest else []
            named += re.findall(r"(\w+)=", rest)
            assert fields.issuperset(named), (name, rest)
        for name in re.findall(r"`([a-z]\w+)`", text):
            known = {
                "generate",
                *vars(public),
                *Options.__annotations__,
                *inspect.signature(decoder).parameters,
            }
            assert name in known, name


def test_llada():
    method = public.llada(steps=64, gen_length=128, block_length=32)
    assert method.rule == Quota(16) and method.temperature is None and method.guidance is None
    method = public.llada(temperature=0.5, cfg_scale=1.0, remasking="random")
    assert (method.temperature, method.guidance) == (0.5, 1.0)
    assert isinstance(method.confidence, Random)
    method = public.llada(logits_eos_inf=True, confidence_eos_eot_inf=True)
    assert method.constraint.ids == (126081,) and method.confidence == EndsLast((126081, 126348))


def test_fast_dllm():
    make = public.fast_dllm
    method = make(threshold=0.9, use_cache=True, block_length=32, steps=1)  # steps are not used
    assert method.rule == Threshold(0.9) and isinstance(method.cache, PrefixCache)
    assert isinstance(make(factor=1.0, use_cache=True, dual_cache=True).cache, DualCache)
    assert make(factor=1.0).rule == Factor(1.0) and make(steps=64).rule == Quota(64)


def test_dream():
    method = public.dream(alg="entropy", temperature=0.3, top_p=0.95, alg_temp=0.0, steps=256)
    assert method.confidence == Tempered(NegEntropy()) and method.rule.alg_temp_units == "nats"
    assert method.constraint == Nucleus(top_p=0.95)
    assert isinstance(public.dream().rule, Origin)


def test_block_diffusion():
    method = public.sdar(remasking_strategy="sequential", temperature=0.9, top_k=50)
    assert isinstance(method.confidence, LeftToRight) and method.rule.threshold is None
    assert public.sdar(stopping_criteria_idx=[7]).stop_ids == (7,)
    assert public.sdar(remasking_strategy="low_confidence_static").rule.threshold is None
    method = public.sdar(remasking_strategy="entropy_bounded", eb_threshold=0.3)
    assert method.rule == EntropyBudget(0.3, counts_last=True)
    assert public.sdar_evaluation(threshold=1.0).rule.threshold is None
    method = public.fast_dllm_v2(use_block_cache=True, temperature=0.7)
    assert method.cache == InBlockCache(32, sub_len=8) and method.constraint.sampling.top_p == 0.95
    assert not public.bd3lm().cache.aligned
    assert public.llada2(steps=32, gen_length=64, minimal_topk=4).rule.steps == 16
    assert isinstance(public.llada2_1().stopper, EosBlock)
    assert public.sglang() == public.llada2()
    joint = public.sglang(dllm_algorithm="JointThreshold", edit_threshold=0.5, threshold=0.7)
    assert joint == public.llada2_1(threshold=0.7, editing_threshold=0.5)
    hierarchy = public.sglang(dllm_algorithm="HierarchyBlock")
    assert hierarchy == public.fast_dllm_v2(threshold=0.9)
    assert public.stable_diffcoder(threshold=0.95).rule == Threshold(0.95)
    assert public.stable_diffcoder(steps=256).rule.steps == 2


@pytest.mark.parametrize(
    ("decoder", "arguments", "message"),
    [
        (public.llada, {"steps": 130, "block_length": 32}, "steps=130 must be a multiple of the 4"),
        (public.llada, {"remasking": "entropy"}, "remasking='entropy' must be one of 'low_conf"),
        (
            public.llada,
            {"remasking": "random", "confidence_eos_eot_inf": True},
            "needs remasking='low_confidence'",
        ),
        (public.fast_dllm, {"threshold": 0.9, "factor": 1.0}, "are two rules: give one"),
        (public.fast_dllm, {"dual_cache": True}, "dual_cache=True needs use_cache=True"),
        (public.dream, {"alg": "random"}, "alg='random' must be one of 'origin'"),
        (public.dream, {"alg_temp": 0.1}, "alg_temp=0.1 goes with an alg that ranks"),
        (public.sdar, {"temperature": 0}, "temperature=0 must be positive"),
        (public.sdar, {"remasking_strategy": "best"}, "must be one of 'low_confidence_dynamic'"),
        (public.sdar, {"remasking_strategy": "entropy_bounded"}, "needs an eb_threshold, in nats"),
        (public.sglang, {"dllm_algorithm": "LinearSpec"}, "must be one of 'LowConfidence', "),
        (public.sglang, {"penalty_lambda": 0.1}, "penalty_lambda=0.1 must be one of 0"),
        (public.stable_diffcoder, {"shift": True}, "shift=True must be one of False"),
    ],
)
def test_what_has_no_equivalent_is_refused(decoder, arguments, message):
    with pytest.raises(ValueError, match=message):
        decoder(**arguments)
