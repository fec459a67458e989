"""Formats of models that are not Llama's: fields, tensors, rotary kinds, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from dlm import rope
from dlm.hf.files import format_for, raw_config, read_config
from dlm.hf.saving import save_hf
from dlm.hf.weights import load_params
from dlm.params import param_shardings
from dlm.presets import PRESETS
from dlm.sharding import make_mesh
from tests.lib.checkpoints import assert_same, random_params
from tests.lib.families import FAMILIES


def written(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("architecture", FAMILIES)
def test_save_and_load_is_exact(tmp_path, architecture):
    cfg = FAMILIES[architecture]
    params = random_params(cfg)
    save_hf(tmp_path / "one", params, cfg)
    raw = json.loads((tmp_path / "one/config.json").read_text())
    assert raw["architectures"] == [architecture]
    again = read_config(tmp_path / "one")
    assert again == dataclasses.replace(cfg, family=again.family)
    assert_same(load_params(tmp_path / "one", again), params)


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"tiny"}))
def test_presets_are_written_and_read(tmp_path, preset):
    cfg = PRESETS[preset]
    raw = raw_config(cfg, format_for(cfg))
    assert read_config(written(tmp_path, raw)) == cfg


# As published.
SHARED = '"attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16"'
PUBLISHED = {
    "mistral_7b": """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
        "use_cache": true, "vocab_size": 32000, """,
    "mixtral_8x7b": """{"architectures": ["MixtralForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "output_router_logits": false, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
        "tie_word_embeddings": false, "vocab_size": 32000, """,
    "qwen3_30b_a3b": """{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
        "use_sliding_window": false, "vocab_size": 151936, """,
    "olmoe_1b_7b": """{"architectures": ["OlmoeForCausalLM"], "attention_bias": false,
        "clip_qkv": null, "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe",
        "norm_topk_prob": false, "num_attention_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
        "output_router_logits": false, "pad_token_id": 1, "rope_scaling": null,
        "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": false,
        "vocab_size": 50304, """,
    "gemma2_2b": """{"architectures": ["Gemma2ForCausalLM"], "attention_bias": false,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 8192,
        "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
        "vocab_size": 256000, """,
    "gemma3_1b": """{"architectures": ["Gemma3ForCausalLM"], "attention_bias": false,
        "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": [1, 106], "final_logit_softcapping": null, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "vocab_size": 262144, """,
    "phi3_mini_4k": """{"architectures": ["Phi3ForCausalLM"], "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "bos_token_id": 1,
        "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0, "sliding_window": 2047,
        "tie_word_embeddings": false, "attention_bias": false, "vocab_size": 32064, """,
    "gpt2": """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
        "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
        "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
        "summary_type": "cls_index", "summary_use_proj": true, "task_specific_params": {
        "text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257, """,
    "llada2_mini": """{"architectures": ["LLaDA2MoeModelLM"], "eos_token_id": 156892,
        "embedding_dropout": 0.0, "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 5120, "max_position_embeddings": 32768,
        "max_window_layers": 28, "model_type": "llada2_moe", "moe_intermediate_size": 512,
        "moe_router_enable_expert_bias": true, "n_group": 8, "norm_head": false,
        "norm_softmax": false, "norm_topk_prob": true, "num_attention_heads": 16,
        "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 20,
        "num_key_value_heads": 4, "num_shared_experts": 1, "output_dropout": 0.0,
        "output_router_logits": false, "pad_token_id": 156892, "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 600000, "rotary_dim": 64,
        "routed_scaling_factor": 2.5, "router_dtype": "fp32", "score_function": "sigmoid",
        "sliding_window": 4096, "tie_word_embeddings": false, "topk_group": 4, "use_bias": false,
        "use_qk_norm": true, "use_qkv_bias": false, "use_rmsnorm": true,
        "use_sliding_window": false, "vocab_size": 157184, """,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_configs_give_the_presets(tmp_path, preset):
    cfg = read_config(written(tmp_path, json.loads(PUBLISHED[preset] + SHARED + "}")))
    expected = PRESETS[preset]
    named = ("bos_token_id", "pad_token_id", "more_eos_ids", "eos_token_id")
    own = {name: getattr(cfg, name) for name in named}
    assert cfg == dataclasses.replace(expected, **own)
    assert {cfg.eos_token_id, *cfg.more_eos_ids} & {expected.eos_token_id, *expected.more_eos_ids}


# ---- Tensors ----------------------------------------------------------------------------------


def test_parts_of_one_matrix_lie_side_by_side(tmp_path):
    """Phi-3: rows of queries, keys, values; of gate, up. GPT-2: columns."""
    for architecture, name, leaves in (
        ("Phi3ForCausalLM", "model.layers.1.self_attn.qkv_proj.weight", "attention q k v"),
        ("Phi3ForCausalLM", "model.layers.1.mlp.gate_up_proj.weight", "mlp gate up"),
        ("GPT2LMHeadModel", "transformer.h.1.attn.c_attn.weight", "attention q k v"),
        ("GPT2LMHeadModel", "transformer.h.1.attn.c_attn.bias", "attention q_bias k_bias v_bias"),
    ):
        cfg = FAMILIES[architecture]
        params = random_params(cfg)
        save_hf(tmp_path / name, params, cfg)
        stored = safetensors.numpy.load_file(tmp_path / name / "model.safetensors")[name]
        group, *names = leaves.split()
        parts = [params["layers"][group][leaf][1] for leaf in names]
        if group == "mlp":
            expected = np.concatenate([part.T for part in parts])
        else:  # [heads, H, D] or [heads, H]
            rows = [part.reshape(-1, *part.shape[2:]) for part in parts]
            expected = np.concatenate(rows)
            expected = expected.T if architecture[:3] == "GPT" else expected
        np.testing.assert_array_equal(stored, expected)


def test_experts_are_tensors_of_their_own(tmp_path):
    """Behind a dense layer: number 2 of layer 1 is the third of the first that has experts."""
    cfg = FAMILIES["LLaDA2MoeModelLM"]
    params = random_params(cfg)
    save_hf(tmp_path / "model", params, cfg)
    stored = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    moe = params["layers"]["experts"]["moe"]
    mlp = "model.layers.1.mlp."
    np.testing.assert_array_equal(stored[f"{mlp}experts.2.gate_proj.weight"], moe["gate"][0, 2].T)
    np.testing.assert_array_equal(stored[f"{mlp}experts.7.down_proj.weight"], moe["down"][0, 7].T)
    np.testing.assert_array_equal(stored[f"{mlp}gate.expert_bias"], moe["bias"][0])
    assert f"{mlp}up_proj.weight" not in stored and "model.layers.0.mlp.up_proj.weight" in stored


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 (fake) devices")
@pytest.mark.parametrize("architecture", ["LLaDA2MoeModelLM", "Phi3ForCausalLM"])
def test_every_device_reads_its_own_part(tmp_path, architecture):
    cfg = FAMILIES[architecture]
    params = random_params(cfg)
    save_hf(tmp_path / "model", params, cfg)
    mesh = make_mesh(fsdp=2, tensor=2)
    loaded = load_params(tmp_path / "model", cfg, mesh)
    assert_same(loaded, params)
    for leaf, sharding in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(param_shardings(cfg, mesh)), strict=True
    ):
        assert leaf.sharding == sharding
    if cfg.experts is not None:
        gate = loaded["layers"]["experts"]["moe"]["gate"]
        assert gate.addressable_shards[0].data.shape == (3, 4, 16, 12)


def test_gpt2_without_its_prefix(tmp_path):
    """The first uploads: shorter names, and masks that nothing reads."""
    cfg = FAMILIES["GPT2LMHeadModel"]
    params = random_params(cfg)
    save_hf(tmp_path / "model", params, cfg)
    file = tmp_path / "model" / "model.safetensors"
    stored = safetensors.numpy.load_file(file)
    short = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    short["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    safetensors.numpy.save_file(short, file)
    assert_same(load_params(tmp_path / "model", cfg), params)


# ---- Rotary embeddings ------------------------------------------------------------------------

LLAMA = raw_config(
    dataclasses.replace(PRESETS["smollm2_135m"], rope_theta=10_000.0),
    format_for(PRESETS["smollm2_135m"]),
)


def rotary(tmp_path, **entries):
    raw = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    return read_config(written(tmp_path, raw | entries))


def test_rotary_kinds(tmp_path):
    """In either layout; defaults as in the published code."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for said, expected in (
        ({"type": "linear", "factor": 2.0}, rope.Linear(factor=2.0)),
        ({"type": "dynamic", "factor": 2.0}, rope.Dynamic(factor=2.0, original_max_seq_len=8192)),
        (yarn, rope.Yarn(factor=4.0, original_max_seq_len=32, attention=0.1 * np.log(4.0) + 1)),
        (
            yarn | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 16, "truncate": False},
            rope.Yarn(
                factor=4.0, original_max_seq_len=32, attention=1.0, beta_fast=16,
                is_truncated=False,
            ),
        ),
        (
            {"type": "longrope", "short_factor": [1] * 32, "long_factor": [2] * 32, "factor": 1},
            rope.LongRope(
                short=(1.0,) * 32, long=(2.0,) * 32, original_max_seq_len=8192, attention=1.0
            ),
        ),
    ):  # fmt: skip
        old = rotary(tmp_path, rope_scaling=said, rope_theta=500.0)
        new = rotary(tmp_path, rope_parameters=said | {"rope_theta": 500.0})
        both = rotary(tmp_path, rope_scaling=said, rope_parameters=said | {"rope_theta": 500.0})
        assert old == new == both
        assert old.rope_scaling == expected and old.rope_theta == 500.0
    beside = rotary(tmp_path, rope_theta=77.0, rope_parameters={"rope_type": "default"})
    assert beside.rope_theta == 77.0 and rotary(tmp_path).rope_theta == 10_000.0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "rope_scaling=.* and rope_parameters=.* must say the same",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
            "and the 1000000.0 of",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling must give factor"),
        ({"rope_scaling": {"factor": 2.0}}, "has factor=2.0, which means nothing there"),
        ({"rope_scaling": {"type": "mrope"}}, "of type 'mrope' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": "x"}}, "factor='x' must be a number"),
        ({"rope_scaling": 3}, "rope_scaling=3 must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor=-1 must be positive"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_theta": -1}, "rope_theta=-1 must be positive"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}},
            "short_factor has 1 numbers and must have 32",
        ),
    ],
)
def test_rotary_settings_that_cannot_be_are_refused(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        rotary(tmp_path, **entries)


# ---- Refusals ---------------------------------------------------------------------------------


# Our fields are not what a file says; of what it does not say that is said.
SIZES = [
    (
        "MistralForCausalLM",
        {"num_attention_heads": 5},
        "config.json: num_attention_heads=5 must be a multiple of num_key_value_heads=2",
    ),
    (
        "MistralForCausalLM",
        {"hidden_size": 33, "head_dim": None},
        "config.json: hidden_size=33 must be a multiple of num_attention_heads=4, as the width of",
    ),
    (
        "MistralForCausalLM",
        {"hidden_size": 36, "head_dim": None},
        r"config.json: head_dim=9 \(by default\) must be even",
    ),
    ("GPT2LMHeadModel", {"n_embd": 33}, "n_embd=33 must be a multiple of n_head=4, as the width"),
    ("MistralForCausalLM", {"rms_norm_eps": -1.0}, "config.json: rms_norm_eps=-1.0 must be at"),
    ("Gemma2ForCausalLM", {"attn_logit_softcapping": 0}, "attn_logit_softcapping=0 must be pos"),
    ("Gemma2ForCausalLM", {"final_logit_softcapping": -2.5}, "final_logit_softcapping=-2.5 must"),
    ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not"),
    ("Gemma3ForCausalLM", {"rope_local_base_freq": -1}, "rope_local_base_freq=-1 must be positive"),
    (
        "Gemma3ForCausalLM",
        {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
        "partial_rotary_factor=0.5 is not supported; only 1 is",
    ),
    (
        "Ministral3ForCausalLM",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2, "attention_factor": 0,
                             "llama_4_scaling_beta": 0.1,
                             "original_max_position_embeddings": 32}, "rope_scaling": None},
        "rotary scaling of type 'yarn': attention_factor=0 must be positive",
    ),
    (
        "Phi3ForCausalLM",
        {"partial_rotary_factor": 0.4},
        "partial_rotary_factor=0.4 makes 3 of head_dim=8 numbers rotate, which must be even",
    ),
    ("SDARMoeForCausalLM", {"mask_token_id": 96}, r"mask_token_id=96 must be in \[0, vocab_size="),
]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "entries", "message"),
    [
        ("MistralForCausalLM", {"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ("MistralForCausalLM", {"sliding_window": "x"}, "sliding_window='x' must be an integer"),
        (
            "MistralForCausalLM",
            {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            "must be the same for all layers",
        ),
        ("Gemma2ForCausalLM", {"layer_types": ["full"] * 3}, "must be a list of 3 entries"),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma2ForCausalLM", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("Gemma2ForCausalLM", {"sliding_window_size": 5}, "sliding_window_size=5 must be slid"),
        ("Gemma3ForCausalLM", {"sliding_window_size": 6}, "sliding_window_size=6: it is not kn"),
        ("Gemma3ForCausalLM", {"rope_local_base_freq": None}, "rope_local_base_freq=None must be"),
        ("Gemma3ForCausalLM", {"rope_local_base_freq": "x"}, "rope_local_base_freq='x'"),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "only 'longrope' is",
        ),
        (
            "SmolLM3ForCausalLM",
            {"no_rope_layers": [1, 2, 0, 1]},
            "no_rope_layers=.* must be a list",
        ),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ("GPT2LMHeadModel", {"activation_function": "relu"}, "activation_function='relu'"),
        ("Qwen3MoeForCausalLM", {"num_local_experts": 3}, "num_experts=8 and num_local_experts=3"),
        ("Qwen3MoeForCausalLM", {"qkv_bias": True}, "qkv_bias=True is not supported; only False"),
        ("SDARMoeForCausalLM", {"use_qk_norm": False}, "use_qk_norm=False is not supported; only"),
        (
            "Qwen3MoeForCausalLM",
            {"shared_expert_intermediate_size": 8},
            "shared_expert_intermediate_size=8 is not supported; only 0 is",
        ),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [9]}, r"mlp_only_layers=\[9\] must be a list"),
        (
            "Qwen3MoeForCausalLM",
            {"num_experts_per_tok": 9},
            r"num_experts_per_tok=9 must be in \[1, num_experts=8\]",
        ),
        ("LLaDA2MoeModelLM", {"score_function": "softmax"}, "score_function='softmax'"),
        ("LLaDA2MoeModelLM", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("LLaDA2MoeModelLM", {"rotary_dim": 6}, "rotary_dim=6 and partial_rotary_factor must say"),
        ("LLaDA2MoeModelLM", {"use_qkv_bias": True}, "use_qkv_bias=True"),
        ("LLaDA2MoeModelLM", {"n_group": 3}, "topk_group=2 of n_group=3 must split num_experts=8"),
        *SIZES,
        ("LLaDAMoEModelLM", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
        ("LLaDAMoEModelLM", {"moe_router_score_function": "sigmoid"}, "'sigmoid' is not supported"),
        ("GraniteForCausalLM", {"activation": "swiglu"}, "activation='swiglu': it is not known"),
        ("GraniteForCausalLM", {"logits_scaling": 0}, "logits_scaling=0 must be positive"),
        ("Ministral3ForCausalLM", {"rope_parameters": None}, "must give llama_4_scaling_beta"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, architecture, entries, message):
    cfg = FAMILIES[architecture]
    raw = raw_config(cfg, format_for(cfg))
    with pytest.raises(ValueError, match=message):
        read_config(written(tmp_path, raw | entries))


def test_a_model_is_written_as_what_it_was(tmp_path):
    """Mistral without a window is Llama, but it stays Mistral, or says why it cannot."""
    raw = json.loads(PUBLISHED["mistral_7b"] + SHARED + "}") | {"sliding_window": None}
    cfg = read_config(written(tmp_path, raw))
    assert cfg.family == "MistralForCausalLM"
    assert format_for(cfg).model_type == "mistral"
    assert format_for(dataclasses.replace(cfg, family=None)).model_type == "llama"
    with pytest.raises(ValueError, match=r"can hold this model: mistral needs o_bias=False"):
        format_for(dataclasses.replace(cfg, o_bias=True))
    with pytest.raises(ValueError, match=r"llama needs logit_cap=None, not 3"):
        format_for(dataclasses.replace(cfg, family=None, logit_cap=3.0))
