"""Dream's `diffusion_generate`."""

from __future__ import annotations

from decode.constraints.nucleus import Nucleus
from decode.constraints.token_ban import TokenBan
from decode.diffusion.confidences.margin import Margin
from decode.diffusion.confidences.neg_entropy import NegEntropy
from decode.diffusion.confidences.probability import Probability
from decode.diffusion.confidences.tempered import Tempered
from decode.diffusion.contracts import CommitRule
from decode.diffusion.method import DiffusionMethod
from decode.diffusion.public.sampling import check_choice
from decode.diffusion.rules.dream_quota import DreamQuota
from decode.diffusion.rules.origin import Origin
from decode.diffusion.schedulers.fixed_blocks import FixedBlocks
from decode.diffusion.stoppers.end_of_text import Eos

_MEASURES = {"maskgit_plus": Probability, "topk_margin": Margin, "entropy": NegEntropy}


def dream(
    *,
    steps: int = 512,
    eps: float = 1e-3,
    alg: str = "origin",
    alg_temp: float | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
) -> DiffusionMethod:
    """Dream, Dream-Coder, DiffuCoder (there alg="entropy", temperature 0.3, top_p 0.95).

    The published sampler spends a forward on each step, also if that decides nothing; of these here
    only `Origin`'s are made.

    Reference: Ye et al., "Dream 7B", arXiv:2508.15487.

    Args:
      steps: of the whole completion, which is one block: `DreamQuota(steps)` or `Origin(steps)`.
      eps: likewise.
      alg: "origin" is `Origin`; "maskgit_plus", "topk_margin" and "entropy" are `DreamQuota` by
        `Probability`, `Margin` and `NegEntropy`.
      alg_temp: `DreamQuota.alg_temp`.
      temperature: `temperature`; confidences are `Tempered`, after the filters.
      top_p: `Nucleus(top_p)`.
      top_k: `Nucleus(top_k=...)`.
    """
    check_choice("alg", alg, ("origin", *_MEASURES))
    measure = _MEASURES.get(alg, Probability)()
    rule: CommitRule = Origin(steps, eps)
    if alg in _MEASURES:
        units = "nats" if alg == "entropy" else "probability"
        rule = DreamQuota(steps, eps, alg_temp, units)
    elif alg_temp:
        raise ValueError(f"alg_temp={alg_temp} goes with an alg that ranks, not with 'origin'")
    has_filters = top_p is not None or top_k is not None
    return DiffusionMethod(
        FixedBlocks(None),
        confidence=Tempered(measure) if temperature else measure,
        rule=rule,
        stopper=Eos(),
        constraint=Nucleus(top_p=top_p, top_k=top_k) if has_filters else TokenBan(),
        temperature=temperature or None,
    )
