"""Published checkpoints: configuration, loading, saving, and everything that can be wrong."""

import dataclasses
import doctest
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import dlm.hf
from dlm.config import PRESETS, RopeScaling
from dlm.hf import load_params, read_config, save_hf
from dlm.params import abstract_params, num_params, param_shardings
from dlm.sharding import make_mesh
from dlm.tokenizer import byte_tokenizer, word_tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NAMES = ("llada_small", "dream_small")
needs_mesh = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 (fake) devices")

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


SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
)
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


def tensors_of(name):
    return safetensors.numpy.load_file(GOLDEN / name / "model.safetensors")


def raw_config(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


@pytest.fixture
def model(tmp_path):
    """Writes a directory: a golden one with changes to its config.json and its tensors."""

    def write(name="llada_small", drop=(), tensors=None, **changes):
        path = tmp_path / "model"
        path.mkdir(exist_ok=True)
        config = {k: v for k, v in (raw_config(name) | changes).items() if k not in drop}
        (path / "config.json").write_text(json.dumps(config))
        if tensors is None:
            shutil.copy(GOLDEN / name / "model.safetensors", path)
        else:
            safetensors.numpy.save_file(tensors, path / "model.safetensors")
        return path

    return write


def cast(params, dtype):
    return jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def random_params(cfg):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), abstract_params(cfg))


def test_docstring_example(monkeypatch):
    monkeypatch.chdir(GOLDEN.parents[1])
    assert doctest.testmod(dlm.hf).failed == 0


# ---- Configuration ----------------------------------------------------------------------------


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
        ({"rope_type": "yarn", "factor": 2.0}, "rope_scaling of type 'yarn' is not supported"),
        ({"rope_type": "llama3", "factor": 2.0}, "rope_scaling must give low_freq_factor, high"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_scaling": wrong}))
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_causal_formats_come_back(tmp_path, kind):
    cfg = dataclasses.replace(
        _TINY, shifted_logits=True, mask_token_id=None, qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3", head_dim=32 if kind == "qwen3" else _TINY.head_dim,
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
        ("llada_small", {"model_type": "gpt2"}, "model_type='gpt2' .* only 'llada' and 'Dream'"),
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


# ---- Loading ----------------------------------------------------------------------------------


def test_every_leaf_is_where_it_belongs():
    """Against a transcription by hand, layer by layer."""
    cfg, stored = read_config(GOLDEN / "dream_small"), tensors_of("dream_small")
    params = load_params(GOLDEN / "dream_small", cfg)
    D, N, K, H = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    for i in range(cfg.n_layers):
        layer = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], params["layers"])
        attention, mlp, prefix = layer["attention"], layer["mlp"], f"model.layers.{i}"
        expected = {
            "input_layernorm.weight": layer["attention_norm"],
            "post_attention_layernorm.weight": layer["mlp_norm"],
            "self_attn.q_proj.weight": attention["q"].reshape(N * H, D),
            "self_attn.k_proj.weight": attention["k"].reshape(K * H, D),
            "self_attn.v_proj.weight": attention["v"].reshape(K * H, D),
            "self_attn.q_proj.bias": attention["q_bias"].reshape(N * H),
            "self_attn.k_proj.bias": attention["k_bias"].reshape(K * H),
            "self_attn.v_proj.bias": attention["v_bias"].reshape(K * H),
            "self_attn.o_proj.weight": attention["o"].reshape(N * H, D).T,
            "mlp.gate_proj.weight": mlp["gate"].T,
            "mlp.up_proj.weight": mlp["up"].T,
            "mlp.down_proj.weight": mlp["down"].T,
        }
        for name, values in expected.items():
            np.testing.assert_array_equal(values, stored.pop(f"{prefix}.{name}"), err_msg=name)
    np.testing.assert_array_equal(params["embed"], stored.pop("model.embed_tokens.weight"))
    np.testing.assert_array_equal(params["unembed"], stored.pop("lm_head.weight"))
    np.testing.assert_array_equal(params["final_norm"], stored.pop("model.norm.weight"))
    assert not stored


