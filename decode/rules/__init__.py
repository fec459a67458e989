"""The components of the diffusion loop, and the short names under which users may ask for them.

To add a method: one file beside these, and one line here if it should have a short name.
"""

from decode.rules.adablock import AdaBlock
from decode.rules.caches import DualCache, NoCache, PrefixCache
from decode.rules.confidences import Margin, NegEntropy, Probability, Random
from decode.rules.constraints import TokenBan
from decode.rules.credit import Credit, SparseCredit
from decode.rules.dream_quota import DreamQuota
from decode.rules.entropy_budget import EntropyBudget
from decode.rules.entropy_threshold import EntropyThreshold
from decode.rules.factor import Factor
from decode.rules.fixed_blocks import FixedBlocks
from decode.rules.hierarchical import Hierarchical
from decode.rules.klass import Klass
from decode.rules.local_leap import LocalLeap
from decode.rules.multi_block import MultiBlock
from decode.rules.prophet import Prophet
from decode.rules.quota import Quota
from decode.rules.revisers import Keep
from decode.rules.slow_fast import SlowFast
from decode.rules.stoppers import Eos, EosBlock, Filled
from decode.rules.sub_blocks import SubBlocks
from decode.rules.threshold import Threshold
from decode.rules.wino import NarrowOut, WideIn

CACHES = {"none": NoCache, "prefix": PrefixCache, "dual": DualCache}
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
    "Credit",
    "DreamQuota",
    "DualCache",
    "EntropyBudget",
    "EntropyThreshold",
    "Eos",
    "EosBlock",
    "Factor",
    "Filled",
    "FixedBlocks",
    "Hierarchical",
    "Keep",
    "Klass",
    "LocalLeap",
    "Margin",
    "MultiBlock",
    "NarrowOut",
    "NegEntropy",
    "NoCache",
    "PrefixCache",
    "Probability",
    "Prophet",
    "Quota",
    "Random",
    "SlowFast",
    "SparseCredit",
    "SubBlocks",
    "Threshold",
    "TokenBan",
    "WideIn",
]
