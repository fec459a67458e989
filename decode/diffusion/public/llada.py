"""LLaDA's `generate`."""

from __future__ import annotations

from decode.constraints.token_ban import TokenBan
from decode.diffusion.confidences.ends_last import EndsLast
from decode.diffusion.confidences.probability import Probability
from decode.diffusion.confidences.random import Random
from decode.diffusion.method import DiffusionMethod
from decode.diffusion.public.sampling import check_choice, steps_per_block
from decode.diffusion.rules.quota import Quota
from decode.diffusion.schedulers.fixed_blocks import FixedBlocks
from decode.diffusion.stoppers.end_of_text import Eos


def llada(
    *,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    eos_id: int = 126081,
    eot_id: int = 126348,
) -> DiffusionMethod:
    """LLaDA, LLaDA-1.5, iLLaDA, and dllm's MDLM sampler (full attention).

    The published sampler fills what comes behind the end of the text, too; here a row ends there,
    with the same text (`stopper="filled"` goes on).

    Reference: Nie et al., "Large Language Diffusion Models", arXiv:2502.09992.

    Args:
      steps: in all; a block has its share of them, `Quota(steps_per_block)`.
      gen_length: the `gen_len` of `generate`; needed here to count blocks.
      block_length: `FixedBlocks(block_len)`.
      temperature: `temperature`; confidences are those without it.
      cfg_scale: `guidance`.
      remasking: "low_confidence" is `Probability`, "random" is `Random`.
      logits_eos_inf: `TokenBan((eos_id,))`: the text never ends.
      confidence_eos_eot_inf: `EndsLast((eos_id, eot_id))`, at any temperature.
      eos_id: the end of the text, for the two before; the published sampler has LLaDA-8B's.
      eot_id: the end of a turn, likewise.
    """
    check_choice("remasking", remasking, ("low_confidence", "random"))
    if confidence_eos_eot_inf and remasking == "random":
        raise ValueError("confidence_eos_eot_inf=True needs remasking='low_confidence'")
    confidence = Random() if remasking == "random" else Probability()
    return DiffusionMethod(
        FixedBlocks(block_length),
        confidence=EndsLast((eos_id, eot_id)) if confidence_eos_eot_inf else confidence,
        rule=Quota(steps_per_block(steps, gen_length, block_length)),
        stopper=Eos(),
        constraint=TokenBan((eos_id,) if logits_eos_inf else ()),
        temperature=temperature or None,
        guidance=cfg_scale or None,
    )