@needs_mesh
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mesh", [(1, 1, 2), (1, 2, 2), (2, 2, 1), (1, 1, 4), (4, 1, 1)], ids=str)
def test_sharded_equals_unsharded(name, mesh):
    mesh = make_mesh(*mesh)
    cfg = read_config(GOLDEN / name)
    params = load_params(GOLDEN / name, cfg, mesh)
    assert_same(params, load_params(GOLDEN / name, cfg))
    shardings = param_shardings(cfg, mesh)
    assert jax.tree.all(jax.tree.map(lambda p, s: p.sharding == s, params, shardings))


@needs_mesh
def test_a_head_may_be_cut_too():
    """Rules could shard any dimension, also the inner one of two that are one in the file."""
    mesh, cfg = make_mesh(tensor=4), read_config(GOLDEN / "dream_small")
    with safetensors.safe_open(GOLDEN / "dream_small/model.safetensors", framework="numpy") as f:
        stored = dlm.hf.DREAM.tensors["layers/attention/q"]
        part = (range(1, 3), range(4, 12), range(8, 40))
        values = dlm.hf._read_tensor(f.get_slice(stored.name.format(2)), stored, cfg, part)
    whole = np.asarray(load_params(GOLDEN / "dream_small", cfg, mesh)["layers"]["attention"]["q"])
    np.testing.assert_array_equal(values, whole[2, 1:3, 4:12, 8:40])


class CountingFile:
    """A safetensors file that writes down how many bytes each read asks for."""

    def __init__(self, file, reads):
        self.file, self.reads = file, reads

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return CountingSlice(self.file.get_slice(name), name, self.reads)


class CountingSlice:
    def __init__(self, tensor, name, reads):
        self.tensor, self.name, self.reads = tensor, name, reads
        self.get_shape, self.get_dtype = tensor.get_shape, tensor.get_dtype

    def __getitem__(self, index):
        values = self.tensor[index]
        self.reads.append((self.name, values.nbytes))
        return values


