"""Decoding methods by name: what `generate` takes and `scripts.compare` measures.

    from decode.diffusion.points import METHODS, named

    method = named("threshold_dual_cache", block_len=8)
    lm, method.rule, sorted(METHODS)

A component's own published settings stand in its file (`Component.points`); here are the methods
that are made of several. A family is one method at several settings: its points are joined by a
line in figures and have one AUP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from decode.constraints.nucleus import Nucleus
from decode.core.component import entry
from decode.diffusion.caches.block_causal import BlockCausal, CausalContext
from decode.diffusion.caches.dual_cache import DualCache
from decode.diffusion.caches.in_block_cache import InBlockCache
from decode.diffusion.caches.prefix_cache import PrefixCache
from decode.diffusion.components import COMPONENTS, short_names
from decode.diffusion.confidences.credit import Credit
from decode.diffusion.confidences.left_to_right import LeftToRight
from decode.diffusion.confidences.margin import Margin
from decode.diffusion.confidences.neg_entropy import NegEntropy
from decode.diffusion.confidences.probability import Probability
from decode.diffusion.confidences.random import Random
from decode.diffusion.confidences.tempered import Tempered
from decode.diffusion.contracts import Component
from decode.diffusion.inputs.uniform_noise import UniformNoise
from decode.diffusion.method import DiffusionMethod
from decode.diffusion.revisers.canvas_sampler import Annealed, Renoise
from decode.diffusion.revisers.keep import Keep
from decode.diffusion.revisers.remask import Remask
from decode.diffusion.revisers.running_confidence import RunningConfidence
from decode.diffusion.revisers.token_edit import TokenEdit
from decode.diffusion.rules.block_quota import BlockQuota
from decode.diffusion.rules.dream_quota import DreamQuota
from decode.diffusion.rules.quota import Quota
from decode.diffusion.rules.threshold import Threshold
from decode.diffusion.schedulers.adablock import AdaBlock
from decode.diffusion.schedulers.fixed_blocks import FixedBlocks
from decode.diffusion.schedulers.sub_blocks import SubBlocks
from decode.diffusion.stoppers.end_of_text import Eos, EosBlock
from decode.diffusion.stoppers.prophet import Prophet
from dlm.config import ModelConfig

Maker = Callable[[int], DiffusionMethod]  # of the block length


def complete(block_len: int | None, **choices: Any) -> DiffusionMethod:
    """The method of some choices, and what goes with them on the other axes.

    Blocks of `block_len` (None: one), `Threshold(0.9)`, and done at the end of the text; if
    confidences only order, one token per step; if decided tokens may change, a block is finished
    before its end of text counts.

    Args:
      block_len: positions per block, >= 1.
      **choices: fields of `DiffusionMethod`.
    """
    reviser = choices.get("reviser", Keep())
    confidence = choices.get("confidence", Probability())
    rule = Quota(block_len or 1_000_000) if confidence.only_orders else Threshold(0.9)
    defaults: dict[str, Any] = {
        "scheduler": FixedBlocks(block_len),
        "rule": rule,
        "stopper": EosBlock() if reviser.changes else Eos(),
    }
    return DiffusionMethod(**(defaults | choices))


def blocks_of(cfg: ModelConfig, block_len: int | None) -> dict[str, Any]:
    """Scheduler and cache of a model that was trained in blocks; nothing for others."""
    if cfg.block_len is None or block_len is None:
        return {}
    return {"scheduler": FixedBlocks(block_len, aligned=True), "cache": BlockCausal(block_len)}


def _quota(block_len: int, tokens_per_step: int = 1, **choices: Any) -> DiffusionMethod:
    rule = Quota(max(block_len // tokens_per_step, 1))
    return complete(block_len, rule=rule, **choices)


def _threshold(block_len: int, threshold: float, **choices: Any) -> DiffusionMethod:
    return complete(block_len, rule=Threshold(threshold), **choices)


def _block_causal(block_len: int, **choices: Any) -> DiffusionMethod:
    """For models trained with blocks of this length, counted from the start of the prompt."""
    defaults = {"scheduler": FixedBlocks(block_len, aligned=True), "cache": BlockCausal(block_len)}
    return complete(block_len, **(defaults | choices))


def _fast_dllm_v2(block_len: int, in_block: bool) -> DiffusionMethod:
    part = max(block_len // 4, 1)
    cache = InBlockCache(block_len, sub_len=part) if in_block else BlockCausal(block_len)
    return complete(
        block_len, scheduler=SubBlocks(block_len, part, aligned=True, first_alone=True), cache=cache
    )


def _dream(block_len: int, tokens_per_step: int = 1, **choices: Any) -> DiffusionMethod:
    rule = DreamQuota(max(block_len // tokens_per_step, 1))
    return complete(block_len, rule=rule, **choices)


# fmt: off
_COMBINED: dict[str, dict[str, Maker]] = {
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
    "dream_sampled": {  # the published temperature and top-p
        "dream_sampled": lambda n: _dream(
            n, confidence=Tempered(NegEntropy()), constraint=Nucleus(top_p=0.95), temperature=0.2
        ),
    },
    "block_causal": {  # for models trained with blocks of this length
        "block_causal": lambda n: _block_causal(n, rule=Threshold(0.9)),
    },
    "causal_context": {  # and behind a text that is read causally
        "causal_context": lambda n: _block_causal(n, cache=CausalContext(n)),
    },
    "sdar": {  # one position per step at least, as many steps as positions
        "sdar": lambda n: _block_causal(n, rule=BlockQuota(n, n, 0.85)),
        "sdar_0.95": lambda n: _block_causal(n, rule=BlockQuota(n, n, 0.95)),
        "sdar_static": lambda n: _block_causal(n, rule=BlockQuota(n, n)),
        "sdar_sequential": lambda n: _block_causal(
            n, confidence=LeftToRight(), rule=BlockQuota(n, n)
        ),
    },
    "fast_dllm_v2": {  # shifted logits
        "fast_dllm_v2": lambda n: _fast_dllm_v2(n, in_block=False),
        "fast_dllm_v2_in_block": lambda n: _fast_dllm_v2(n, in_block=True),
    },
    "bd3lm": {  # blocks counted from the end of the prompt
        "bd3lm": lambda n: _quota(n, cache=BlockCausal(n, aligned=False)),
    },
    "llada2": {
        "llada2": lambda n: _block_causal(n, rule=BlockQuota(n, n, 0.95)),
    },
    "llada2_edit": {
        "llada2_edit": lambda n: _block_causal(n, rule=Threshold(0.7), reviser=TokenEdit(0.5)),
        "llada2_edit_fast": lambda n: _block_causal(n, rule=Threshold(0.5), reviser=TokenEdit(0.0)),
    },
    "uniform_noise": {  # for models trained on noise instead of MASK
        "uniform_noise": lambda n: complete(
            n, confidence=Annealed(), reviser=Renoise(), inputs=UniformNoise()
        ),
    },
    "credit": {
        "credit": lambda n: _threshold(n, 0.9, confidence=Credit()),
        "credit_0.7": lambda n: _threshold(n, 0.7, confidence=Credit()),
    },
    "prophet": {  # the answer is the whole completion
        "prophet": lambda n: _quota(n, stopper=Prophet(0, answer_len=100_000)),
    },
    "freedave": {  # the tokens of one_per_step and threshold
        "freedave": lambda n: _quota(n, lookahead=3),
        "freedave_threshold": lambda n: _threshold(n, 0.9, lookahead=3),
    },
    "token_edit": {
        "token_edit": lambda n: _threshold(n, 0.7, reviser=TokenEdit(0.5)),
        "token_edit_fast": lambda n: _threshold(n, 0.5, reviser=TokenEdit(0.0)),
    },
    "remask": {
        "remask": lambda n: _quota(n, 2, reviser=Remask()),
    },
    "running_confidence": {
        "running_confidence": lambda n: _quota(n, 2, reviser=RunningConfidence(), stopper=Eos()),
    },
    "adablock": {  # delimiter_ids depend on the tokenizer: fill them in
        "adablock": lambda n: _threshold(n, 0.9, scheduler=AdaBlock((), n)),
    },
}
# fmt: on


def _own_points(component: type[Component]) -> dict[str, Maker]:
    """The named points that a component brings along."""

    def maker(name: str) -> Maker:
        return lambda block_len: complete(block_len, **component.points(block_len)[name])

    return {name: maker(name) for name in component.points(1)}


FAMILIES: dict[str, dict[str, Maker]] = _COMBINED | {
    min(points, key=len): points
    for components in COMPONENTS.values()
    for component in components
    if (points := _own_points(component))
}

METHODS: dict[str, Maker] = {
    name: make for members in FAMILIES.values() for name, make in members.items()
}


def named(name: str, block_len: int) -> DiffusionMethod:
    """The method of the table.

    Args:
      name: a key of `METHODS`.
      block_len: positions per block, >= 1.

    Raises:
      ValueError: there is no such method, or no such block.
    """
    make = entry(METHODS, name)
    if block_len < 1:
        raise ValueError(f"block_len={block_len} must be at least 1")
    return make(block_len)


def family_of(name: str) -> str:
    """The family of a key of `METHODS`; ValueError if there is no such method."""
    entry(METHODS, name)
    return next(family for family, members in FAMILIES.items() if name in members)


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
        is_component = isinstance(old, Component)
        if isinstance(change, str) and is_component and (table := short_names(axis)):
            new = entry(table, change, axis)()
        elif is_component:
            if not isinstance(change, Mapping):
                kinds = "fields or a short name" if short_names(axis) else "fields"
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


def _field(name: str, owner: Component | DiffusionMethod, called: str) -> dataclasses.Field[Any]:
    known = {field.name: field for field in dataclasses.fields(owner) if field.name != "kind"}
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"{called} has no field {name!r}; {has}")
    return known[name]


def _check_kind(name: str, field: dataclasses.Field[Any], value: object) -> None:
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
