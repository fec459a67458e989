"""Fast-dLLM's three `generate` functions for LLaDA, without and with caches."""

from __future__ import annotations

from decode.diffusion.caches.canvas import CachePolicy
from decode.diffusion.caches.dual_cache import DualCache
from decode.diffusion.caches.no_cache import NoCache
from decode.diffusion.caches.prefix_cache import PrefixCache
from decode.diffusion.contracts import CommitRule
from decode.diffusion.method import DiffusionMethod
from decode.diffusion.public.llada import llada
from decode.diffusion.rules.factor import Factor
from decode.diffusion.rules.threshold import Threshold


def fast_dllm(
    *,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    threshold: float | None = None,
    factor: float | None = None,
    use_cache: bool = False,
    dual_cache: bool = False,
) -> DiffusionMethod:
    """Fast-dLLM: LLaDA's sampler with rules that go by confidence, and block caches.

    Reference: Wu et al., "Fast-dLLM", arXiv:2505.22618.

    Args:
      steps: as for `llada`; without effect under a threshold or a factor.
      gen_length: as for `llada`.
      block_length: `FixedBlocks(block_len)`.
      temperature: `temperature`; confidences are those without it.
      remasking: as for `llada`.
      threshold: `Threshold(threshold)`; None: the quota of `steps`.
      factor: `Factor(factor)`; not with a threshold.
      use_cache: `PrefixCache()`.
      dual_cache: with `use_cache`, `DualCache()`.
    """
    if threshold is not None and factor is not None:
        raise ValueError(f"threshold={threshold} and factor={factor} are two rules: give one")
    if dual_cache and not use_cache:
        raise ValueError("dual_cache=True needs use_cache=True")
    by_confidence = threshold is not None or factor is not None
    method = llada(
        steps=-(-gen_length // block_length) if by_confidence else steps,
        gen_length=gen_length,
        block_length=block_length,
        temperature=temperature,
        remasking=remasking,
    )
    rule: CommitRule = method.rule
    if threshold is not None:
        rule = Threshold(threshold)
    elif factor is not None:
        rule = Factor(factor)
    cache: CachePolicy = NoCache()
    if use_cache:
        cache = DualCache() if dual_cache else PrefixCache()
    return method.replace(rule=rule, cache=cache)
