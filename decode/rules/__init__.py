"""The components of the diffusion loop, and the short names under which users may ask for them.

To add a method: one file beside these, and one line here if it should have a short name.
"""

from decode.rules.adablock import AdaBlock
from decode.rules.block_causal import BlockCausal
from decode.rules.caches import DualCache, NoCache, PrefixCache
from decode.rules.canvas_sampler import Annealed, Renoise
from decode.rules.confidences import Margin, NegEntropy, Probability, Random
from decode.rules.constraints import TokenBan
from decode.rules.credit import Credit, SparseCredit
from decode.rules.delayed_cache import DelayedCache
from decode.rules.dream_quota import DreamQuota
from decode.rules.entropy_budget import EntropyBudget
from decode.rules.entropy_threshold import EntropyThreshold
from decode.rules.eotp import Eotp
from decode.rules.factor import Factor
from decode.rules.fixed_blocks import FixedBlocks
from decode.rules.hierarchical import Hierarchical
from decode.rules.inputs import MaskInputs, Smoothing, UniformNoise
from decode.rules.klass import Klass
from decode.rules.learned_filter import LearnedFilter
from decode.rules.local_leap import LocalLeap
from decode.rules.multi_block import MultiBlock
from decode.rules.nucleus import Nucleus
from decode.rules.origin import Origin
from decode.rules.prophet import Prophet
from decode.rules.quota import Quota
from decode.rules.remask import Remask
from decode.rules.remdm import ReMDM
from decode.rules.revisers import Keep
from decode.rules.running_confidence import RunningConfidence
from decode.rules.slow_fast import SlowFast
from decode.rules.stoppers import Eos, EosBlock, Filled
from decode.rules.sub_blocks import SubBlocks
from decode.rules.tempered import Tempered
from decode.rules.threshold import Threshold
from decode.rules.token_edit import TokenEdit
from decode.rules.vicinity_cache import VicinityCache
from decode.rules.wino import NarrowOut, WideIn

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
