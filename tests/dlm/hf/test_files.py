"""config.json of published checkpoints: what is read, computed, looked up elsewhere, or refused."""

import dataclasses
import json
import re

import jax.numpy as jnp
import pytest

import dlm
from decode.complete import complete
from decode.generate import generate
from dlm.hf.files import read_config
from dlm.hf.harmless import HARMLESS
from dlm.hf.saving import save_hf
from dlm.hf.weights import load_params
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
    if raw["model_type"] != "llama":
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
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


_LLAMA3 = LLAMA_3_1_8B["rope_scaling"]
ROTARY = {  # keys -> the base and whether frequencies are stretched, or what the message says
    "the same twice": ({"rope_parameters": _LLAMA3 | {"rope_theta": 500000.0}}, (5e5, True)),
    "the base beside it": (
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default"}}, (5e5, False)
    ),
    "the base in it": (
        {"rope_scaling": None, "rope_theta": None, "rope_parameters": {"rope_theta": 1e4}},
        (1e4, False),
    ),
    "null": ({"rope_scaling": None, "rope_parameters": None}, (5e5, False)),
    "empty": ({"rope_scaling": {}}, (5e5, False)),
    "both names of the kind": ({"rope_scaling": _LLAMA3 | {"type": "llama3"}}, (5e5, True)),
    "two scalings": (
        {"rope_parameters": {"rope_type": "default"}}, "rope_scaling=.* rope_parameters=.* same",
    ),
    "two bases": (
        {"rope_scaling": None, "rope_parameters": {"rope_theta": 1e4}},
        "rope_theta=500000.0 and the 10000.0 of rope_parameters must be the same",
    ),
    "two bases, older": ({"rope_scaling": _LLAMA3 | {"rope_theta": 1e4}}, "must be the same"),
    "two kinds": ({"rope_scaling": _LLAMA3 | {"type": "linear"}}, "type='linear' and rope_type='l"),
    "a number that means nothing": (
        {"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "has factor=2.0, which means no",
    ),
    "a flag that is none": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": "y"}}, "finetuned='y' must",
    ),
    "an unknown number": ({"rope_scaling": _LLAMA3 | {"attn_factor": 1.0}}, "has attn_factor=1.0"),
    "an unknown kind": ({"rope_scaling": {"type": "mrope"}}, "of type 'mrope' is not supported"),
    "text": ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
    "a part of the head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not sup"),
    "all of the head": ({"partial_rotary_factor": 1.0}, (5e5, True)),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "right"), ROTARY.values(), ids=list(ROTARY))
def test_rotary_settings_agree_or_are_refused(tmp_path, keys, right):
    path = write_causal(tmp_path, **keys)
    if isinstance(right, str):
        with pytest.raises(ValueError, match=f"config.json: .*{right}"):
            read_config(path)
    else:
        cfg = read_config(path)
        assert (cfg.rope_theta, cfg.rope_scaling is not None) == right


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
    with pytest.raises(ValueError, match=r"config.json must give mask_token_id, which neither"):
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
    assert [getattr(cfg, name) for name in ids] == [94, 80, 80, 95]


# What config.json, generation_config.json and the tokenizer say, and all ends, the written first.
ENDS = {
    "Llama 3": ([2, 12, 8], [2, 12, 8], None, (2, 8, 12)),
    "Qwen Instruct": (2, [2, 12], 2, (2, 12)),
    "the tokenizer's is written": ([2, 12], None, 12, (12, 2)),
    "a base model made a chat model": (2, 2, 12, (12, 2)),
    "only in generation_config.json": (None, [12, 2], None, (12, 2)),
    "only in the tokenizer": (None, None, 12, (12,)),
    "generation_config.json adds": (2, 12, None, (2, 12)),
    "given twice": ([2, 2], [2], 2, (2,)),
    "a list of one": ([2], None, None, (2,)),
    "empty lists": ([], [2], None, (2,)),
    "0 is a token": (0, [7, 0], None, (0, 7)),
}


def write_causal(path, **changes):
    """A small Llama's config.json, with changes; None takes a key away."""
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128,
        "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 256,
    }  # fmt: skip
    raw = LLAMA_3_1_8B | sizes | {"bos_token_id": 1, "eos_token_id": 2} | changes
    raw = {key: value for key, value in raw.items() if value is not None}
    (path / "config.json").write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize(("config", "generation", "own", "ends"), ENDS.values(), ids=list(ENDS))
