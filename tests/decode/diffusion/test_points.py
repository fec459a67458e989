"""Random points of the product of components, against the plain-Python oracle."""

import functools

import hypothesis
import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dlm
from decode.diffusion.components import (
    AdaBlock,
    Annealed,
    DelayedCache,
    DreamQuota,
    DualCache,
    EntropyBudget,
    EntropyThreshold,
    Eos,
    EosBlock,
    Eotp,
    Factor,
    Filled,
    FixedBlocks,
    Hierarchical,
    Keep,
    Klass,
    LocalLeap,
    Margin,
    MultiBlock,
    NarrowOut,
    NoCache,
    Nucleus,
    Origin,
    PrefixCache,
    Prophet,
    Quota,
    Remask,
    ReMDM,
    RunningConfidence,
    SlowFast,
    SubBlocks,
    Tempered,
    Threshold,
    TokenBan,
    TokenEdit,
    VicinityCache,
    WideIn,
    short_names,
)
from decode.diffusion.loop import DiffusionMethod
from tests.lib import oracle
from tests.lib.batches import LENGTHS, PROMPTS
from tests.lib.models import TOY_CFG, dream_toy, spread
from tests.lib.paths import GOLDEN
from tests.lib.rows import assert_same, run
from tests.lib.tiers import more
from tests.lib.weights import init_params

RULES = {
    "quota": Quota,
    "threshold": Threshold,
    "factor": Factor,
    "entropy": EntropyThreshold,
    "dream": DreamQuota,
    "origin": Origin,
    "local_leap": lambda value: LocalLeap(*value),
    "hierarchical": lambda value: Hierarchical(*value),
    "entropy_budget": EntropyBudget,
    "klass": lambda value: Klass(*value),
    "wide_in": WideIn,
}

SCHEDULERS = {
    "fixed": FixedBlocks,
    "adablock": lambda n, share, bar, ids: AdaBlock(ids, n, threshold=bar, share=share),
    "multi_block": MultiBlock,
    "sub_blocks": SubBlocks,
    "slow_fast": SlowFast,
}
NAMED_CACHES = {
    "none": NoCache,
    "prefix": PrefixCache,
    "dual": DualCache,
    "vicinity": lambda before, after: VicinityCache(before=before, after=after),
    "delayed": DelayedCache,
}
# Measures that only order positions have tests of their own.
MEASURES = {
    name: kind for name, kind in short_names("confidence").items() if not kind.only_orders
} | {
    "tempered": lambda: Tempered(Margin()),
    "annealed": lambda: Annealed(steps=8),
}
REVISERS = {
    "keep": Keep,
    "wino": NarrowOut,
    "token_edit": TokenEdit,
    "remask": Remask,
    "running_confidence": RunningConfidence,
    "remdm": ReMDM,
}
ENDS = {
    "filled": Filled,
    "eos": Eos,
    "eos_block": EosBlock,
    "prophet": lambda first, length, *bars: Prophet(first, length, None, *bars),
    "eotp": lambda eot, cut_at: Eotp(cut_at, eot),
}
DELIMITERS = tuple(range(0, 24, 2))
CHOICES = {
    "rule": [
        ("quota", 1), ("quota", 3), ("quota", 4), ("threshold", 0.0), ("threshold", 0.7),
        ("threshold", 1.0), ("factor", 0.7), ("factor", 1.9), ("entropy", 0.0), ("entropy", 0.5),
        ("dream", 1), ("dream", 4), ("origin", 3), ("local_leap", (0.7, 0.3, 2)),
        ("local_leap", (0.9, 0.0, 9)), ("hierarchical", (0.7, 0.3)), ("klass", (0.3, 0.5, 1)),
        ("klass", (0.2, 2.0, 2)), ("entropy_budget", 0.0), ("entropy_budget", 0.8),
        ("wide_in", 0.3),
    ],
    "scheduler": [
        ("fixed", 4), ("fixed", 7), ("adablock", 4, 0.25, 0.1, DELIMITERS),
        ("adablock", 3, 0.5, 0.0, DELIMITERS), ("multi_block", 4, 2, 0.5, 1.0, 0.0),
        ("multi_block", 3, 4, 0.3, 0.9, 0.5), ("sub_blocks", 6, 2), ("sub_blocks", 4, 3),
        ("slow_fast", 12, 2, 0.3), ("slow_fast", 6, 3, 0.2),
    ],
    "cache": [
        ("none",), ("prefix",), ("dual",), ("vicinity", 2, 3), ("delayed", 3), ("delayed", 100),
    ],
    "confidence": sorted(MEASURES),
    "reviser": [
        ("keep",), ("keep",), ("wino", 0.3), ("token_edit", 0.3, 3), ("remask", 2, 2, 0.5),
        ("running_confidence",), ("remdm", 3, 0.4),
    ],
    "stopper": [
        ("filled",), ("eos",), ("eos_block",), ("prophet", 3, 4, 2.0, 1.2, 0.5),
        ("eotp", 7, "predicted"), ("eotp", 7, "committed"),
    ],
    "constraint": [None, None, ("nucleus", 0.8, 5)],
    "temperature": [None, None, 0.7],
    "guidance": [None, None, 0.5],
    "lookahead": [0, 0, 0, 2],
}  # fmt: skip