@needs_mesh
@pytest.mark.parametrize(
    ("data", "fsdp", "tensor"), [(1, 1, 1), (1, 2, 2), (1, 1, 4), (2, 1, 2), (4, 1, 1)]
)
def test_host_memory_is_bounded_by_shards(monkeypatch, data, fsdp, tensor):
    """Only the wanted part of one tensor is read at a time, and no part of it twice."""
    reads, open_file = [], safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda *a, **k: CountingFile(open_file(*a, **k), reads)
    )
    cfg = read_config(GOLDEN / "llada_small")
    load_params(GOLDEN / "llada_small", cfg, make_mesh(data, fsdp, tensor))
    assert sum(size for _, size in reads) == 4 * num_params(cfg)
    for name, size in reads:
        whole = tensors_of("llada_small")[name].nbytes
        is_norm = name.endswith(("norm.weight", "ln_f.weight"))
        assert size == (whole if is_norm else whole // (fsdp * tensor)), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_load_in_another_dtype(name, dtype):
    params = load_params(GOLDEN / name, read_config(GOLDEN / name, dtype))
    full = load_params(GOLDEN / name, read_config(GOLDEN / name))
    assert_same(params, cast(full, dtype))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files(model, dtype):
    halves = {name: x.astype(dtype) for name, x in tensors_of("llada_small").items()}
    path = model(tensors=halves, drop=("torch_dtype",))
    cfg = read_config(path)
    assert cfg.dtype == np.dtype(dtype).name
    params = load_params(path, cfg)
    assert_same(
        params, load_params(GOLDEN / "llada_small", read_config(GOLDEN / "llada_small", dtype))
    )
    # and up again: exact
    full = load_params(path, dataclasses.replace(cfg, dtype="float32"))
    assert_same(full, cast(params, "float32"))


def in_two_files(path):
    """Splits model.safetensors of a directory, so that a layer's tensors are in both."""
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        safetensors.numpy.save_file(part, path / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path / names[0], path / names[1]


def test_index_of_several_files(model):
    path = model()
    in_two_files(path)
    cfg = read_config(path)
    assert_same(load_params(path, cfg), load_params(GOLDEN / "llada_small", cfg))


def test_index_errors(model):
    path = model()
    first, second = in_two_files(path)
    cfg = read_config(path)
    lost = sorted(safetensors.numpy.load_file(second))[0]
    kept = {k: v for k, v in safetensors.numpy.load_file(second).items() if k != lost}
    safetensors.numpy.save_file(kept, second)
    with pytest.raises(ValueError, match=rf"missing: {lost} \[[0-9, ]+\]$"):
        load_params(path, cfg)
    second.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"index.json names files that are missing: model-00002-of-00002"
    ):
        load_params(path, cfg)
    index = path / "model.safetensors.index.json"
    index.write_text('{"metadata": {}}')
    with pytest.raises(ValueError, match=r"index.json must have a weight_map"):
        load_params(path, cfg)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index.json is not valid JSON"):
        load_params(path, cfg)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        load_params(path, cfg)
    assert first.is_file()


def test_all_wrong_tensors_are_listed_at_once(model):
    tensors = tensors_of("llada_small")
    prefix = "model.transformer.blocks"
    del tensors[f"{prefix}.1.q_proj.weight"], tensors["model.transformer.ln_f.weight"]
    tensors[f"{prefix}.0.ff_proj.weight"] = np.zeros((64, 192), np.float32)
    tensors[f"{prefix}.2.ff_proj.weight"] = np.zeros((192, 64), np.int32)
    tensors[f"{prefix}.3.q_proj.weight"] = np.zeros((2, 3), np.float32)
    tensors["lora"] = np.zeros(5, np.float32)
    path = model(tensors=tensors)
    with pytest.raises(ValueError) as error:
        load_params(path, read_config(path))
    assert str(error.value).endswith(
        "does not hold the tensors of this llada: "
        f"missing: {prefix}.1.q_proj.weight [64, 64], model.transformer.ln_f.weight [64]; "
        f"unexpected: lora [5], {prefix}.3.q_proj.weight [2, 3]; "
        f"not as expected: {prefix}.0.ff_proj.weight [64, 192] instead of [192, 64], "
        f"{prefix}.2.ff_proj.weight I32 instead of a float"
    )


def test_a_config_for_another_model():
    cfg = read_config(GOLDEN / "llada_small")
    with pytest.raises(ValueError, match=r"unexpected: model.transformer.blocks.2.attn_norm"):
        load_params(GOLDEN / "llada_small", dataclasses.replace(cfg, n_layers=2))
    with pytest.raises(ValueError, match=r"missing: .*q_proj.bias \[64\]"):
        load_params(GOLDEN / "llada_small", dataclasses.replace(cfg, qkv_bias=True))
    with pytest.raises(ValueError, match=r"llada format has no tensor for layers/attention/k_norm"):
        load_params(GOLDEN / "llada_small", dataclasses.replace(cfg, qk_norm=True))


@pytest.mark.parametrize("name", NAMES)
def test_harmless_extras(model, name):
    tensors, cfg = tensors_of(name), read_config(GOLDEN / name)
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    path = model(name, tensors=tensors | rotary)
    assert_same(load_params(path, cfg), load_params(GOLDEN / name, cfg))
    # A tied model may store its embedding twice.
    tied = load_params(path, dataclasses.replace(cfg, tie_embeddings=True))
    assert "unembed" not in tied
    np.testing.assert_array_equal(tied["embed"], load_params(path, cfg)["embed"])


def test_broken_weights(model):
    path = model()
    cfg, file = read_config(path), path / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-7], whole[:300], b"", b"not a safetensors file" * 9):
        file.write_bytes(broken)
        with pytest.raises(
            ValueError, match=r"model.safetensors is not a complete safetensors file .*; download"
        ):
            load_params(path, cfg)


# ---- Saving -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 100_000])
@pytest.mark.parametrize("name", NAMES)
def test_save_gives_the_published_tensors(tmp_path, name, shard_bytes):
    cfg = read_config(GOLDEN / name)
    params, path = load_params(GOLDEN / name, cfg), tmp_path / "a" / "saved"
    save_hf(path, params, cfg, shard_bytes=shard_bytes)
    files = sorted(path.glob("*.safetensors"))
    saved = {k: v for file in files for k, v in safetensors.numpy.load_file(file).items()}
    original = tensors_of(name)
    assert saved.keys() == original.keys()
    for key in saved:
        assert saved[key].dtype == original[key].dtype, key
        assert saved[key].tobytes() == original[key].tobytes(), key
    if shard_bytes < 10**9:
        assert len(files) > 5
        assert [f.name for f in files][
            -1
        ] == f"model-{len(files):05}-of-{len(files):05}.safetensors"
        assert all(f.stat().st_size < shard_bytes + 10_000 for f in files)
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * num_params(cfg)
    else:
        assert [f.name for f in files] == ["model.safetensors"]
    assert read_config(path) == cfg
    assert_same(load_params(path, cfg), params)
    assert sorted(p.name for p in path.parent.iterdir()) == ["saved"]
    # What the published code reads is said as in the published files.
    raw, published = json.loads((path / "config.json").read_text()), raw_config(name)
    assert {key: raw[key] for key in raw if key in published} == {
        key: published[key] for key in published if key in raw
    }


