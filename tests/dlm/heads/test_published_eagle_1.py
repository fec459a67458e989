"""Published EAGLE-1 and -2 files: what config.json says is done, or refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import dlm
from dlm.heads.published.eagle_1 import load, save
from dlm.window import Window

T, D, V, H, F = 5, 16, 24, 4, 20
# As published for Llama 2, Llama 3 and Qwen2, but for the sizes, and numbers that show.
LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": D, "initializer_range": 0.02, "intermediate_size": F,
    "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": D // H,
    "num_key_value_heads": D // H, "num_hidden_layers": 1, "pad_token_id": 0,
    "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.28.1", "use_cache": True, "vocab_size": V,
}  # fmt: skip
LLAMA_3 = LLAMA_2 | {
    "bias": False, "num_key_value_heads": 2, "rope_scaling": None, "rope_theta": 500.0,
    "rms_norm_eps": 0.3, "attention_bias": False, "pretraining_tp": 1,
}  # fmt: skip
QWEN_2 = LLAMA_2 | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "qkv_bias": True, "bias": True,
    "max_window_layers": 28, "use_sliding_window": False, "sliding_window": 131072,
    "rope_theta": 1000.0, "num_key_value_heads": 2,
}  # fmt: skip
FILES = {"llama 2": LLAMA_2, "llama 3": LLAMA_3, "qwen 2": QWEN_2}


def tensors_of(raw):
    """Of such a network."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    heads = {"q": D, "k": raw["num_key_value_heads"] * H, "v": raw["num_key_value_heads"] * H}
    found = {f"layers.0.self_attn.{x}_proj.weight": draw(n, D) / 4 for x, n in heads.items()}
    if raw.get("qkv_bias"):
        found |= {f"layers.0.self_attn.{x}_proj.bias": draw(n) for x, n in heads.items()}
    if raw.get("bias", True):
        found["fc.bias"] = draw(D)
    return found | {
        "layers.0.self_attn.o_proj.weight": draw(D, D) / 4,
        "layers.0.mlp.gate_proj.weight": draw(F, D) / 4,
        "layers.0.mlp.up_proj.weight": draw(F, D) / 4,
        "layers.0.mlp.down_proj.weight": draw(D, F) / 4,
        "layers.0.post_attention_layernorm.weight": draw(D),
        "fc.weight": draw(D, 2 * D) / 4,
        "embed_tokens.weight": draw(V, D),
    }


def written(root, raw, tensors):
    (root / "config.json").write_text(json.dumps(raw))
    safetensors.numpy.save_file(tensors, root / "model.safetensors")
    return root


def states_of(raw, tensors, features, tokens):
    """As the public code computes them, in float64."""
    w = {name: x.astype(np.float64) for name, x in tensors.items()}
    x = np.concatenate([w["embed_tokens.weight"][tokens], features], axis=1) @ w["fc.weight"].T
    x = x + w.get("fc.bias", 0)
    frequency = raw.get("rope_theta", 1e4) ** (-np.arange(0, H, 2) / H)
    angle = np.arange(T)[:, None, None] * frequency

    def heads(name):
        y = x @ w[f"layers.0.self_attn.{name}_proj.weight"].T
        y = (y + w.get(f"layers.0.self_attn.{name}_proj.bias", 0)).reshape(T, -1, H)
        if name != "v":
            a, b = np.split(y, 2, axis=-1)
            cos, sin = np.cos(angle), np.sin(angle)
            y = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return np.repeat(y, D // H // y.shape[1], axis=1)

    q, k, v = map(heads, "qkv")
    scores = np.einsum("tnh,snh->nts", q, k) / H**0.5 + np.triu(np.full((T, T), -1e30), 1)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    attended = np.einsum("nts,snh->tnh", p / p.sum(axis=-1, keepdims=True), v).reshape(T, D)
    x = x + attended @ w["layers.0.self_attn.o_proj.weight"].T
    h = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + raw["rms_norm_eps"])
    h = h * w["layers.0.post_attention_layernorm.weight"]
    gate, up, down = (w[f"layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    gate = h @ gate.T
    return x + (gate / (1 + np.exp(-gate)) * (h @ up.T)) @ down.T


@jax.jit
def run(network, params, features, tokens):
    window = Window.at(tokens[None], jnp.zeros(1, jnp.int32), is_causal=True)
    return network.read(params, network.begin(features[None]), window)[0][0]


@pytest.mark.parametrize("raw", FILES.values(), ids=list(FILES))
def test_what_a_file_says_is_done(tmp_path, toy_cfg, toy_params, raw):
    tensors = tensors_of(raw)
    network = load(written(tmp_path, raw, tensors), toy_cfg)
    features = np.random.default_rng(1).normal(size=(T, D)).astype(np.float32)
    tokens = np.array([3, 1, 4, 1, 5], np.int32)
    expected = states_of(raw, tensors, features, tokens)
    np.testing.assert_allclose(run(network, toy_params, features, tokens), expected, atol=1e-4)
    save(tmp_path / "again", network)
    again = load(tmp_path / "again", toy_cfg)
    assert jax.tree.structure(again) == jax.tree.structure(network)
    for ours, theirs in zip(*map(jax.tree.leaves, (again, network)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_without_an_embedding_it_is_that_of_the_target(tmp_path, toy_cfg):
    tensors = tensors_of(LLAMA_2)
    del tensors["embed_tokens.weight"]
    assert "embed" not in load(written(tmp_path, LLAMA_2, tensors), toy_cfg).own


def test_what_is_refused(tmp_path, toy_cfg):
    for changes, message in (
        ({"bias": False}, r"config.json: bias=False must be True, .* has a tensor fc.bias"),
        ({"bias": "no"}, "config.json: bias='no' must be true or false"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2 must be 1 to go with this target"),
        ({"hidden_size": 32}, "hidden_size=32 must be 16 to go with this target"),
        ({"qkv_bias": True}, "layers.0.self_attn.k_proj.bias is missing"),
        ({"attention_bias": True}, "layers.0.self_attn.k_proj.bias is missing"),
        ({"vocab_size": 25}, "vocab_size=25 must be the target's 24"),
        ({"num_key_value_heads": 2}, "k_proj.weight of shape .* must have the numbers of"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"model_type": "mixtral"}, "model_type='mixtral' is not supported for the layers of a"),
        ({"draft_vocab_size": 9}, "draft_vocab_size=9: it is not known here"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "of type 'dynamic', which depend"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
    ):
        root = written(tmp_path, LLAMA_2 | changes, tensors_of(LLAMA_2))
        with pytest.raises(ValueError, match=message):
            load(root, toy_cfg)
    with pytest.raises(ValueError, match=r"hidden_size=16 must be 32 to go with this target"):
        load(written(tmp_path, LLAMA_2, tensors_of(LLAMA_2)),
                       dataclasses.replace(toy_cfg, d_model=32))  # fmt: skip
    with pytest.raises(ValueError, match=r"fc.bias.*; EAGLE's draft networks are read by dlm"):
        dlm.load(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="weights are read as safetensors"):
        load(tmp_path, toy_cfg)