def test_every_listed_end_counts(tmp_path, config, generation, own, ends):
    write_causal(tmp_path, eos_token_id=config)
    if generation is not None:
        text = json.dumps({"eos_token_id": generation})
        (tmp_path / "generation_config.json").write_text(text)
    if own is not None:
        words = word_tokenizer([f"w{i} " for i in range(100)])
        dataclasses.replace(words, eos_token_id=own, mask_token_id=None).save(tmp_path)
    cfg = read_config(tmp_path)
    assert cfg.eos_ids == ends and cfg.eos_token_id == ends[0]


@pytest.mark.parametrize("ends", [(5,), (5, 3, 9)], ids=str)
@pytest.mark.parametrize("mask", [7, None], ids=["diffusion", "causal"])
def test_ends_are_written_to_both_files(tmp_path, ends, mask):
    shifted = dict(mask_token_id=mask, shifted_logits=mask is None)
    cfg = dataclasses.replace(TINY, eos_token_id=ends[0], more_eos_ids=ends[1:], **shifted)
    save_hf(tmp_path / "model", random_params(cfg), cfg)
    said = 5 if len(ends) == 1 else [5, 3, 9]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "model" / name).read_text())["eos_token_id"] == said
    assert read_config(tmp_path / "model") == cfg


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("eos_token_id", "2", r"eos_token_id='2' must be an integer or a list of integers"),
        ("eos_token_id", [2, None], r"eos_token_id=\[2, None\] must be an integer or a list"),
        ("eos_token_id", [2, [3]], r"must be an integer or a list of integers"),
        ("eos_token_id", True, r"eos_token_id=True must be an integer or a list"),
        ("eos_token_id", 2.0, r"eos_token_id=2.0 must be an integer or a list"),
        ("eos_token_id", [2, 128], r"eos_token_id=128 must be in \[0, vocab_size=128\)"),
        ("eos_token_id", -1, r"eos_token_id=-1 must be in \[0, vocab_size=128\)"),
        ("eos_token_id", None, "config.json must give eos_token_id, which neither it nor"),
        ("bos_token_id", [1], r"bos_token_id=\[1\] must be an integer"),
        ("pad_token_id", "<pad>", r"pad_token_id='<pad>' must be an integer"),
    ],
)
def test_ids_that_are_none(tmp_path, key, value, message):
    with pytest.raises(ValueError, match=message):
        read_config(write_causal(tmp_path, **{key: value}))


def test_the_file_that_is_wrong_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 128]}')
    message = r"/generation_config.json: eos_token_id=128 must be in \[0, vocab_size=128\)"
    with pytest.raises(ValueError, match=message):
        read_config(write_causal(tmp_path))


@pytest.mark.parametrize("pad", [-1, 128, 4000])
def test_a_pad_token_that_cannot_be_is_as_none(tmp_path, pad):
    assert read_config(write_causal(tmp_path, pad_token_id=pad)).pad_token_id == 2


def test_a_mask_that_pads_or_ends(model):
    assert read_config(model(pad_token_id=94)).pad_token_id == 95
    with pytest.raises(ValueError, match=r"mask_token_id=94 must not be among the ends of a text"):
        read_config(model(eos_token_id=[95, 94]))


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
        ("dream_small", {"mask_token_id": "x"}, "mask_token_id='x' must be an integer"),
        ("dream_small", {"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
    ],
)
def test_unsupported_configs(model, name, changes, message):
    with pytest.raises(ValueError, match=message):
        read_config(model(name, **changes))


# ---- Which network it is ----------------------------------------------------------------------

