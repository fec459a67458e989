"""Golden traces: what the methods' public decoders do on small checkpoints, reproduced exactly.

Where the public code wastes a forward or an empty step, the bit-faithful option that reproduces its
counts is named here (`follow_up`, `may_idle`, `commit_last`); the defaults do better.
"""

import json
import pathlib

import numpy as np
import pytest

import dlm
from decode.diffusion import DiffusionMethod, decode, init_state
from decode.rules import (
    DreamQuota,
    DualCache,
    EntropyThreshold,
    Factor,
    FixedBlocks,
    Margin,
    NegEntropy,
    NoCache,
    PrefixCache,
    Probability,
    Quota,
    Threshold,
    TokenBan,
)
from tests.decode.public_llada import Float32Softmax, PublicTopK

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
HANDLED = ("llada_quota", "threshold", "factor", "entropy_threshold", "dream_")
NOT_YET = ("prophet", "adablock")  # other methods' traces in the same file


def cases(folder):
    traces = json.loads((GOLDEN / folder / "traces.json").read_text())
    for case in traces["cases"]:
        if not case["method"].startswith(NOT_YET):
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
    cache = {
        "threshold": NoCache(),
        "threshold_prefix_cache": PrefixCache(follow_up=True),
        "threshold_dual_cache": DualCache(follow_up=True),
    }[name]
    return method.replace(cache=cache, rule=Threshold(a["threshold"]))


def run(folder, prompts, method, gen_len):
    lm = dlm.load(GOLDEN / folder)
    state = init_state(lm.cfg, method, prompts, gen_len=gen_len)
    return decode(lm.params, lm.cfg, method, state)


@pytest.mark.parametrize(
    ("folder", "prompts", "case"), [*cases("llada_small"), *cases("dream_small")]
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


def test_every_diffusion_trace_is_covered_or_named():
    for folder in ("llada_small", "dream_small"):
        traces = json.loads((GOLDEN / folder / "traces.json").read_text())
        for case in traces["cases"]:
            assert case["method"].startswith((*HANDLED, *NOT_YET)), case["method"]


@pytest.mark.parametrize(("folder", "prompts", "case"), cases("llada_small"))
def test_defaults_need_no_more_forwards_than_the_public_code(folder, prompts, case):
    """Without the bit-faithful options: the same tokens for quotas, never a wasted forward."""
    a = case["arguments"]
    gen_len = a["gen_length"]
    method = method_of(case, gen_len)
    if case["method"] == "llada_quota":
        steps = a["steps"] * a["block_length"] // gen_len
        method = method.replace(confidence=Probability(), rule=Quota(steps))
        state = run(folder, prompts, method, gen_len)
        for b, expected in enumerate(case["tokens"]):
            assert state.tokens[b, state.start[b] :].tolist() == expected
    elif "cache" in case["method"]:
        method = method.replace(cache=method.cache.replace(follow_up=False))
        state = run(folder, prompts, method, gen_len)
        for b, expected in enumerate(case["tokens"]):
            assert state.tokens[b, state.start[b] :].tolist() == expected
    else:
        return
    assert (np.asarray(state.num_forwards) <= case["num_forwards"]).all()
