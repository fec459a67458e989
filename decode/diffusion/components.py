"""The components of the diffusion loop, and the short names under which users may ask for them.

To add a method: one file beside these, and one line here if it should have a short name.
"""

from decode.constraints.nucleus import Nucleus
from decode.constraints.token_ban import TokenBan
from decode.diffusion.caches.block_causal import BlockCausal
from decode.diffusion.caches.delayed_cache import DelayedCache
from decode.diffusion.caches.dual_cache import DualCache
from decode.diffusion.caches.no_cache import NoCache
from decode.diffusion.caches.prefix_cache import PrefixCache
from decode.diffusion.caches.vicinity_cache import VicinityCache
from decode.diffusion.confidences.credit import Credit, SparseCredit
from decode.diffusion.confidences.margin import Margin
from decode.diffusion.confidences.neg_entropy import NegEntropy
from decode.diffusion.confidences.probability import Probability
from decode.diffusion.confidences.random import Random
from decode.diffusion.confidences.tempered import Tempered
from decode.diffusion.inputs.mask import MaskInputs
from decode.diffusion.inputs.smoothing import Smoothing
from decode.diffusion.inputs.uniform_noise import UniformNoise
from decode.diffusion.revisers.canvas_sampler import Annealed, Renoise
from decode.diffusion.revisers.keep import Keep
from decode.diffusion.revisers.remask import Remask
from decode.diffusion.revisers.remdm import ReMDM
from decode.diffusion.revisers.running_confidence import RunningConfidence
from decode.diffusion.revisers.token_edit import TokenEdit
from decode.diffusion.revisers.wino import NarrowOut, WideIn
from decode.diffusion.rules.dream_quota import DreamQuota
from decode.diffusion.rules.entropy_budget import EntropyBudget
from decode.diffusion.rules.entropy_threshold import EntropyThreshold
from decode.diffusion.rules.factor import Factor
from decode.diffusion.rules.hierarchical import Hierarchical
from decode.diffusion.rules.klass import Klass
from decode.diffusion.rules.learned_filter import LearnedFilter
from decode.diffusion.rules.local_leap import LocalLeap
from decode.diffusion.rules.origin import Origin
from decode.diffusion.rules.quota import Quota
from decode.diffusion.rules.threshold import Threshold
from decode.diffusion.schedulers.adablock import AdaBlock
from decode.diffusion.schedulers.fixed_blocks import FixedBlocks
from decode.diffusion.schedulers.multi_block import MultiBlock
from decode.diffusion.schedulers.slow_fast import SlowFast
from decode.diffusion.schedulers.sub_blocks import SubBlocks
from decode.diffusion.stoppers.end_of_text import Eos, EosBlock, Filled
from decode.diffusion.stoppers.eotp import Eotp
from decode.diffusion.stoppers.prophet import Prophet

CACHES = {
    "none": NoCache,
    "prefix": PrefixCache,
    "dual": DualCache,
    "vicinity": VicinityCache,
    "delayed": DelayedCache,
}
CONFIDENCES = {
    "probability": Probability,
    "margin": Margin,
    "neg_entropy": NegEntropy,
    "random": Random,
    "credit": Credit,
}
STOPPERS = {"filled": Filled, "eos": Eos, "eos_block": EosBlock}

__all__ = [
    "CACHES",
    "CONFIDENCES",
    "STOPPERS",
    "AdaBlock",
    "Annealed",
    "BlockCausal",
    "Credit",
    "DelayedCache",
    "DreamQuota",
    "DualCache",
    "EntropyBudget",
    "EntropyThreshold",
    "Eos",
    "EosBlock",
    "Eotp",
    "Factor",
    "Filled",
    "FixedBlocks",
    "Hierarchical",
    "Keep",
    "Klass",
    "LearnedFilter",
    "LocalLeap",
    "Margin",
    "MaskInputs",
    "MultiBlock",
    "NarrowOut",
    "NegEntropy",
    "NoCache",
    "Nucleus",
    "Origin",
    "PrefixCache",
    "Probability",
    "Prophet",
    "Quota",
    "Random",
    "ReMDM",
    "Remask",
    "Renoise",
    "RunningConfidence",
    "SlowFast",
    "Smoothing",
    "SparseCredit",
    "SubBlocks",
    "Tempered",
    "Threshold",
    "TokenBan",
    "TokenEdit",
    "UniformNoise",
    "VicinityCache",
    "WideIn",
]