_CODE = "modeling_x."
NETWORKS = {  # config.json -> what the message says
    "as Stable-DiffCoder was once": (
        {"model_type": "llama", "architectures": ["MoreDiffcoderForCausalLM"]},
        r"architectures=\['MoreDiffcoderForCausalLM'\] is not supported; with model_type='llama' o",
    ),
    "of two minds": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"],
         "auto_map": {"AutoModel": _CODE + "StableDiffcoderForCausalLM"}},
        "must name one network, not 'LlamaForCausalLM' and 'StableDiffcoderForCausalLM'",
    ),
    "of two networks": (
        {"model_type": "llama", "architectures": ["MoreDiffcoderForCausalLM", "LlamaForCausalLM"]},
        r"architectures=\['MoreDiff.*, 'LlamaForCausalLM'\] is not supported; with model_type='lla",
    ),
    "by its code alone": (
        {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": _CODE + "DiffCoder"}},
        r"auto_map\['AutoModelForCausalLM'\]='modeling_x.DiffCoder' is not supported; .*'LlamaFor",
    ),
    "SDLM": (
        {"model_type": "qwen2", "architectures": ["SDLMQwen2ForCausalLM"]},
        r"architectures=\['SDLMQwen2ForCausalLM'\] is not .* only 'Qwen2ForCausalLM' are",
    ),
    "Efficient-DLM": (
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"],
         "auto_map": {"AutoModel": _CODE + "EfficientDLM"}},
        r"auto_map\['AutoModel'\]='modeling_x.EfficientDLM' is not supported; .*'Qwen3ForCausalLM'",
    ),
    "as LLaDA-MoE was once": (
        {"model_type": "llada", "architectures": ["LLaDANewModelLM"], "activation_type": "swiglu"},
        r"architectures=\['LLaDANewModelLM'\] is not supported; .* only 'LLaDAModelLM' ",
    ),
    "a draft": ({"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]}, "Eagle3"),
    "a reward model": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForSequenceClassification"]}, "Sequence",
    ),
    "only the stack": ({"model_type": "qwen3", "architectures": ["Qwen3Model"]}, "'Qwen3Model'"),
    "only the code of the stack": (
        {"model_type": "qwen3", "auto_map": {"AutoModel": _CODE + "Qwen3Model"}}, "Qwen3Model' is",
    ),
    "the stack of another": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"],
         "auto_map": {"AutoModel": _CODE + "StableDiffcoderModel"}}, "StableDiffcoderModel' is not",
    ),
    "of another type": ({"model_type": "llama", "architectures": ["Qwen2ForCausalLM"]}, "'Qwen2F"),
    "not a list": ({"model_type": "llama", "architectures": "Llama"}, "'Llama' must be a list"),
    "no name": (
        {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": ["LlamaForCausalLM", None]}},
        r"auto_map\['AutoModelForCausalLM'\]=\['LlamaForCausalLM', None\] is not supported",
    ),
    "not an object": ({"model_type": "llama", "auto_map": ["x"]}, r"auto_map=.* an object"),
    "not a name": ({"model_type": "llama", "architectures": [3]}, r"architectures=\[3\] is not"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "message"), NETWORKS.values(), ids=list(NETWORKS))
def test_another_network_of_a_known_type_is_refused(tmp_path, raw, message):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_3_0_6B | raw))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        {"architectures": None},
        {"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoTokenizer": ["x.Tok", None]}},
        {"architectures": ["LLaMAForCausalLM"]},
        {"auto_map": {"AutoConfig": "x.Config", "AutoModelForCausalLM": "a--b.LlamaForCausalLM"}},
        {"auto_map": {"AutoModelForSequenceClassification": "x.RewardModel"}},
        {"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModel": "x.LlamaModel"}},
        {"auto_map": {"AutoModel": "x.LlamaModel", "AutoModelForCausalLM": "x.LlamaForCausalLM"}},
    ],
)
def test_names_of_the_same_network(tmp_path, said):
    assert read_config(write_causal(tmp_path, **said)) == read_config(write_causal(tmp_path))


def test_diffusion_models_do_not_write_from_left_to_right():
    for name in NAMES:
        assert read_config(GOLDEN / name).never_causal
        lm = dlm.load(GOLDEN / name)
        with pytest.raises(ValueError, match=r"a diffusion model, .*: use decode.generate"):
            complete(lm, [1, 2], gen_len=2)
    lm = dlm.load(GOLDEN / "llama_draft")
    assert not lm.cfg.never_causal
    with pytest.raises(ValueError, match=r"models write with decode.complete"):
        generate(lm, [1, 2], gen_len=2)


