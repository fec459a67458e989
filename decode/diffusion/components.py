"""Every component of the diffusion loop: the table from which names, tests and pages are made.

A component is one file and one line here. See `decode.diffusion.contracts` for what it must do, and
`decode.diffusion.points` for the named methods that are made of them.
"""

from typing import Any

from decode.constraints.filters import Filters as Filters
from decode.constraints.nucleus import Nucleus as Nucleus
from decode.constraints.token_ban import TokenBan as TokenBan
from decode.diffusion.caches.block_causal import BlockCausal as BlockCausal
from decode.diffusion.caches.block_causal import CausalContext as CausalContext
from decode.diffusion.caches.delayed_cache import DelayedCache as DelayedCache
from decode.diffusion.caches.dual_cache import DualCache as DualCache
from decode.diffusion.caches.in_block_cache import InBlockCache as InBlockCache
from decode.diffusion.caches.no_cache import NoCache as NoCache
from decode.diffusion.caches.prefix_cache import PrefixCache as PrefixCache
from decode.diffusion.caches.vicinity_cache import VicinityCache as VicinityCache
from decode.diffusion.confidences.credit import Credit as Credit
from decode.diffusion.confidences.credit import SparseCredit as SparseCredit
from decode.diffusion.confidences.ends_last import EndsLast as EndsLast
from decode.diffusion.confidences.left_to_right import LeftToRight as LeftToRight
from decode.diffusion.confidences.margin import Margin as Margin
from decode.diffusion.confidences.neg_entropy import NegEntropy as NegEntropy
from decode.diffusion.confidences.pc_sampler import PcSampler as PcSampler
from decode.diffusion.confidences.probability import Probability as Probability
from decode.diffusion.confidences.random import Random as Random
from decode.diffusion.confidences.tempered import Tempered as Tempered
from decode.diffusion.contracts import Component
from decode.diffusion.inputs.mask import MaskInputs as MaskInputs
from decode.diffusion.inputs.smoothing import Smoothing as Smoothing
from decode.diffusion.inputs.uniform_noise import UniformNoise as UniformNoise
from decode.diffusion.method import AXES
from decode.diffusion.revisers.canvas_sampler import Annealed as Annealed
from decode.diffusion.revisers.canvas_sampler import Renoise as Renoise
from decode.diffusion.revisers.keep import Keep as Keep
from decode.diffusion.revisers.p2 import P2 as P2
from decode.diffusion.revisers.remask import Remask as Remask
from decode.diffusion.revisers.remdm import ReMDM as ReMDM
from decode.diffusion.revisers.running_confidence import RunningConfidence as RunningConfidence
from decode.diffusion.revisers.token_edit import TokenEdit as TokenEdit
from decode.diffusion.revisers.wino import NarrowOut as NarrowOut
from decode.diffusion.revisers.wino import WideIn as WideIn
from decode.diffusion.rules.block_quota import BlockQuota as BlockQuota
from decode.diffusion.rules.dream_quota import DreamQuota as DreamQuota
from decode.diffusion.rules.entropy_budget import EntropyBudget as EntropyBudget
from decode.diffusion.rules.entropy_threshold import EntropyThreshold as EntropyThreshold
from decode.diffusion.rules.factor import Factor as Factor
from decode.diffusion.rules.frechet import Frechet as Frechet
from decode.diffusion.rules.hierarchical import Hierarchical as Hierarchical
from decode.diffusion.rules.klass import Klass as Klass
from decode.diffusion.rules.learned_filter import LearnedFilter as LearnedFilter
from decode.diffusion.rules.local_leap import LocalLeap as LocalLeap
from decode.diffusion.rules.origin import Origin as Origin
from decode.diffusion.rules.quota import Quota as Quota
from decode.diffusion.rules.threshold import Threshold as Threshold
from decode.diffusion.schedulers.adablock import AdaBlock as AdaBlock
from decode.diffusion.schedulers.fixed_blocks import FixedBlocks as FixedBlocks
from decode.diffusion.schedulers.multi_block import MultiBlock as MultiBlock
from decode.diffusion.schedulers.slow_fast import SlowFast as SlowFast
from decode.diffusion.schedulers.sub_blocks import SubBlocks as SubBlocks
from decode.diffusion.stoppers.end_of_text import Eos as Eos
from decode.diffusion.stoppers.end_of_text import EosBlock as EosBlock
from decode.diffusion.stoppers.end_of_text import Filled as Filled
from decode.diffusion.stoppers.eotp import Eotp as Eotp
from decode.diffusion.stoppers.prophet import Prophet as Prophet

COMPONENTS: dict[str, tuple[type[Component], ...]] = {  # by axis
    axis: tuple(
        member
        for member in tuple(globals().values())
        if isinstance(member, type) and issubclass(member, kind)
    )
    for axis, kind in AXES.items()
}


def short_names(axis: str) -> dict[str, type[Component]]:
    """The components of an axis that users may ask for by a short name."""
    return {c.short_name: c for c in COMPONENTS.get(axis, ()) if c.short_name}


def by_name(axis: str, value: str | Component | None) -> Any:
    """A component as given (None: None), or that of a short name, at its defaults.

    Raises:
      ValueError: the axis has no such name.
    """
    if not isinstance(value, str):
        return value
    names = short_names(axis)
    if value not in names:
        raise ValueError(f"{axis}={value!r} must be one of {sorted(names)} or a component")
    return names[value]()
