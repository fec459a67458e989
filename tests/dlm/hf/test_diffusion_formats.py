"""Families of masked diffusion: what their published files say, read as it is meant."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import dlm
from dlm import vocab
from dlm.hf.files import read_config
from dlm.hf.formats import FORMATS
from dlm.hf.saving import save_hf
from dlm.hf.weights import load_params
from dlm.models.decoder import forward
from dlm.presets import PRESETS
from dlm.tokenizer import word_tokenizer
from dlm.window import Window
from kernels_pallas.window_attention import pack_mask
from tests.dlm.hf.test_files import DREAM_7B, LLADA_8B, QWEN_2_5_7B, QWEN_3_0_6B
from tests.lib.checkpoints import TINY, assert_same, load_with_mask, random_params
from tests.lib.paths import SHARED
from tests.lib.tiers import more

GOLDENS = SHARED / "goldens"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="the traces are not there")


def write(path, raw):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    return path


# ---- Configurations of published models, as far as they are read ----------------------------

# SDAR: Qwen3 with a block length, and what training left behind.
SDAR_8B = QWEN_3_0_6B | {
    "architectures": ["SDARForCausalLM"], "model_type": "sdar", "hidden_size": 4096,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 12288, "tie_word_embeddings": False, "max_position_embeddings": 32768,
    "eos_token_id": 151643, "bos_token_id": 151643, "pad_token_id": 151643,
    "block_size": 4, "mask_token_id": 151669, "debug": False, "ep_size": 1,
    "fuse_cross_entropy": True, "micro_forward": False, "skip_checkpoint": False,
    "use_deepep": False,
}  # fmt: skip
FAST_DLLM_V2_7B = QWEN_2_5_7B | {
    "architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen",
    "bd_size": 32, "eos_token_id": 151645, "pad_token_id": 151645, "sliding_window": None,
}  # fmt: skip
STABLE_DIFFCODER_8B = {
    "architectures": ["StableDiffcoderForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "vocab_size": 155136, "hidden_act": "silu", "mlp_bias": False,
    "attention_bias": False, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "bos_token_id": 0, "pad_token_id": 1,
    "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
A2D_QWEN3_0_6B = QWEN_3_0_6B | {
    "architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3", "mask_token_id": 151669,
    "pad_token_id": 151643,
}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "preset"),
    [
        (SDAR_8B, "sdar_8b"),
        (FAST_DLLM_V2_7B, "fast_dllm_v2_7b"),
        (STABLE_DIFFCODER_8B, "stable_diffcoder_8b"),
        (A2D_QWEN3_0_6B, "a2d_qwen3_0_6b"),
    ],
)
def test_published_configs_give_the_presets(tmp_path, raw, preset):
    cfg = read_config(write(tmp_path, raw))
    own = {"bos_token_id": cfg.bos_token_id, "more_eos_ids": ()}  # others in another file
    assert cfg == dataclasses.replace(PRESETS[preset], **own)
    assert cfg.bos_token_id == raw["bos_token_id"]


def test_mask_tokens_that_no_config_names(tmp_path):
    older = {k: v for k, v in SDAR_8B.items() if k not in ("mask_token_id", "block_size")}
    assert read_config(write(tmp_path, older)) == read_config(write(tmp_path, SDAR_8B))
    assert read_config(write(tmp_path, FAST_DLLM_V2_7B)).mask_token_id == 151665
    assert read_config(write(tmp_path, STABLE_DIFFCODER_8B)).mask_token_id == 5
    # What a file says comes before; a vocabulary too small for the default has none.
    assert read_config(write(tmp_path, older | {"mask_token_id": 7})).mask_token_id == 7
    small = {k: v for k, v in FAST_DLLM_V2_7B.items() if not k.endswith("_token_id")}
    small |= {"vocab_size": 96, "eos_token_id": 2, "pad_token_id": 2}
    with pytest.raises(ValueError, match=r"config.json must give mask_token_id"):
        read_config(write(tmp_path, small))
    # Tiny-A2D: only the tokenizer has it.
    lost = {k: v for k, v in A2D_QWEN3_0_6B.items() if k != "mask_token_id"}
    lost |= {"vocab_size": 96, "eos_token_id": 80, "pad_token_id": 80, "bos_token_id": None}
    with pytest.raises(ValueError, match=r"config.json must give mask_token_id"):
        read_config(write(tmp_path, lost))
    word_tokenizer([f"{i} " for i in range(80)]).save(tmp_path)
    assert read_config(tmp_path).mask_token_id == 81


@pytest.mark.parametrize("mask", ["|<MASK>|", "<MASK>"])
def test_mask_tokens_are_found_by_their_text(tmp_path, mask):
    """Fast-dLLM v2 and SDAR, whose tokenizer_config.json need not say which token MASK is."""
    word_tokenizer([f"{i} " for i in range(80)]).save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / name).read_text().replace("<|mdm_mask|>", mask)
        (tmp_path / name).write_text(text.replace(f'"mask_token": "{mask}"', '"mask_token": null'))
    assert dlm.hf.tokenizer.load_tokenizer(tmp_path).mask_token_id == 81


LLADA_LINE = {  # one format; iLLaDA has another MASK token
    "LLaDA-1.5": {},
    "dParallel-LLaDA-8B": {},
    "d3LLM-LLaDA-8B": {},
    "dLLM-Var-8B": {"eos_token_id": 126348},
    "iLLaDA-8B": {"mask_token_id": 5},
}
DREAM_LINE = {
    "DiffuCoder-7B-cpGRPO": {}, "Dream-Coder-v0-Instruct-7B": {}, "dParallel-Dream-7B": {},
    "d3LLM-Dream-Coder-7B": {},
}  # fmt: skip


@pytest.mark.parametrize("name", LLADA_LINE)
def test_the_llada_line_is_one_format(model, name):
    path = model(**(LLADA_8B | {"architectures": ["LLaDAModelLM"]} | LLADA_LINE[name]))
    expected = dataclasses.replace(
        PRESETS["llada_8b"], bos_token_id=None, dtype="float32", **LLADA_LINE[name]
    )
    assert read_config(path, "float32") == expected


def test_a_mask_that_only_the_tokenizer_has(model):
    path = model(drop=("mask_token_id",), eos_token_id=80, pad_token_id=80)
    word_tokenizer([f"{i} " for i in range(80)]).save(path)
    assert read_config(path).mask_token_id == 81  # never that of LLaDA-8B by rote


@pytest.mark.parametrize("name", DREAM_LINE)
def test_the_dream_line_is_one_format(model, name):
    path = model("dream_small", **DREAM_7B, architectures=["DreamModel"])
    cfg = read_config(path)
    assert cfg.shifted_logits and cfg.mask_token_id == 151666 and cfg.block_len is None


def test_architectures_come_before_the_model_type(tmp_path):
    raw = STABLE_DIFFCODER_8B
    assert not read_config(write(tmp_path, raw)).shifted_logits
    with pytest.raises(ValueError, match=r"must name one network, not 'LlamaForCausalLM' and 'Sta"):
        read_config(write(tmp_path, raw | {"architectures": ["LlamaForCausalLM"]}))
    llama = raw | {"architectures": ["LlamaForCausalLM"], "auto_map": None}
    assert read_config(write(tmp_path, llama)).shifted_logits
    assert read_config(write(tmp_path, llama)).mask_token_id is None
    with pytest.raises(ValueError, match=r"'StableDiffcoderForCausalLM'.* with model_type='qwen3'"):
        read_config(write(tmp_path, raw | {"model_type": "qwen3"}))


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({"qk_norm": True, "block_len": 8, "head_dim": 32}, "SDARForCausalLM"),
        ({"qk_norm": True, "tie_embeddings": True}, "A2DQwen3LMHeadModel"),
        ({"qkv_bias": True, "head_dim": 8}, "A2DQwen2LMHeadModel"),
        ({"head_dim": 8}, "A2DLlamaLMHeadModel"),
        ({"block_len": 4}, "StableDiffcoderForCausalLM"),
        (
            {"qkv_bias": True, "shifted_logits": True, "block_len": 16, "tie_embeddings": True},
            "Fast_dLLM_QwenForCausalLM",
        ),
    ],
)
def test_formats_come_back(tmp_path, changes, architecture):
    cfg = dataclasses.replace(TINY, **changes)
    params = random_params(cfg)
    save_hf(tmp_path / "model", params, cfg)
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert raw["architectures"] == [architecture]
    again = read_config(tmp_path / "model")
    assert again == cfg
    assert_same(load_params(tmp_path / "model", again), params)


def test_heads_of_another_width_are_not_lladas():
    wide = dataclasses.replace(TINY, head_dim=32)
    refusal = FORMATS["LLaDAModelLM"].refuse(wide)
    assert refusal == "llada needs head_dim to be d_model=64 / n_heads=4, not 32"


def test_a_block_length_is_written_or_refused(tmp_path):
    cfg = dataclasses.replace(TINY, block_len=8)
    with pytest.raises(ValueError, match=r"llada needs block_len=None, not 8; .*needs block_len=4"):
        save_hf(tmp_path / "model", random_params(cfg), cfg)
    with pytest.raises(ValueError, match="block_len=0 must be at least 1, or None"):
        dataclasses.replace(TINY, block_len=0)
    with pytest.raises(ValueError, match="block_size='4' must be of type int"):
        read_config(write(tmp_path / "b", SDAR_8B | {"block_size": "4"}))


# ---- Logits of public code ------------------------------------------------------------------


def logits_of(lm, tokens, start, block_len=None):
    """[B, T, V] of left-padded rows: full attention, or in blocks counted over the padded row."""
    B, T = tokens.shape
    block = np.arange(T) // (block_len or T)
    allowed = np.broadcast_to(block[:, None] >= block[None], (B, T, T))
    return np.asarray(_logits(lm.params, lm.cfg, tokens, start, allowed))


@functools.partial(jax.jit, static_argnames="cfg")
def _logits(params, cfg, tokens, start, allowed):
    window = Window.left_padded(tokens, start, mask=pack_mask(allowed))
    return vocab.logits(vocab.head(params), forward(params, cfg, window).hidden)


@needs_goldens
@pytest.mark.parametrize("name", ["qwen3_a", *more("llama_a", "qwen2_a")])
def test_a2d_logits(tmp_path, name):
    lm = load_with_mask(GOLDENS / "a2d" / name, tmp_path)
    golden = np.load(GOLDENS / "a2d" / name / "forward.npz")
    block_len = json.loads((GOLDENS / "a2d" / name / "meta.json").read_text())["block"]
    tokens, pad = golden["tokens"], golden["pad"]
    none = np.zeros_like(pad)
    np.testing.assert_allclose(logits_of(lm, tokens, none), golden["logits_full"], atol=1e-4)
    for logits, field in (
        (logits_of(lm, tokens, pad), "logits_full_padded"),
        (logits_of(lm, tokens, pad, block_len), "logits_block_padded"),
    ):
        for b in range(len(tokens)):
            expected = golden[field][b, pad[b] :]
            np.testing.assert_allclose(logits[b, pad[b] :], expected, atol=1e-4, err_msg=field)


@needs_goldens
@pytest.mark.parametrize("name", ["a", "b_tied"])
def test_fast_dllm_v2_logits(tmp_path, name):
    lm = load_with_mask(GOLDENS / "fast_dllm_v2" / name, tmp_path)
    golden = np.load(GOLDENS / "fast_dllm_v2" / name / "forward.npz")
    logits = logits_of(lm, golden["tokens"], np.zeros(2, np.int32), lm.cfg.block_len)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
