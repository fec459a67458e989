"""The product of all components: how much of it makes sense, and that the rest is refused."""

import dataclasses
import itertools
import re

import jax
import pytest

from decode.diffusion import components as rules
from decode.diffusion.caches.canvas import CachePolicy
from decode.diffusion.components import FixedBlocks
from decode.diffusion.contracts import (
    CommitRule,
    Component,
    Confidence,
    Constraint,
    Inputs,
    Reviser,
    Scheduler,
    Stopper,
)
from decode.diffusion.loop import DiffusionMethod
from decode.diffusion.points import FAMILIES, METHODS, family_of, named
from dlm.heads.learn2pd import init_filter
from tests.lib.paths import ROOT

AXES = {
    "scheduler": Scheduler,
    "cache": CachePolicy,
    "confidence": Confidence,
    "rule": CommitRule,
    "reviser": Reviser,
    "stopper": Stopper,
    "constraint": Constraint,
    "inputs": Inputs,
}
REQUIRED = {
    "AdaBlock": ((1, 2),),
    "LearnedFilter": (init_filter(jax.random.key(0), 32),),
    "Prophet": (4,),
}  # arguments without a default
DOCS = ROOT / "docs" / "methods.md"


def components(kind):
    classes = [getattr(rules, name) for name in rules.__all__ if name[0].isupper()]
    for cls in classes:
        if isinstance(cls, type) and issubclass(cls, Component) and issubclass(cls, kind):
            yield cls(*REQUIRED.get(cls.__name__, ()))
    if kind is Scheduler:
        yield FixedBlocks(aligned=True)


def test_the_product_is_as_large_as_the_documentation_says(toy_cfg):
    """Every combination is accepted, or refused in one sentence; docs/methods.md counts them."""
    choices = {axis: list(components(kind)) for axis, kind in AXES.items()}
    assert (
        sum(map(len, choices.values()))
        == len({type(c) for c in itertools.chain(*choices.values())}) + 1
    )  # FixedBlocks comes in two forms
    total = valid = 0
    for point in itertools.product(*choices.values()):
        method = DiffusionMethod(*point)
        total += 1
        reasons = [c.refuse(method) for c in method.components]
        valid += not any(reasons) and rules_width(method)
    documented = re.search(r"([\d,]+) of the ([\d,]+) combinations", DOCS.read_text())
    counts = tuple(int(n.replace(",", "")) for n in documented.groups())
    assert (valid, total) == counts


def rules_width(method):
    order = ("block", "suffix", "canvas")
    return order.index(method.width) <= order.index(method.cache.covers)


@pytest.mark.parametrize("name", METHODS)
def test_every_name_makes_a_method(toy_cfg, name):
    method = named(name, 4)
    assert family_of(name) in FAMILIES and name in FAMILIES[family_of(name)]
    if name.startswith("adablock"):
        method = method.replace(scheduler=dataclasses.replace(method.scheduler, delimiter_ids=(1,)))
    method.validate(toy_cfg)
