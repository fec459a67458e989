"""Commit rules against traces of the public dInfer decoders: logits given, states expected."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from decode.rules import Hierarchical, Threshold
from decode.rules.contracts import surest
from kernels_pallas.unembed_stats import logits_stats
from tests.decode.rounds import make_round

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "commit_rules"
TRACES = json.loads((GOLDEN / "commit_rules.json").read_text())
LOGITS = np.load(GOLDEN / "commit_rules_logits.npz")
MASK = TRACES["mask_token_id"]
RULES = {
    "threshold": lambda a: Threshold(a["threshold"]),
    "hierarchical": lambda a: Hierarchical(a["threshold"], a["low_threshold"]),
}
CASES = [case for case in TRACES["cases"] if case["rule"] in RULES]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['rule']}-{c['logits']}")
def test_every_step_is_that_of_the_reference(case):
    rule = RULES[case["rule"]](case["arguments"])
    tokens = np.full(TRACES["block_len"], MASK)
    logits = LOGITS[next(name for name in LOGITS.files if name.endswith(case["logits"]))]
    for z, expected in zip(logits, case["state_after_each_step"], strict=False):
        stats = logits_stats(jnp.asarray(z, jnp.float32))
        proposal = np.asarray(stats.token)
        eligible = tokens == MASK
        if case["rule"] != "hierarchical":
            eligible &= proposal != MASK  # the reference skips these; our loop bans the token
        view = make_round(np.exp(stats.log_prob), eligible=eligible)
        view = view.replace(log_prob=stats.log_prob[None], confidence=stats.log_prob[None])
        commit, _ = rule.commit(view, ())
        if not commit.any():
            commit = surest(view.confidence, view.eligible)
        tokens = np.where(np.asarray(commit[0]), proposal, tokens)
        assert tokens.tolist() == expected
