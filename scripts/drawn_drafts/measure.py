"""Who draws, who judges, and how much is accepted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dlm
from decode.complete import complete
from decode.core.requests import ManyPrompts
from decode.evaluation.statistics import bootstrap_ratio
from decode.speculative.accept import (
    AcceptanceRule,
    BlockVerification,
    SpeculativeSampling,
    TraversalVerification,
)
from decode.speculative.contracts import Drafter
from decode.speculative.drafters.draft_model import DraftModel, DraftModelTree
from decode.speculative.drafters.rsd import DraftModelBeam
from decode.speculative.tree import branching

RULES = {
    "token by token": SpeculativeSampling(),
    "as a block": BlockVerification(),
    "from the leaves": TraversalVerification(),
}


def ways(draft: dlm.LanguageModel, depth: int) -> Iterator[tuple[str, str, Drafter]]:
    """What is drawn, the rule that judges it, and who draws it."""
    model = draft.params, draft.cfg
    chain = DraftModel(*model, num_drafts=depth, is_sampled=True)
    one_by_one = branching(2, *[1] * (depth - 1))
    trees: dict[str, Drafter] = {
        "two chains (RSD-C)": DraftModelTree(*model, shape=one_by_one, is_sampled=True),
        "two beams (RSD-S)": DraftModelBeam(*model, width=2, levels=depth, is_sampled=True),
    }
    for rule in ("token by token", "as a block"):
        yield "chain", rule, chain
    for name, drafter in trees.items():
        for rule in ("token by token", "from the leaves"):
            yield name, rule, drafter


def measure(
    lm: dlm.LanguageModel,
    drafter: Drafter,
    rule: AcceptanceRule,
    asked: ManyPrompts,
    **options: Any,
) -> dict[str, str]:
    """The numbers of a line; `options` are those of `complete`."""
    answers = complete(lm, asked, drafter=drafter, acceptance=rule, **options)
    texts = [text for answer in answers for text in (answer, *answer.others)]
    rounds = [x.num_forwards for x in texts]
    tokens = [x.mean_acceptance_length * x.num_forwards for x in texts]
    low, high = bootstrap_ratio(tokens, rounds)
    return {
        "nodes": str(drafter.num_nodes - 1),
        "tokens per forward": f"{sum(tokens) / sum(rounds):.2f} ({low:.2f} to {high:.2f})",
        "forwards of the draft model": f"{sum(x.draft_forwards for x in texts) / sum(rounds):.1f}",
        "texts": str(len(texts)),
    }
