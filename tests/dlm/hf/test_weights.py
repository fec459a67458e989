"""Published checkpoints: configuration, loading, saving, and everything that can be wrong."""

import dataclasses
import doctest
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import dlm.hf.weights
from dlm.hf.files import read_config, read_raw_config
from dlm.hf.formats import FORMATS
from dlm.hf.saving import save_hf
from dlm.hf.weights import load_params
from dlm.params import abstract_params, num_params, param_shardings
from dlm.sharding import make_mesh
from tests.lib.checkpoints import NAMES, SCALING, TINY, assert_same, random_params
from tests.lib.paths import GOLDEN, ROOT

needs_mesh = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 (fake) devices")


def tensors_of(name):
    return safetensors.numpy.load_file(GOLDEN / name / "model.safetensors")


def cast(params, dtype):
    return jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)


def test_docstring_example(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert doctest.testmod(dlm.hf.weights).failed == 0


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
        stored = FORMATS["DreamModel"].tensors["layers/attention/q"]
        part = (range(1, 3), range(4, 12), range(8, 40))
        values = dlm.hf.weights._read_tensor(f.get_slice(stored.name.format(2)), stored, cfg, part)
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


def test_tensors_that_no_index_lists_are_seen(model):
    path = model()
    first, _ = in_two_files(path)
    tensors = safetensors.numpy.load_file(first) | {"extra": np.zeros(3, np.float32)}
    safetensors.numpy.save_file(tensors, first)
    with pytest.raises(ValueError, match=r"does not hold the tensors .*: unexpected: extra \[3\]$"):
        load_params(path, read_config(path))


@pytest.mark.parametrize("is_listed", [True, False])
def test_tensors_that_are_there_twice(model, is_listed):
    """Without harm if they are the same; of two others nobody knows which is right."""
    path = model()
    first, second = in_two_files(path)
    tensors = [safetensors.numpy.load_file(file) for file in (first, second)]
    name = next(iter(tensors[1]))
    index = path / "model.safetensors.index.json"
    if not is_listed:
        said = json.loads(index.read_text())
        del said["weight_map"][name]
        index.write_text(json.dumps(said))
    cfg = read_config(path)
    safetensors.numpy.save_file(tensors[0] | {name: tensors[1][name]}, first)
    assert_same(load_params(path, cfg), load_params(GOLDEN / "llada_small", cfg))
    for other in (tensors[1][name] + 1, tensors[1][name][:-1]):
        safetensors.numpy.save_file(tensors[0] | {name: other}, first)
        with pytest.raises(ValueError, match=f"{name} is there twice, with other numbers in"):
            load_params(path, cfg)


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


@pytest.mark.parametrize(
    ("name", "head", "key"),
    [
        ("llada_small", "model.transformer.ff_out.weight", "weight_tying"),
        ("dream_small", "lm_head.weight", "tie_word_embeddings"),
    ],
)
def test_a_tied_head_is_the_embedding(model, name, head, key):
    """It may be stored twice, but not be another one; a missing head may be the embedding."""
    tensors, tied = tensors_of(name), {key: True}
    path = model(name)
    embed = read_raw_config(path)[1].tensors["embed"].name
    for stored in (
        {**tensors, head: tensors[embed]},
        {k: tensors[k] for k in tensors if k != head},
    ):
        path = model(name, tensors=stored, **tied)
        params = load_params(path, read_config(path))
        assert "unembed" not in params
        np.testing.assert_array_equal(params["embed"], tensors[embed])
    other = tensors[embed].copy()
    other[-1, -1] += 1
    for wrong in (other, tensors[embed][:-1]):
        path = model(name, tensors={**tensors, head: wrong}, **tied)
        with pytest.raises(
            ValueError, match=f"config.json: {key} says that {head} is {embed}, but"
        ):
            load_params(path, read_config(path))
    path = model(name, tensors={k: tensors[k] for k in tensors if k != head}, **{key: False})
    with pytest.raises(
        ValueError, match=rf"missing: {head} .*; {key} must be true if it is the em"
    ):
        load_params(path, read_config(path))


@pytest.mark.parametrize(
    "end", ["weight_scale_inv", "weight_scale", "qweight", "qzeros", "weight.absmax", "SCB",
            "weight.quant_state.bitsandbytes__nf4", "weight_packed", "scales"],
)  # fmt: skip
def test_quantised_tensors_are_told_in_one_sentence(model, end):
    tensors = tensors_of("dream_small")
    name = f"model.layers.0.mlp.up_proj.{end}"
    path = model("dream_small", tensors=tensors | {name: np.zeros(3, np.float32)})
    with pytest.raises(ValueError) as error:
        load_params(path, read_config(path))
    assert str(error.value) == (
        f"{path}: the weights are quantised, as {name} shows, and only floats are read: download "
        "the model as it was before, or a GGUF of it"
    )


def test_at_most_ten_names_are_told(model):
    tensors = tensors_of("dream_small")
    path = model("dream_small", tensors={f"x.{name}": value for name, value in tensors.items()})
    with pytest.raises(ValueError) as error:
        load_params(path, read_config(path))
    missing, unexpected = str(error.value).split("; ")
    assert missing.count(" [") == 5 and missing.endswith(" and 34 more")
    assert unexpected.count(" [") == 5 and unexpected.endswith(" and 34 more")


def test_an_index_that_names_no_files(model):
    path = model()
    in_two_files(path)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": ["b"]}}))
    with pytest.raises(ValueError, match="weight_map must name a file for every tensor"):
        load_params(path, read_config(path))


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


def test_a_pointer_is_no_file(model):
    path = model()
    cfg = read_config(path)
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 99\n"
    (path / "model.safetensors").write_text(text)
    with pytest.raises(ValueError, match=r"; it is a pointer, which `git lfs pull` replaces"):
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
    raw, published = (
        json.loads((folder / "config.json").read_text()) for folder in (path, GOLDEN / name)
    )
    assert {key: raw[key] for key in raw if key in published} == {
        key: published[key] for key in published if key in raw
    }


@pytest.mark.parametrize(
    ("cfg", "model_type"),
    [
        (TINY, "llada"),
        (dataclasses.replace(TINY, tie_embeddings=True, bos_token_id=7), "llada"),
        (dataclasses.replace(TINY, qkv_bias=True, pad_token_id=3, dtype="bfloat16"), "llada"),
        (dataclasses.replace(TINY, qkv_bias=True, shifted_logits=True, n_layers=11), "Dream"),
        (
            dataclasses.replace(
                TINY, qkv_bias=True, shifted_logits=True, tie_embeddings=True, dtype="float16"
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
        (
            {"qk_norm": True, "qkv_bias": True},
            "llada needs qk_norm=False, not True; Dream needs .* sdar needs qkv_bias=False",
        ),
        (
            {"qk_norm": True, "shifted_logits": True, "qkv_bias": True},
            "Dream needs qk_norm=False, not True.* qwen3 needs qkv_bias=False, not True",
        ),
        ({"rope_scaling": SCALING, "block_len": 5}, "llada needs rope_scaling=None, not Llama3"),
        ({"mask_token_id": None}, "llada needs mask_token_id to be a token, not None"),
        (
            {"qkv_bias": True, "shifted_logits": True, "head_dim": 32},
            "Dream needs head_dim .* qwen2 needs mask_token_id to be None, not",
        ),
    ],
)
def test_save_refuses_what_the_formats_cannot_say(tmp_path, changes, message):
    cfg = dataclasses.replace(TINY, **changes)
    with pytest.raises(ValueError, match=message):
        save_hf(tmp_path / "saved", abstract_params(cfg), cfg)
    assert not list(tmp_path.iterdir())


def test_save_refuses_other_parameters(tmp_path):
    params = random_params(TINY)
    params["embed"] = params["embed"][:5]
    params["final_norm"] = params["final_norm"].astype("bfloat16")
    params["extra"] = params.pop("unembed")
    with pytest.raises(ValueError) as error:
        save_hf(tmp_path / "saved", params, TINY)
    assert str(error.value) == (
        "params must be those of cfg, but embed: float32 [5, 64] instead of float32 [128, 64]; "
        "extra: float32 [128, 64] instead of nothing; "
        "final_norm: bfloat16 [64] instead of float32 [64]; "
        "unembed: nothing instead of float32 [128, 64]"
    )


def test_save_never_overwrites(tmp_path):
    params = random_params(TINY)
    (tmp_path / "empty").mkdir()
    save_hf(tmp_path / "empty", params, TINY)
    for taken in (tmp_path / "empty", tmp_path / "empty" / "config.json"):
        with pytest.raises(FileExistsError, match="must be a new or an empty directory"):
            save_hf(taken, params, TINY)
    assert read_config(tmp_path / "empty") == TINY


def test_an_interrupted_save_leaves_no_model(tmp_path, monkeypatch):
    params = random_params(TINY)
    seen, save_file = [], safetensors.numpy.save_file

    def interrupted(tensors, file, **kwargs):
        save_file(tensors, file, **kwargs)
        seen.append(file)
        assert not (tmp_path / "saved").exists()
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_hf(tmp_path / "saved", params, TINY, shard_bytes=20_000)
    assert len(seen) == 2
    assert not list(tmp_path.iterdir())
