"""config.json of published checkpoints: what is read, computed, looked up elsewhere, or refused."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from dlm.hf.files import read_config
from dlm.hf.weights import load_params, save_hf
from dlm.presets import PRESETS
from dlm.tokenizer import byte_tokenizer, word_tokenizer
from tests.lib.checkpoints import NAMES, SCALING, TINY, assert_same, random_params
from tests.lib.paths import GOLDEN

# The published config.json files, where they differ from those of the small models.
LLADA_8B = {
    "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
    "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096,
    "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081,
}  # fmt: skip
DREAM_7B = {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    "max_position_embeddings": 131072, "mask_token_id": 151666, "eos_token_id": 151643,
    "bos_token_id": 151643, "pad_token_id": 151643, "torch_dtype": "bfloat16",
}  # fmt: skip


# The published config.json files of autoregressive models, as far as they are read.
LLAMA_3_1_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "hidden_act": "silu",
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 128000, "eos_token_id": [128009, 128001, 128008], "torch_dtype": "bfloat16",
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
QWEN_2_5_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    "hidden_act": "silu", "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "use_sliding_window": False,
    "bos_token_id": 151643, "eos_token_id": 151645, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN_3_0_6B = {
    "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
    "hidden_act": "silu", "max_position_embeddings": 40960, "rope_theta": 1000000,
    "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "use_sliding_window": False,
    "attention_bias": False, "rope_scaling": None, "bos_token_id": 151643, "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def raw_config(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


def test_golden_configs():
    llada, dream = (read_config(GOLDEN / name) for name in NAMES)
    assert (llada.n_kv_heads, llada.head_dim, llada.d_ff, llada.vocab_size) == (4, 16, 192, 96)
    assert (llada.qkv_bias, llada.shifted_logits, llada.bos_token_id) == (False, False, None)
    assert (dream.n_kv_heads, dream.head_dim, dream.d_ff, dream.norm_eps) == (2, 16, 160, 1e-6)
    assert (dream.qkv_bias, dream.shifted_logits, dream.bos_token_id) == (True, True, 95)
    for cfg in (llada, dream):
        assert (cfg.mask_token_id, cfg.eos_token_id, cfg.pad_token_id) == (94, 95, 95)
        assert (cfg.dtype, cfg.n_layers, cfg.max_seq_len) == ("float32", 3, 256)


def test_published_configs_give_the_presets(model):
    # The published LLaDA gives no dtype and, like its tokenizer here, no begin token.
    path = model(drop=("torch_dtype",), **LLADA_8B)
    (path / "model.safetensors").unlink()
    assert read_config(path) == dataclasses.replace(PRESETS["llada_8b"], bos_token_id=None)
    # Dream's authors advise 2048 positions, and its begin token is the tokenizer's.
    dream = read_config(model("dream_small", **DREAM_7B))
    expected = dataclasses.replace(PRESETS["dream_7b"], max_seq_len=131072, bos_token_id=151643)
    assert dream == expected


@pytest.mark.parametrize(
    ("raw", "preset"),
    [(LLAMA_3_1_8B, "llama3_1_8b"), (QWEN_2_5_7B, "qwen2_5_7b"), (QWEN_3_0_6B, "qwen3_0_6b")],
)
def test_published_causal_configs_give_the_presets(tmp_path, raw, preset):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    expected = PRESETS[preset]
    cfg = read_config(tmp_path)
    named = dict(bos_token_id=cfg.bos_token_id, pad_token_id=cfg.pad_token_id)
    assert cfg == dataclasses.replace(expected, **named) and cfg.mask_token_id is None
    assert cfg.pad_token_id == cfg.eos_token_id and cfg.bos_token_id == raw["bos_token_id"]


def test_rope_parameters_of_newer_files(tmp_path):
    """Since version 5, transformers writes both rotary settings in one place."""
    raw = {k: v for k, v in LLAMA_3_1_8B.items() if not k.startswith("rope_")}
    rotary = LLAMA_3_1_8B["rope_scaling"] | {"rope_theta": 500000.0}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_parameters": rotary}))
    cfg = read_config(tmp_path)
    assert cfg.rope_theta == 500_000.0 and cfg.rope_scaling == SCALING
    default = {"rope_type": "default", "rope_theta": 1e6}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_parameters": default}))
    cfg = read_config(tmp_path)
    assert cfg.rope_theta == 1e6 and cfg.rope_scaling is None
    for wrong, message in (
        ({"rope_type": "axial", "factor": 2.0}, "rope_scaling of type 'axial' is not supported"),
        ({"rope_type": "llama3", "factor": 2.0}, "rope_scaling must give low_freq_factor, high"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_scaling": wrong}))
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_causal_formats_come_back(tmp_path, kind):
    cfg = dataclasses.replace(
        TINY, shifted_logits=True, mask_token_id=None, qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3", head_dim=32 if kind == "qwen3" else TINY.head_dim,
        rope_scaling=SCALING if kind == "llama" else None,
    )  # fmt: skip
    params = random_params(cfg)
    save_hf(tmp_path / "model", params, cfg)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == kind
    again = read_config(tmp_path / "model")
    assert again == cfg
    assert_same(load_params(tmp_path / "model", again), params)


def test_null_and_absent_sizes(model):
    nulls = {"n_kv_heads": None, "mlp_hidden_size": None, "embedding_size": None}
    cfg = read_config(model(mlp_ratio=3, drop=("include_qkv_bias", "weight_tying"), **nulls))
    assert (cfg.n_kv_heads, cfg.d_ff, cfg.vocab_size) == (4, 192, 96)
    assert (cfg.qkv_bias, cfg.tie_embeddings) == (False, True)  # the published code's defaults
    cfg = read_config(model(embedding_size=128))  # rows of the embedding, padded
    assert cfg.vocab_size == 128
    dropped = ("num_key_value_heads", "tie_word_embeddings")
    cfg = read_config(model("dream_small", drop=dropped, head_dim=32))
    assert (cfg.n_kv_heads, cfg.head_dim, cfg.tie_embeddings) == (4, 32, False)


def test_dtype(model):
    assert read_config(model(), dtype=jnp.bfloat16).dtype == "bfloat16"
    assert read_config(model(), dtype="float16").dtype == "float16"
    assert read_config(model(torch_dtype="bfloat16")).dtype == "bfloat16"
    assert read_config(model(drop=("torch_dtype",), dtype="float16")).dtype == "float16"
    assert read_config(model(drop=("torch_dtype",))).dtype == "float32"  # as stored


def test_token_ids_fall_back_to_other_files(model):
    ids = ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id")
    path = model("dream_small", drop=ids)
    with pytest.raises(ValueError, match=r"config.json must give mask_token_id as an integer"):
        read_config(path)
    word_tokenizer([f"{i} " for i in range(80)]).save(path)
    cfg = read_config(path)
    assert [getattr(cfg, name) for name in ids] == [81, 80, 80, None]
    generation = {"mask_token_id": None, "eos_token_id": [70, 80], "bos_token_id": 71}
    (path / "generation_config.json").write_text(json.dumps(generation))
    cfg = read_config(path)
    assert [getattr(cfg, name) for name in ids] == [81, 80, 80, 71]  # of two ends, its own
    path = model("dream_small", drop=("pad_token_id",), eos_token_id=[3, 4])
    cfg = read_config(path)
    assert [getattr(cfg, name) for name in ids] == [94, 3, 80, 95]


def test_begin_token_is_the_tokenizers(model):
    path = model("dream_small", vocab_size=300)
    byte_tokenizer().save(path)
    assert read_config(path).bos_token_id == 257


def test_pad_token_is_eos_where_nothing_says_otherwise(model):
    assert read_config(model(drop=("pad_token_id",))).pad_token_id == 95


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llada_small", {"alibi": True}, "alibi=True is not supported; only False is"),
        ("llada_small", {"layer_norm_type": "default"}, "layer_norm_type='default' .* only 'rms'"),
        ("llada_small", {"block_type": "sequential"}, "block_type='sequential' .* only 'llama'"),
        ("llada_small", {"include_bias": True}, "include_bias=True"),
        ("llada_small", {"bias_for_layer_norm": True}, "bias_for_layer_norm=True"),
        ("llada_small", {"rope": False}, "rope=False is not supported; only True is"),
        ("llada_small", {"rope_full_precision": False}, "rope_full_precision=False"),
        ("llada_small", {"rope_scaling": {"factor": 4}}, r"rope_scaling=\{'factor': 4\} .* None"),
        ("llada_small", {"activation_type": "swiglu"}, "activation_type='swiglu'"),
        ("llada_small", {"attention_layer_norm": True}, "attention_layer_norm=True"),
        ("llada_small", {"layer_norm_with_affine": False}, "layer_norm_with_affine=False"),
        ("llada_small", {"input_emb_norm": True}, "input_emb_norm=True"),
        ("llada_small", {"scale_logits": True}, "scale_logits=True"),
        ("llada_small", {"block_group_size": 4}, "block_group_size=4"),
        ("llada_small", {"multi_query_attention": True}, "multi_query_attention=True"),
        ("dream_small", {"rope_scaling": {"type": "yarn"}}, "rope_scaling=.*; only None is"),
        ("dream_small", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("dream_small", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("llada_small", {"model_type": "bert"}, "model_type='bert' .* only 'llada' and 'Dream'"),
        ("llada_small", {"n_layers": "3"}, "n_layers='3' must be of type int"),
        ("llada_small", {"n_layers": True}, "n_layers=True must be of type int"),
        ("dream_small", {"rope_theta": "big"}, "rope_theta='big' must be of type float"),
        ("dream_small", {"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be of type bool"),
        ("dream_small", {"mask_token_id": "x"}, "mask_token_id as an integer, but .* give 'x'"),
        ("dream_small", {"num_attention_heads": 0}, "n_heads=0 must be at least 1"),
    ],
)
def test_unsupported_configs(model, name, changes, message):
    with pytest.raises(ValueError, match=message):
        read_config(model(name, **changes))


def test_absent_keys(model):
    dropped = ("n_layers", "rope_theta")
    with pytest.raises(ValueError, match=r"config.json must give n_layers, rope_theta"):
        read_config(model(drop=dropped))
    with pytest.raises(ValueError, match=r"rope=False \(assumed, as the key is absent\)"):
        read_config(model(drop=("rope",)))


def test_config_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path='some/model' is not a directory: download"):
        read_config("some/model")
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("3")
    with pytest.raises(ValueError, match=r"config.json must hold a JSON object, not a int"):
        read_config(tmp_path)
