"""Decoding methods by name: the table that `scripts.compare` measures, for notebooks too.

    from decode.diffusion.points import METHODS, named

    method = named("threshold_dual_cache", block_len=8)
    lm, method.rule, sorted(METHODS)

To add a method: one line in its family, or a family of its own. A family is one method at several
settings: its points are joined by a line in figures and have one AUP.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from decode.diffusion.components import (
    CACHES,
    CONFIDENCES,
    STOPPERS,
    AdaBlock,
    Annealed,
    BlockCausal,
    Credit,
    DelayedCache,
    DreamQuota,
    DualCache,
    EntropyBudget,
    EntropyThreshold,
    Eos,
    EosBlock,
    Eotp,
    Factor,
    FixedBlocks,
    Hierarchical,
    Klass,
    LocalLeap,
    Margin,
    MultiBlock,
    NarrowOut,
    NegEntropy,
    Nucleus,
    Origin,
    PrefixCache,
    Prophet,
    Quota,
    Random,
    Remask,
    ReMDM,
    Renoise,
    RunningConfidence,
    SlowFast,
    Smoothing,
    SparseCredit,
    SubBlocks,
    Tempered,
    Threshold,
    TokenEdit,
    UniformNoise,
    VicinityCache,
    WideIn,
)
from decode.diffusion.contracts import Component
from decode.diffusion.loop import DiffusionMethod

Maker = Callable[[int], DiffusionMethod]  # of the block length


def _method(block_len: int, **components: Any) -> DiffusionMethod:
    """Blocks of `block_len`, and done at the end of the text, unless `components` say otherwise."""
    defaults = {"scheduler": FixedBlocks(block_len), "stopper": Eos()}
    return DiffusionMethod(**(defaults | components))


def _quota(block_len: int, tokens_per_step: int = 1, **components: Any) -> DiffusionMethod:
    rule = Quota(max(block_len // tokens_per_step, 1))
    return _method(block_len, rule=rule, **components)


def _threshold(block_len: int, threshold: float, **components: Any) -> DiffusionMethod:
    return _method(block_len, rule=Threshold(threshold), **components)


def _dream(block_len: int, tokens_per_step: int = 1, **components: Any) -> DiffusionMethod:
    rule = DreamQuota(max(block_len // tokens_per_step, 1))
    return _method(block_len, rule=rule, **components)


# fmt: off
FAMILIES: dict[str, dict[str, Maker]] = {
    "quota": {
        "one_per_step": lambda n: _quota(n),
        "quota_2": lambda n: _quota(n, 2),
        "quota_4": lambda n: _quota(n, 4),
    },
    "quota_prefix_cache": {
        "quota_prefix_cache": lambda n: _quota(n, cache=PrefixCache()),
        "quota_prefix_cache_2": lambda n: _quota(n, 2, cache=PrefixCache()),
    },
    "quota_dual_cache": {
        "quota_dual_cache": lambda n: _quota(n, cache=DualCache()),
        "quota_dual_cache_2": lambda n: _quota(n, 2, cache=DualCache()),
    },
    "random_order": {
        "random_order": lambda n: _quota(n, confidence=Random()),
        "random_order_2": lambda n: _quota(n, 2, confidence=Random()),
    },
    "dream_entropy": {
        "dream_entropy": lambda n: _dream(n, confidence=NegEntropy()),
        "dream_entropy_2": lambda n: _dream(n, 2, confidence=NegEntropy()),
    },
    "dream_margin": {
        "dream_margin": lambda n: _dream(n, confidence=Margin()),
        "dream_margin_2": lambda n: _dream(n, 2, confidence=Margin()),
    },
    "threshold": {
        "threshold": lambda n: _threshold(n, 0.9),
        "threshold_0.7": lambda n: _threshold(n, 0.7),
        "threshold_0.5": lambda n: _threshold(n, 0.5),
    },
    "threshold_prefix_cache": {
        "threshold_prefix_cache": lambda n: _threshold(n, 0.9, cache=PrefixCache()),
        "threshold_prefix_cache_0.7": lambda n: _threshold(n, 0.7, cache=PrefixCache()),
    },
    "threshold_dual_cache": {
        "threshold_dual_cache": lambda n: _threshold(n, 0.9, cache=DualCache()),
        "threshold_dual_cache_0.7": lambda n: _threshold(n, 0.7, cache=DualCache()),
    },
    "vicinity_cache": {
        "vicinity_cache": lambda n: _threshold(n, 0.9, cache=VicinityCache(before=n, after=n)),
    },
    "delayed_cache": {
        "delayed_cache": lambda n: _threshold(n, 0.9, cache=DelayedCache()),
    },
    "dream_origin": {
        "dream_origin": lambda n: _method(n, rule=Origin(n)),
    },
    "dream_sampled": {  # the published temperature and top-p
        "dream_sampled": lambda n: _dream(
            n, confidence=Tempered(NegEntropy()), constraint=Nucleus(top_p=0.95), temperature=0.2
        ),
    },
    "block_causal": {  # for models trained with blocks of this length
        "block_causal": lambda n: _threshold(
            n, 0.9, scheduler=FixedBlocks(n, aligned=True), cache=BlockCausal(n)
        ),
    },
    "uniform_noise": {  # for models trained on noise instead of MASK
        "uniform_noise": lambda n: _method(
            n, confidence=Annealed(), reviser=Renoise(), inputs=UniformNoise(), stopper=EosBlock()
        ),
    },
    "eotp": {
        "eotp": lambda n: _threshold(n, 0.9, stopper=Eotp()),
        "eotp_committed": lambda n: _threshold(n, 0.9, stopper=Eotp("committed")),
    },
    "factor": {
        "factor_0.5": lambda n: _method(n, rule=Factor(0.5)),
        "factor": lambda n: _method(n, rule=Factor(1.0)),
        "factor_1.9": lambda n: _method(n, rule=Factor(1.9)),
    },
    "entropy_threshold": {
        "entropy_threshold_0.2": lambda n: _method(n, rule=EntropyThreshold(0.2)),
        "entropy_threshold": lambda n: _method(n, rule=EntropyThreshold(0.5)),
        "entropy_threshold_1": lambda n: _method(n, rule=EntropyThreshold(1.0)),
    },
    "entropy_budget": {
        "entropy_budget_0.01": lambda n: _method(n, rule=EntropyBudget(0.01)),
        "entropy_budget": lambda n: _method(n, rule=EntropyBudget(0.1)),
        "entropy_budget_0.5": lambda n: _method(n, rule=EntropyBudget(0.5)),
    },
    "local_leap": {
        "local_leap": lambda n: _method(n, rule=LocalLeap(0.9, relaxed=0.75)),
        "local_leap_0.5": lambda n: _method(n, rule=LocalLeap(0.9, relaxed=0.5)),
    },
    "hierarchical": {
        "hierarchical_0.62": lambda n: _method(n, rule=Hierarchical(0.9, low_threshold=0.62)),
        "hierarchical": lambda n: _method(n, rule=Hierarchical(0.9, low_threshold=0.4)),
    },
    "klass": {
        "klass": lambda n: _method(n, rule=Klass(0.9)),
        "klass_0.6": lambda n: _method(n, rule=Klass(0.6)),
    },
    "credit": {
        "credit": lambda n: _threshold(n, 0.9, confidence=Credit()),
        "credit_0.7": lambda n: _threshold(n, 0.7, confidence=Credit()),
    },
    "sparse_credit": {
        "sparse_credit": lambda n: _threshold(n, 0.9, confidence=SparseCredit()),
    },
    "wino": {
        "wino": lambda n: _method(n, rule=WideIn(0.6), reviser=NarrowOut(0.9), stopper=EosBlock()),
    },
    "prophet": {  # the answer is the whole completion
        "prophet": lambda n: _quota(n, stopper=Prophet(0, answer_len=100_000)),
    },
    "multi_block": {
        "multi_block": lambda n: _threshold(n, 0.9, scheduler=MultiBlock(n, 4)),
        "multi_block_gated": lambda n: _threshold(
            n, 0.9, scheduler=MultiBlock(n, 4, 0.1, active_at=0.95, gate=0.9)
        ),
    },
    "slow_fast": {
        "slow_fast": lambda n: _threshold(n, 0.9, scheduler=SlowFast()),
    },
    "sub_blocks": {
        "sub_blocks": lambda n: _threshold(n, 0.9, scheduler=SubBlocks(n, max(n // 4, 1))),
    },
    "freedave": {  # the tokens of one_per_step and threshold
        "freedave": lambda n: _quota(n, lookahead=3),
        "freedave_threshold": lambda n: _threshold(n, 0.9, lookahead=3),
    },
    "smoothing": {
        "smoothing": lambda n: _threshold(n, 0.9, inputs=Smoothing()),
    },
    "token_edit": {
        "token_edit": lambda n: _threshold(n, 0.7, reviser=TokenEdit(0.5), stopper=EosBlock()),
        "token_edit_fast": lambda n: _threshold(n, 0.5, reviser=TokenEdit(0.0), stopper=EosBlock()),
    },
    "remask": {
        "remask": lambda n: _quota(n, 2, reviser=Remask(), stopper=EosBlock()),
    },
    "running_confidence": {
        "running_confidence": lambda n: _quota(n, 2, reviser=RunningConfidence()),
    },
    "remdm": {
        "remdm": lambda n: _method(n, reviser=ReMDM(n), stopper=EosBlock()),
    },
    "adablock": {  # delimiter_ids depend on the tokenizer: fill them in
        "adablock": lambda n: _threshold(n, 0.9, scheduler=AdaBlock((), n)),
    },
}
# fmt: on

METHODS: dict[str, Maker] = {
    name: make for members in FAMILIES.values() for name, make in members.items()
}

_SHORT_NAMES: dict[str, Mapping[str, Any]] = {
    "cache": CACHES,
    "confidence": CONFIDENCES,
    "stopper": STOPPERS,
}


def named(name: str, block_len: int) -> DiffusionMethod:
    """The method of the table.

    Args:
      name: a key of `METHODS`.
      block_len: positions per block, >= 1.

    Raises:
      ValueError: there is no such method, or no such block.
    """
    family_of(name)
    if block_len < 1:
        raise ValueError(f"block_len={block_len} must be at least 1")
    return METHODS[name](block_len)


def family_of(name: str) -> str:
    """The family of a key of `METHODS`; ValueError if there is no such method."""
    for family, members in FAMILIES.items():
        if name in members:
            return family
    raise ValueError(f"there is no method {name!r}; {_suggest(name, METHODS)}")


def override(method: DiffusionMethod, changes: Mapping[str, Any]) -> DiffusionMethod:
    """The method with some of its numbers, or whole components, changed.

    Example:
      >>> override(named("threshold", 8), {"rule": {"threshold": 0.8}, "cache": "dual"})

    Args:
      method: what to start from.
      changes: per field of `DiffusionMethod`: new values of the fields of that component; the short
        name of another cache, confidence or stopper; or a number (temperature, guidance).

    Raises:
      ValueError: on an unknown field, or a value of the wrong kind. Ranges are checked by
        `DiffusionMethod.validate`.
    """
    for axis, change in changes.items():
        field = _field(axis, method, "a method")
        old: Any = getattr(method, axis)
        if isinstance(change, str) and axis in _SHORT_NAMES:
            table = _SHORT_NAMES[axis]
            if change not in table:
                raise ValueError(f"there is no {axis} {change!r}; {_suggest(change, table)}")
            new = table[change]()
        elif isinstance(old, Component):
            if not isinstance(change, Mapping):
                kinds = "fields or a short name" if axis in _SHORT_NAMES else "fields"
                raise ValueError(f"{axis}={change!r} must be {kinds} of the method's {axis}")
            for name, value in change.items():
                own = _field(name, old, f"{axis} ({type(old).__name__})")
                _check_kind(f"{axis}.{name}", own, value)
            fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in change.items()}
            new = dataclasses.replace(old, **fields)
        else:
            _check_kind(axis, field, change)
            new = change
        method = method.replace(**{axis: new})
    return method


def _field(name: str, owner: Any, called: str) -> dataclasses.Field[Any]:
    known = {field.name: field for field in dataclasses.fields(owner) if field.name != "kind"}
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"{called} has no field {name!r}; {has}")
    return known[name]


def _check_kind(name: str, field: dataclasses.Field[Any], value: Any) -> None:
    """As the field is annotated; arrays of numbers are not for files."""
    annotation = str(field.type)
    if value is None and "None" in annotation:
        return
    for word, kinds, called in (
        ("bool", bool, "true or false"),
        ("str", str, "a text"),
        ("tuple", list | tuple, "a list"),
        ("float", int | float, "a number"),
        ("int", int, "a whole number"),
    ):
        if word in annotation:
            if not isinstance(value, kinds) or (isinstance(value, bool) and word != "bool"):
                raise ValueError(f"{name}={value!r} must be {called}")
            return


def _suggest(name: str, table: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, table, n=4, cutoff=0.5)
    return f"close: {', '.join(close)}" if close else f"there are {', '.join(table)}"
