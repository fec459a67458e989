"""Commit rules against traces of the public dInfer decoders: logits given, states expected."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import Credit, Hierarchical, Probability, SparseCredit, Threshold
from decode.diffusion.round import surest
from kernels_pallas.unembed_stats import logits_stats
from tests.lib.paths import GOLDEN
from tests.lib.rounds import make_round

FOLDER = GOLDEN / "commit_rules"
TRACES = json.loads((FOLDER / "commit_rules.json").read_text())
LOGITS = np.load(FOLDER / "commit_rules_logits.npz")
MASK = TRACES["mask_token_id"]
RULES = {
    "threshold": lambda a: Threshold(a["threshold"]),
    "credit": lambda a: Threshold(a["threshold"]),
    "hierarchical": lambda a: Hierarchical(a["threshold"], a["low_threshold"]),
}


def credits(arguments):
    names = {"credit_alpha": "alpha", "boost_gamma": "gamma", "decay_beta": "beta"}
    return {ours: arguments[theirs] for theirs, ours in names.items() if theirs in arguments}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("case", TRACES["cases"], ids=lambda c: f"{c['rule']}-{c['logits']}")
def test_every_step_is_that_of_the_reference(case, sparse):
    rule, confidence = RULES[case["rule"]](case["arguments"]), Probability()
    if case["rule"] == "credit":
        kind = SparseCredit if sparse else Credit
        confidence = kind(**credits(case["arguments"]))
    elif sparse:
        pytest.skip("only credits have a sparse form")
    tokens = np.full(TRACES["block_len"], MASK)
    logits = LOGITS[case["logits"]]
    cfg = types.SimpleNamespace(vocab_size=logits.shape[-1])
    state = confidence.init(cfg, 1, len(tokens))
    for step, expected in enumerate(case["state_after_each_step"]):
        z = jnp.asarray(logits[step], jnp.float32)
        given_ids = confidence.given_ids(state) if "given" in confidence.needs else None
        stats = logits_stats(z, given_ids=None if given_ids is None else given_ids[0])
        undecided = tokens == MASK
        view = make_round(np.exp(stats.log_prob), eligible=undecided).replace(
            proposal=stats.token[None],
            log_prob=stats.log_prob[None],
            stats=jax.tree.map(lambda x: x[None], stats),
            logits=z[None],
            block_step=jnp.array([step]),
        )
        view, state = confidence.measure(view, state)
        proposal = np.asarray(view.proposal[0])
        if case["rule"] != "hierarchical":
            # The reference passes over these; our loop does not let them be proposed.
            view = view.replace(eligible=view.eligible & jnp.asarray(proposal != MASK)[None])
        commit, _ = rule.commit(view, ())
        if not commit.any():
            commit = surest(view.confidence, view.eligible)
        tokens = np.where(np.asarray(commit[0]), proposal, tokens)
        assert tokens.tolist() == expected
