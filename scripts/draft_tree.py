"""The draft tree that writes most tokens per second: for one's prompts, models and device.

    python -m scripts.draft_tree --target=smollm2 --draft=runs/smollm2/draft/model \\
        --prompts=prompts.txt --out=tree.json

Measures how often children in a draft model's tree are accepted, by rank, and what rounds cost, by
the nodes they judge; see `decode.speculative.measured_tree`. Prints both, and the tree beside the
best chain. The file holds the fields of a `TreeShape`:

    DraftModelTree(draft.params, draft.cfg, TreeShape(**json.load(open("tree.json"))))
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

import dlm
from decode.core.requests import encode
from decode.core.sampling import Sampling
from decode.speculative.accept import Match, SpeculativeSampling
from decode.speculative.drafters.draft_model import DraftModelTree
from decode.speculative.loop import SpeculativeMethod, SpeculativeState, init_state, prefill
from decode.speculative.measured_tree import measured_tree
from decode.speculative.tree import fastest_tree


def start(
    lm: dlm.LanguageModel, prompts: list[list[int]], gen_len: int, method: SpeculativeMethod
) -> SpeculativeState:
    """Behind all prompts, which are decoded together."""
    state = init_state(lm.cfg, method, prompts, gen_len=gen_len)
    return prefill(lm.params, lm.cfg, method, state)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}")
    given, depth = flags.FLAGS, flags.FLAGS.max_depth
    try:
        lm, draft = dlm.load(given.target), dlm.load(given.draft)
        dlm.check_same_tokens(draft, lm)
        lines = pathlib.Path(given.prompts).read_text(encoding="utf-8").splitlines()
        prompts = [encode(lm, line) for line in lines if line]
        is_drawn = given.temperature > 0
        drafter = DraftModelTree(draft.params, draft.cfg, is_sampled=is_drawn)
        rule = SpeculativeSampling() if is_drawn else Match()
        method = SpeculativeMethod(drafter, rule, Sampling(given.temperature or None))
        begin = functools.partial(start, lm, prompts, given.gen_len)
        widths = tuple(1 << i for i in range(given.max_nodes.bit_length()))
        found = measured_tree(lm.params, lm.cfg, method, begin, widths=widths, max_depth=depth)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("accepted by rank:", *(f"{rate:.3f}" for rate in found.rates))
    for nodes, cost in found.costs.items():
        print(f"a round over {nodes:3} nodes: {1e3 * cost:8.2f} ms")
    print(f"a level of drafts:       {1e3 * found.draft_cost:8.2f} ms")
    chain, speed = fastest_tree(found.rates[:1], found.costs, found.draft_cost, depth)
    for name, shape, rate in (("chain", chain, speed), ("tree", found.shape, found.tokens_per_s)):
        print(f"best {name}: {shape.num_nodes} nodes, depth {shape.depth}, {rate:.1f} tokens/s")
    written = json.dumps(dataclasses.asdict(found.shape))
    pathlib.Path(given.out).write_text(written + "\n", encoding="utf-8")


if __name__ == "__main__":
    flags.DEFINE_string("target", None, "The model that judges.", required=True)
    flags.DEFINE_string("draft", None, "The model that drafts.", required=True)
    flags.DEFINE_string("prompts", None, "A text file, a prompt a line.", required=True)
    flags.DEFINE_integer("gen_len", 128, "Tokens per prompt.")
    flags.DEFINE_float("temperature", 0.0, "Of the text; 0: greedy.")
    flags.DEFINE_integer("max_nodes", 64, "Of the tree; powers of two are tried.", lower_bound=2)
    flags.DEFINE_integer("max_depth", 8, "Of the tree.", lower_bound=1)
    flags.DEFINE_string("out", "tree.json", "Where the tree goes.")
    app.run(main)
