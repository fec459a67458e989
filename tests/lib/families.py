"""Small models of every published family: presets, shrunk."""

import dataclasses

from dlm import rope
from dlm.config import Experts, ModelConfig
from dlm.presets import PRESETS

SIZES = dict(
    d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, vocab_size=96, max_seq_len=128,
    dtype="float32",
)  # fmt: skip
IDS = dict(eos_token_id=2, more_eos_ids=(), bos_token_id=1, pad_token_id=0)


def small(cfg: ModelConfig, **changes) -> ModelConfig:
    """The same kinds of layers, a few of each, and few of everything."""
    sizes = SIZES | IDS | dict(n_layers=max(3, min(len(cfg.pattern), 6))) | changes
    if cfg.experts is not None:
        shared = 12 if cfg.experts.shared_d_ff else 0
        sizes["experts"] = dataclasses.replace(
            cfg.experts, num_experts=8, num_chosen=2, d_ff=12, shared_d_ff=shared,
            num_groups=min(cfg.experts.num_groups, 4),
            num_chosen_groups=min(cfg.experts.num_chosen_groups, 2),
        )  # fmt: skip
    if cfg.mask_token_id is not None:
        sizes["mask_token_id"] = 93
    if cfg.sliding_window is not None:
        sizes.setdefault("sliding_window", 6)
    if cfg.rotary_dim is not None:
        sizes["rotary_dim"] = 4
    if cfg.embed_scale != 1:
        sizes["embed_scale"] = 32**0.5
    if len(cfg.stacks) > 1:
        sizes["pattern"] = cfg.pattern[: sizes["n_layers"]]
    return dataclasses.replace(cfg, **sizes)


YARN = rope.Yarn(factor=4.0, original_max_seq_len=32, attention=1.1, is_truncated=False)
LONG = rope.LongRope(short=(1.0, 1.5), long=(2.0, 3.0), original_max_seq_len=32, attention=1.2)
# Of every family one; its architecture.
FAMILIES = {
    "MistralForCausalLM": small(PRESETS["mistral_7b"]),
    "Ministral3ForCausalLM": small(
        PRESETS["mistral_7b"], pattern=("dense global rotary",), sliding_window=None,
        rope_scaling=YARN, query_growth=(0.1, 32),
    ),
    "MixtralForCausalLM": small(PRESETS["mixtral_8x7b"], d_ff=12),
    "Qwen3MoeForCausalLM": small(PRESETS["qwen3_30b_a3b"]),
    "OlmoeForCausalLM": small(PRESETS["olmoe_1b_7b"], d_ff=12, clip_qkv=2.0),
    "Gemma2ForCausalLM": small(PRESETS["gemma2_2b"], attention_scale=10**-0.5),
    "Gemma3ForCausalLM": small(PRESETS["gemma3_4b"]),
    "Phi3ForCausalLM": small(PRESETS["phi3_mini_4k"], rotary_dim=4, rope_scaling=LONG),
    "SmolLM3ForCausalLM": small(PRESETS["smollm3_3b"]),
    "GPT2LMHeadModel": small(PRESETS["gpt2"], n_kv_heads=4),
    "Olmo2ForCausalLM": small(
        PRESETS["llama3_2_1b"], rope_scaling=rope.Linear(factor=2.0), norm_places="after",
        qk_norm=True, joint_qk_norm=True,
    ),
    "GraniteForCausalLM": small(
        PRESETS["llama3_2_1b"], rope_scaling=rope.Dynamic(factor=2.0, original_max_seq_len=128),
        embed_scale=12.0, attention_scale=0.02, residual_scale=0.25, logit_scale=0.125,
    ),
    "Qwen2MoeForCausalLM": small(
        PRESETS["qwen2_5_0_5b"], pattern=("dense global rotary", "experts global rotary"),
        experts=Experts(
            num_experts=8, num_chosen=2, d_ff=12, is_renormalised=False, shared_d_ff=24,
            has_shared_gate=True,
        ),
    ),
    "SeedOssForCausalLM": small(PRESETS["llama3_1_8b"], qkv_bias=True, family="SeedOssForCausalLM"),
    "LLaDAMoEModelLM": small(PRESETS["llada_moe_7b_a1b"]),
    "LLaDA2MoeModelLM": small(PRESETS["llada2_mini"], n_layers=4),
    "SDARMoeForCausalLM": small(PRESETS["sdar_30b_a3b"]),
}  # fmt: skip
