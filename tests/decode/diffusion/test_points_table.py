"""The table of components and of named methods: what combines, and that the rest is refused."""

import dataclasses
import itertools
import math
import random

import pytest

from decode.diffusion.components import COMPONENTS, FixedBlocks, by_name, short_names
from decode.diffusion.contracts import IMPLIED, NEEDS, WIDTHS
from decode.diffusion.method import AXES, DiffusionMethod
from decode.diffusion.points import FAMILIES, METHODS, family_of, named
from tests.lib.models import TOY_CFG


def choices():
    """By axis, every component; FixedBlocks in both its forms."""
    found = {
        axis: [cls.example(TOY_CFG) for cls in classes] for axis, classes in COMPONENTS.items()
    }
    found["scheduler"].append(FixedBlocks(aligned=True))
    return found


def refusals(method):
    reasons = [c.refuse(method) for c in method.components.values()]
    if WIDTHS.index(method.width) > WIDTHS.index(method.cache.covers):
        reasons.append("its windows are too narrow")
    return [reason for reason in reasons if reason]


def test_every_component_is_on_one_axis_and_needs_what_there_is():
    for axis, components in choices().items():
        for component in components:
            assert [a for a, kind in AXES.items() if isinstance(component, kind)] == [axis]
            assert component.needs <= set(NEEDS) and component.name == type(component).__name__
    assert set(IMPLIED) <= set(NEEDS) and set(WIDTHS[1:]) <= set(NEEDS)


def test_every_pair_is_accepted_or_refused_in_one_sentence():
    found = choices()
    for a, b in itertools.combinations(AXES, 2):
        for x, y in itertools.product(found[a], found[b]):
            for reason in refusals(DiffusionMethod(**{a: x, b: y})):
                assert reason and "\n" not in reason and not reason.endswith(".")


def test_the_product_is_as_large_as_the_documentation_says():
    """Every combination is accepted, or refused: two in five of millions, docs/methods.md.

    Of 4,000 drawn ones, whose share has a standard deviation of 0.008.
    """
    axes, rng, num = choices().values(), random.Random(0), 4000
    valid = sum(not refusals(DiffusionMethod(*map(rng.choice, axes))) for _ in range(num))
    assert math.prod(map(len, axes)) > 2_000_000 and 0.35 < valid / num < 0.45


@pytest.mark.parametrize("name", METHODS)
def test_every_name_makes_a_method(toy_cfg, name):
    method = named(name, 4)
    assert family_of(name) in FAMILIES and name in FAMILIES[family_of(name)]
    if name.startswith("adablock"):
        method = method.replace(scheduler=dataclasses.replace(method.scheduler, delimiter_ids=(1,)))
    method.validate(toy_cfg)


def test_short_names():
    assert set(short_names("cache")) == {"none", "prefix", "dual", "vicinity", "delayed"}
    assert by_name("stopper", "eos").name == "Eos" and by_name("cache", None) is None
    with pytest.raises(ValueError, match=r"cache='daul' must be one of .*'dual'"):
        by_name("cache", "daul")
    with pytest.raises(ValueError, match=r"rule=Eos\(\) must be of class CommitRule"):
        DiffusionMethod(rule=by_name("stopper", "eos")).validate(None)
