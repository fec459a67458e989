"""How other tools' decoders are called, in their own words: their arguments in, a method out.

    from decode.diffusion.public import sdar

    generate(lm, prompts, method=sdar(block_length=4, confidence_threshold=0.9), gen_len=512)

Every function takes the arguments of one public decoder under their names and with their defaults,
as far as they say how to decode; what remains (prompts, lengths, seeds) is told to `generate`. Each
docstring says what becomes of an argument here. What has no equivalent is refused.
"""

from decode.diffusion.public.a2d import bd3lm as bd3lm
from decode.diffusion.public.dream import dream as dream
from decode.diffusion.public.fast_dllm import fast_dllm as fast_dllm
from decode.diffusion.public.fast_dllm_v2 import fast_dllm_v2 as fast_dllm_v2
from decode.diffusion.public.llada import llada as llada
from decode.diffusion.public.llada2 import llada2 as llada2
from decode.diffusion.public.llada2 import llada2_1 as llada2_1
from decode.diffusion.public.sdar import sdar as sdar
from decode.diffusion.public.sdar import sdar_evaluation as sdar_evaluation
from decode.diffusion.public.sglang import sglang as sglang
from decode.diffusion.public.stable_diffcoder import stable_diffcoder as stable_diffcoder

DECODERS = (
    llada,
    fast_dllm,
    dream,
    sdar,
    sdar_evaluation,
    fast_dllm_v2,
    bd3lm,
    stable_diffcoder,
    llada2,
    llada2_1,
    sglang,
)
