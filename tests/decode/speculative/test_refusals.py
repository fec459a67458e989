"""What is given instead of a tree, a corpus or heads is refused by the field's name."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.component import check_numbers
from decode.diffusion.rules.origin import Origin
from decode.speculative.components import (
    ADED,
    SAM,
    DraftModel,
    DraftModelBeam,
    DraftModelTree,
    DynamicExit,
    InputGuided,
    Medusa,
    SpecDecPP,
    Suffix,
    Swift,
    TokenRecycling,
)
from decode.speculative.drafters.automaton import build_corpus
from decode.speculative.drafters.trigrams import count_trigrams
from decode.speculative.method import SpeculativeMethod
from decode.speculative.pearl import Pearl
from decode.speculative.tree import branching, chain

A_TREE = r"shape=\(2, 1\) must be a TreeShape, such as branching"

FIELDS = {
    "tree of a draft model": (lambda p, c: DraftModelTree(p, c, shape=(2, 1)), A_TREE),
    "tree of recycled tokens": (lambda p, c: TokenRecycling(shape=(2, 1)), A_TREE),
    "tree of heads": (lambda p, c: Medusa({"unembed": jnp.zeros((1, 2, 3))}, (2, 1)), A_TREE),
    "wide tree": (
        lambda p, c: TokenRecycling(branching(c.vocab_size + 1)),
        "shape has nodes with 25 children, and there are 24 different tokens",
    ),
    "layers": (lambda p, c: DraftModel(p, c, layers=2), "layers=2 must be rising layers of the"),
    "no layers": (
        lambda p, c: DraftModelBeam(p, c, layers=()),
        r"layers=\(\) must be rising layers of the",
    ),
    "SAM's corpus": (lambda p, c: SAM([[1]]), "corpus is a list, which .* `build_corpus` returns"),
    "ADED's corpus": (lambda p, c: ADED(5), "corpus is a int, which .* `count_trigrams` returns"),
    "a list of tokens": (lambda p, c: Suffix(corpus=[1, 2]), "corpus is a list, which must be an"),
    "a batch of tokens": (
        lambda p, c: Suffix(corpus=jnp.ones((2, 3), int)),
        r"corpus has shape \(2, 3\), which must be \[M\]",
    ),
    "layers of exits": (
        lambda p, c: DynamicExit((1.0,)),
        "an entry of exits=1.0 must be a whole number",
    ),
    "nested exits": (lambda p, c: DynamicExit(([1],)), r"an entry of exits=\[1\] must be a whole"),
    "an endless weight": (
        lambda p, c: DynamicExit((1,), weight=math.inf),
        "weight=inf must be positive and finite",
    ),
    "an endless constant": (
        lambda p, c: ADED(c1=math.inf),
        "c1=inf must be at least 0 and finite",
    ),
    "a mesh": (
        lambda p, c: Pearl(DraftModel(p, c, num_drafts=1), mesh=3),
        "mesh=3 must be a jax.sharding.Mesh, or None",
    ),
    "a mark": (lambda p, c: InputGuided(opening=5), "opening has 5, which must be a list of"),
    "a mark's text": (
        lambda p, c: InputGuided(opening="Input:"),
        "opening has 'Input:', which must be a list of token ids",
    ),
    "no mark": (lambda p, c: InputGuided(closing=None), "closing has None, which must be a list"),
    "no head": (lambda p, c: SpecDecPP(p, c, own={}), "own is a dict, which must be the head's"),
    "no heads": (lambda p, c: Medusa({}, chain(1)), "own is a dict, which must be the heads'"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields_of_drafters(case, toy_cfg, toy_params):
    drafter, said = FIELDS[case]
    with pytest.raises(ValueError, match=said):
        drafter(toy_params, toy_cfg).validate(toy_cfg)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: build_corpus([[1.5]], 9), "a token of texts=1.5 must be a whole number"),
        (lambda: build_corpus([1, 2], 9), "texts has 1, which must be a list of token ids"),
        (lambda: build_corpus(["ab"], 9), "texts has 'ab', which must be a list of token ids"),
        (lambda: build_corpus([[9]], 9), r"texts has 9, not in \[0, vocab_size=9\)"),
        (lambda: count_trigrams([1, 2, 3]), "texts has 1, which must be a list of token ids"),
        (
            lambda: count_trigrams([[1, 2, -3]]),
            r"texts has -3, not in \[0, vocab_size=2147483648\)",
        ),
        (lambda: count_trigrams([[1, 2, 3]], 0), "num_successors=0 must be at least 1"),
        (lambda: branching(1.5), "a number of children=1.5 must be a whole number"),
    ],
)
def test_what_makes_them(made, said):
    with pytest.raises(ValueError, match=said):
        made()


def test_switches_are_on_or_off(toy_cfg):
    with pytest.raises(ValueError, match="is_sampled='yes' must be True or False"):
        SpeculativeMethod(Swift(is_sampled="yes")).validate(toy_cfg)
    with pytest.raises(ValueError, match="may_idle=1 must be True or False"):
        check_numbers(Origin(may_idle=1))
    SpeculativeMethod(Swift(is_sampled=np.bool_(False))).validate(toy_cfg)
