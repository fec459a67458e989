"""Golden traces: what the methods' public decoders do on small checkpoints, reproduced exactly.

Where the public code wastes a forward or an empty step, the bit-faithful option that reproduces its
counts is named here (`follow_up`, `may_idle`, `commit_last`); the defaults do better.
"""

import json

import numpy as np
import pytest

import dlm
from decode.diffusion.components import (
    AdaBlock,
    DreamQuota,
    DualCache,
    EntropyThreshold,
    Factor,
    FixedBlocks,
    Margin,
    NarrowOut,
    NegEntropy,
    NoCache,
    PrefixCache,
    Probability,
    Prophet,
    Quota,
    Threshold,
    TokenBan,
    WideIn,
)
from decode.diffusion.loop import DiffusionMethod, decode, init_state, stream
from tests.lib.paths import GOLDEN
from tests.lib.public_llada import Float32Softmax, PublicTopK


def cases(folder, file="traces.json"):
    traces = json.loads((GOLDEN / folder / file).read_text())
    for case in traces["cases"]:
        case = {"method": traces.get("method", file[7:-5]), **case}
        name = f"{case['method']}-{json.dumps(case['arguments'])}"
        yield pytest.param(folder, traces["prompts"], case, id=name)


def method_of(case, gen_len):
    """The public decoder's arguments in this library's words."""
    a, name = case["arguments"], case["method"]
    block_len = a.get("block_length")
    if name.startswith("dream_"):  # bans MASK, as recorded in the traces' note
        confidence = {"maskgit_plus": Probability, "topk_margin": Margin, "entropy": NegEntropy}
        return DiffusionMethod(
            scheduler=FixedBlocks(None),
            confidence=confidence[a["alg"]](),
            rule=DreamQuota(a["steps"], may_idle=True),
        )
    method = DiffusionMethod(FixedBlocks(block_len), constraint=TokenBan(ban_mask=False))
    if name == "llada_quota":
        # The float32 softmax and the tie order of the public code; see public_llada.py.
        steps = a["steps"] * block_len // gen_len
        return method.replace(confidence=Float32Softmax(), rule=PublicTopK(steps))
    if name == "factor":
        return method.replace(rule=Factor(a["factor"], commit_last=True))
    if name == "entropy_threshold":
        return method.replace(rule=EntropyThreshold(a["threshold"]))
    if name == "prophet":
        thresholds = a["early_exit_thresholds"]
        stopper = Prophet(a["answer_offset"], total_steps=a["steps"], **thresholds)
        steps = a["steps"] * block_len // gen_len
        rule, confidence = PublicTopK(steps), Float32Softmax()
        return method.replace(stopper=stopper, rule=rule, confidence=confidence)
    if name == "wino":
        reviser = NarrowOut(a["threshold_back"])
        return method.replace(rule=WideIn(a["threshold"]), reviser=reviser)
    cache = {"prefix_cache": PrefixCache(), "dual_cache": DualCache()}.get(
        name.partition("_")[2], NoCache()
    )
    if name.startswith("adablock"):
        scheduler = AdaBlock(
            a["delimiter_ids"], a["init_block_length"], threshold=a["delimiter_threshold"]
        )
        return method.replace(scheduler=scheduler, cache=cache, rule=Threshold(a["threshold"]))
    assert name.startswith("threshold")
    if not isinstance(cache, NoCache):
        cache = cache.replace(follow_up=True)
    return method.replace(cache=cache, rule=Threshold(a["threshold"]))


def run(folder, prompts, method, gen_len):
    lm = dlm.load(GOLDEN / folder)
    state = init_state(lm.cfg, method, prompts, gen_len=gen_len)
    return decode(lm.params, lm.cfg, method, state)


@pytest.mark.parametrize(
    ("folder", "prompts", "case"),
    [
        *cases("llada_small"),
        *cases("llada_small", "traces_wino.json"),
        *cases("dream_small"),
    ],
)
def test_trace(folder, prompts, case):
    gen_len = len(case["tokens"][0]) - len(prompts[0])
    state = run(folder, prompts, method_of(case, gen_len), gen_len)
    for b, expected in enumerate(case["tokens"]):
        assert state.tokens[b, state.start[b] :].tolist() == expected, f"tokens of prompt {b}"
    forwards = case.get("num_forwards", [case["arguments"].get("steps")] * len(prompts))
    assert state.num_forwards.tolist() == forwards
    if "step_map" in case:
        np.testing.assert_array_equal(state.step_map, case["step_map"])


@pytest.mark.parametrize(
    ("folder", "prompts", "case"),
    [c for c in cases("llada_small") if "adablock" in c.values[2]["method"]],
)
def test_adaptive_blocks_are_those_of_the_reference(folder, prompts, case):
    """`reference_extra`: forwards per block, and block lengths."""
    gen_len = case["arguments"]["gen_length"]
    lm, method = dlm.load(GOLDEN / folder), method_of(case, gen_len)
    for prompt, (_, lengths) in zip(prompts, case["reference_extra"], strict=True):
        state, starts = init_state(lm.cfg, method, [prompt], gen_len=gen_len), set()
        P = state.prompt_len
        for after in stream(lm.params, lm.cfg, method, state):
            starts.add(int(after.block_start[0]) - P)
        assert sorted(starts | {0, gen_len}) == np.cumsum([0, *lengths]).tolist()


@pytest.mark.parametrize(
    ("folder", "prompts", "case"),
    [
        pytest.param(*c.values, id=c.id, marks=pytest.mark.exhaustive)
        for c in cases("llada_small")
        if "cache" in c.values[2]["method"] or c.values[2]["method"] == "llada_quota"
    ],
)
def test_defaults_need_no_more_forwards_than_the_public_code(folder, prompts, case):
    """Without the bit-faithful options: the same tokens for quotas, never a wasted forward."""
    a = case["arguments"]
    gen_len = a["gen_length"]
    method = method_of(case, gen_len)
    if case["method"] == "llada_quota":
        steps = a["steps"] * a["block_length"] // gen_len
        method = method.replace(confidence=Probability(), rule=Quota(steps))
    else:
        method = method.replace(cache=method.cache.replace(follow_up=False))
    state = run(folder, prompts, method, gen_len)
    for b, expected in enumerate(case["tokens"]):
        assert state.tokens[b, state.start[b] :].tolist() == expected
    assert (np.asarray(state.num_forwards) <= case["num_forwards"]).all()