# ---- Keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llada_small", "dream_small"])
@pytest.mark.parametrize("key", sorted(HARMLESS))
def test_harmless_keys_change_nothing(name, key, model):
    known = json.loads((GOLDEN / name / "config.json").read_text())
    if key not in {*known, "dtype", "auto_map"}:
        assert read_config(model(name, **{key: 7})) == read_config(GOLDEN / name)


@pytest.mark.parametrize(
    "name", ["llama_target", "qwen2_small", "llada_small", "dream_small"]
)  # fmt: skip
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping=50.0: it is not known here"),
        ("logits_scaling", 8.0, "logits_scaling=8.0: it is not known here"),
        ("num_experts", 8, "num_experts=8: it is not known here and may change what the model"),
        ("qk_layernorm", True, "qk_layernorm=True: it is not known here"),
        ("text_config", {"a": "x" * 99}, r"text_config=\{'a': 'xxx.*\.\.\.: it is not known here"),
        ("rope_interleaved", True, "rope_interleaved=True: only False is supported for this fam"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor=0.5.* only 1 is"),
        ("is_encoder_decoder", True, "is_encoder_decoder=True: only False is supported"),
        ("n_special", 2, "n_special=2: only 0 is supported"),
        ("pruned_heads", {"0": [1]}, "pruned_heads=.*: only .* is supported"),
        ("layer_types", ["full_attention", "linear_attention"], "layer_types="),
        ("quantization_config", {"quant_method": "fp8"}, r"are quantised \(fp8\), and only floats"),
        ("quantization_config", {"load_in_4bit": True}, "are quantised, and only floats"),
        ("quantization", {"bits": 4}, "quantization says that the weights are quantised, and only"),
        ("compression_config", {"format": "x"}, "compression_config says that the weights are qu"),
    ],
)
def test_unknown_keys_are_refused(model, name, key, value, message):
    with pytest.raises(ValueError, match=message) as error:
        read_config(model(name, **{key: value}))
    assert "config.json: " in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "said",
    [
        {"partial_rotary_factor": 1.0}, {"rope_interleaved": False}, {"use_mrope": False},
        {"attn_logit_softcapping": None}, {"quantization_config": None}, {"pruned_heads": {}},
        {"quantization_config": {}}, {"n_special": 0},
        {"layer_types": ["full_attention"] * 3}, {"num_experts": None},
    ],
)  # fmt: skip
def test_what_says_nothing_is_read(model, said):
    cfg = read_config(model("qwen2_small", **said))
    assert cfg == read_config(GOLDEN / "qwen2_small")


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ({"torch_dtype": "auto"}, "float32"),
        ({"torch_dtype": None, "dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": "float16", "dtype": "float16"}, "float16"),
    ],
)
def test_dtypes_of_files(model, said, dtype):
    assert read_config(model(**said)).dtype == dtype


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype='float8_e4m3fn' is not supported; only "),
        ({"torch_dtype": 16}, "torch_dtype=16 is not supported"),
        ({"dtype": "bfloat16"}, "'torch_dtype': 'float32'.* must say the same"),
    ],
)
def test_dtypes_that_are_none(model, said, message):
    with pytest.raises(ValueError, match=message):
        read_config(model(**said))
    with pytest.raises(ValueError, match="dtype='int9' must be 'float32', 'bfloat16'"):
        read_config(model(), dtype="int9")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_must_be_finite(model, value):
    path = model("dream_small", rms_norm_eps="here")
    text = (path / "config.json").read_text().replace('"here"', value)
    (path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"rms_norm_eps=-?(nan|inf) must be finite"):
        read_config(path)


def test_no_number_of_layers_fills_the_memory(model):
    with pytest.raises(ValueError, match="num_hidden_layers=1000000000000 must be at most 10000"):
        read_config(model("dream_small", num_hidden_layers=10**12))


