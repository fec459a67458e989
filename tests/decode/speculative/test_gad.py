"""Generalised aggressive decoding: blocks of a non-autoregressive drafter, judged by `Match`.

With beta > 1 the publication (arXiv:2205.10350) also keeps drafts that the target did not choose:
that is lossy, and is not here.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.speculative.accept import Match, Verdict
from decode.speculative.tree import chain
from tests.lib.paths import SHARED

GOLDEN = SHARED / "goldens" / "gad"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the shared traces are not here")
def test_golden_gad():
    tables = np.load(GOLDEN / "gad.npz")
    cases = json.loads((GOLDEN / "gad.json").read_text())["cases"]
    exact = [case for case in cases if case["beta"] == 1]
    assert exact and all(case["equals_plain_greedy"] for case in exact)
    for case in exact:
        chosen, blocks = tables[case["table"]].argmax(axis=1), np.array(case["nat_table"])
        num, text, rounds = case["block"], [], []

        @jax.jit
        def walk(tokens, num=num, chosen=jnp.asarray(chosen, jnp.int32)):
            verdict = Verdict(chain(num).tree(tokens), chosen[tokens], None, None)
            return Match().walk(verdict, num)

        while len(text) < case["max_len"] and case["eos"] not in text:
            root = text[-1] if text else case["eos"]
            tokens = np.array([[root, *blocks[root]]], np.int32)
            made = walk(tokens)
            text += [*tokens[0, 1 : 1 + int(made.num_accepted[0])].tolist(), int(made.bonus[0])]
            text = text[: case["max_len"]]
            rounds.append(len(text))
        assert text == case["output"] and rounds == case["committed_after_round"]