def build(point):
    """The method of a point given in the oracle's words."""
    make = lambda table, words: table[words[0]](*words[1:])
    constraint = point["constraint"]
    return DiffusionMethod(
        scheduler=make(SCHEDULERS, point["scheduler"]),
        cache=make(NAMED_CACHES, point["cache"]),
        confidence=MEASURES[point["confidence"]](),
        rule=make(RULES, point["rule"]),
        reviser=make(REVISERS, point["reviser"]),
        stopper=make(ENDS, point["stopper"]),
        constraint=TokenBan() if constraint is None else Nucleus(*constraint[1:]),
        temperature=point["temperature"],
        guidance=point["guidance"],
        lookahead=point["lookahead"],
    )


def makes_sense(point, cfg):
    try:
        build(point).validate(cfg)
    except ValueError as refusal:
        assert str(refusal).count(". ") == 0  # one sentence
        return False
    return True


@st.composite
def points(draw):
    """A model, and a random point of the product of components that makes sense for it."""
    name = draw(st.sampled_from(["toy", "dream", "trained"]))
    cfg, _ = MODELS[name]()
    fields = {axis: st.sampled_from(choices) for axis, choices in CHOICES.items()}
    return name, draw(st.fixed_dictionaries(fields).filter(lambda point: makes_sense(point, cfg)))


@functools.cache
def toy():
    return TOY_CFG, spread(init_params(jax.random.key(0), TOY_CFG))


@functools.cache
def trained():
    lm = dlm.load(GOLDEN / "llada_small")
    return lm.cfg, lm.params


MODELS = {"toy": toy, "dream": dream_toy, "trained": trained}
# Copy, reverse and sort in the words of the trained model's task; other models do not mind.
QUESTIONS = [[40, 50, 31, 23, 26, 51], [41, 50, 21, 35, 51], [42, 50, 36, 12, 51], [43, 50, 11, 51]]


def check(drawn, seed):
    """A ragged batch equals the oracle row by row."""
    name, point = drawn
    cfg, params = MODELS[name]()
    prompts = QUESTIONS if name == "trained" else PROMPTS
    rows = run(params, cfg, build(point), prompts, gen_len=LENGTHS, seeds=seed)
    model = oracle.Model(params, cfg)
    told = {axis: words for axis, words in point.items() if axis != "lookahead"}
    for b, (prompt, length) in enumerate(zip(prompts, LENGTHS, strict=True)):
        banned = (cfg.mask_token_id,)
        expected = oracle.decode(model, prompt, length, banned=banned, seed=seed + b, **told)
        if point["lookahead"]:
            assert rows[b].pop("num_forwards") <= expected.pop("num_forwards")
        assert_same(rows[b], expected)


sparse = settings(suppress_health_check=[HealthCheck.filter_too_much])


@pytest.mark.exhaustive(every=4)
@settings(sparse, max_examples=3)
@given(drawn=points(), seed=st.integers(0, 3))
def test_some_points_equal_the_oracle(drawn, seed):
    check(drawn, seed)


@pytest.mark.parametrize("part", more(*range(20)))
def test_many_points_equal_the_oracle(part):
    @hypothesis.seed(part)
    @settings(sparse, max_examples=10)
    @given(drawn=points(), seed=st.integers(0, 3))
    def test(drawn, seed):
        check(drawn, seed)

    test()