def test_a_file_that_is_too_deep(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        read_config(tmp_path)


def test_what_is_said_twice_must_be_the_same(tmp_path):
    text = (write_causal(tmp_path) / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("{", '{"rope_theta": 500000.0, ', 1))
    assert read_config(tmp_path).rope_theta == 500_000
    (tmp_path / "config.json").write_text(text.replace("{", '{"rope_theta": 1e4, ', 1))
    message = r"config.json is not valid JSON \(rope_theta is 10000.0 and 500000.0: leave one out"
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


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


def test_an_adapter_beside_a_model_is_not_applied_and_said(tmp_path, caplog):
    save_hf(tmp_path / "model", random_params(TINY), TINY)
    dlm.load(tmp_path / "model")
    assert not caplog.messages
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    dlm.load(tmp_path / "model")
    assert "adapter_config.json is of an adapter, which is not applied" in caplog.text


# Models that are not read; `model_type` and architecture as published.
NOT_READ = {
    "DiffusionGemma": {
        "model_type": "diffusion_gemma", "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "canvas_length": 256, "text_config": {"model_type": "diffusion_gemma_text"},
    },
    "Nemotron-Labs-Diffusion": {
        "model_type": "nemotron_labs_diffusion", "architectures": ["NemotronLabsDiffusionModel"],
        "block_size": 32, "mask_token_id": 100,
    },
    "BERT-chat": {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"]},
    "WeDLM": {"model_type": "wedlm", "architectures": ["WeDLMForCausalLM"], "qk_norm": True},
    "Gemma 3 with images": {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"model_type": "gemma3_text"},
    },
    "DeepSeek": {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]},
    "Mamba": {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]},
    "a list": {"model_type": ["llama"]},
    "no type": {},
}  # fmt: skip


@pytest.mark.parametrize("raw", NOT_READ.values(), ids=list(NOT_READ))
def test_what_is_not_read_is_refused_by_name(tmp_path, raw):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    name = re.escape(repr(raw.get("model_type")))
    with pytest.raises(ValueError, match=rf"model_type={name} is not supported; only .*are$") as e:
        dlm.load(tmp_path)
    assert "\n" not in str(e.value)


def test_of_a_known_type_the_network_is_named(tmp_path):
    """WeDLM as its code registers it, with the types of Qwen."""
    for model_type in ("qwen2", "qwen3"):
        raw = QWEN_3_0_6B | {"model_type": model_type, "architectures": ["WeDLMForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(
            ValueError, match=r"architectures=\['WeDLMForCausalLM'\] is not supported"
        ):
            read_config(tmp_path)


# What people find in a folder instead of config.json or model.safetensors, and what is said.
INSTEAD = {
    "model-00001-of-00002.safetensors": "; it has model-00001-of-00002.safetensors: model.safeten",
    "model.Q4_K_M.gguf": "; it has model.Q4_K_M.gguf: give that file itself",
    "adapter_config.json": "; it has adapter_config.json: it is an adapter, which dlm.lora.load",
    "pytorch_model.bin": "; it has pytorch_model.bin: weights are read as safetensors",
    "pytorch_model.bin.index.json": "; it has pytorch_model.bin.index.json: weights are read as",
    "consolidated.00.pth": "; it has consolidated.00.pth: it is in its authors' layout",
    "medusa_lm_head.pt": "; it has medusa_lm_head.pt: weights are read as safetensors",
    "model.onnx": "; it has model.onnx: weights are read as safetensors",
    "README.md": "",
}


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("name", INSTEAD)
def test_what_is_there_instead_is_said(tmp_path, name, has_config):
    (tmp_path / name).write_bytes(b"x")
    if has_config:
        write_causal(tmp_path)
    lacks = "one must hold weights" if has_config else "must hold a published model"
    with pytest.raises(FileNotFoundError, match=re.escape(lacks + INSTEAD[name])):
        dlm.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**400}, "num_hidden_layers=1000"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings=2147483648 must be at most"),
        ({"rope_theta": 10**400}, "rope_theta=1000"),
        ({"layer_types": [[1]] * 2, "model_type": "qwen2"}, "layer_types=.* must be a list of 2"),
        ({"layer_types": [{}] * 2, "model_type": "mistral"}, "layer_types=.* must be a list of 2"),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [[1]]},
            r"mlp_only_layers=\[\[1\]\] must be a list of layers",
        ),
        (
            {"model_type": "smollm3", "no_rope_layer_interval": 0},
            "no_rope_layer_interval=0 must be at least 1",
        ),
        (
            {"model_type": "gemma3_text", "sliding_window_pattern": 0},
            "sliding_window_pattern=0 must be at least 1",
        ),
    ],
)
def test_values_that_no_arithmetic_bears(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_config(write_causal(tmp_path, **{"rope_scaling": None}, **changes))