_TINY = PRESETS["tiny"]


@pytest.mark.parametrize(
    ("cfg", "model_type"),
    [
        (_TINY, "llada"),
        (dataclasses.replace(_TINY, tie_embeddings=True, bos_token_id=7), "llada"),
        (dataclasses.replace(_TINY, qkv_bias=True, pad_token_id=3, dtype="bfloat16"), "llada"),
        (dataclasses.replace(_TINY, qkv_bias=True, shifted_logits=True, n_layers=11), "Dream"),
        (
            dataclasses.replace(
                _TINY, qkv_bias=True, shifted_logits=True, tie_embeddings=True, dtype="float16"
            ),
            "Dream",
        ),
    ],
)
def test_save_and_load_is_exact(tmp_path, cfg, model_type):
    params = random_params(cfg)
    save_hf(tmp_path / "one", params, cfg)
    assert json.loads((tmp_path / "one/config.json").read_text())["model_type"] == model_type
    assert read_config(tmp_path / "one") == cfg
    again = load_params(tmp_path / "one", cfg)
    assert_same(again, params)
    save_hf(tmp_path / "two", again, cfg)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@needs_mesh
def test_save_from_a_mesh(tmp_path):
    cfg = read_config(GOLDEN / "dream_small")
    params = load_params(GOLDEN / "dream_small", cfg, make_mesh(fsdp=2, tensor=2))
    save_hf(tmp_path / "saved", params, cfg)
    saved = safetensors.numpy.load_file(tmp_path / "saved/model.safetensors")
    for key, value in tensors_of("dream_small").items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "qk_norm=True cannot be written: the published"),
        ({"qk_norm": True, "shifted_logits": True, "qkv_bias": True}, "qk_norm=True cannot be"),
        ({"rope_scaling": SCALING}, "rope_scaling=RopeScaling.* cannot be written"),
        ({"mask_token_id": None}, "mask_token_id=None cannot be written"),
        ({"head_dim": 32}, "head_dim=32 cannot be written"),
    ],
)
def test_save_refuses_what_the_formats_cannot_say(tmp_path, changes, message):
    cfg = dataclasses.replace(_TINY, **changes)
    with pytest.raises(ValueError, match=message):
        save_hf(tmp_path / "saved", abstract_params(cfg), cfg)
    assert not list(tmp_path.iterdir())


def test_save_refuses_other_parameters(tmp_path):
    params = random_params(_TINY)
    params["embed"] = params["embed"][:5]
    params["final_norm"] = params["final_norm"].astype("bfloat16")
    params["extra"] = params.pop("unembed")
    with pytest.raises(ValueError) as error:
        save_hf(tmp_path / "saved", params, _TINY)
    assert str(error.value) == (
        "params must be those of cfg, but embed: float32 [5, 64] instead of float32 [128, 64]; "
        "extra: float32 [128, 64] instead of nothing; "
        "final_norm: bfloat16 [64] instead of float32 [64]; "
        "unembed: nothing instead of float32 [128, 64]"
    )


def test_save_never_overwrites(tmp_path):
    params = random_params(_TINY)
    (tmp_path / "empty").mkdir()
    save_hf(tmp_path / "empty", params, _TINY)
    for taken in (tmp_path / "empty", tmp_path / "empty" / "config.json"):
        with pytest.raises(FileExistsError, match="must be a new or an empty directory"):
            save_hf(taken, params, _TINY)
    assert read_config(tmp_path / "empty") == _TINY


def test_an_interrupted_save_leaves_no_model(tmp_path, monkeypatch):
    params = random_params(_TINY)
    seen, save_file = [], safetensors.numpy.save_file

    def interrupted(tensors, file, **kwargs):
        save_file(tensors, file, **kwargs)
        seen.append(file)
        assert not (tmp_path / "saved").exists()
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_hf(tmp_path / "saved", params, _TINY, shard_bytes=20_000)
    assert len(seen) == 2
    assert not list(tmp_path.iterdir())
