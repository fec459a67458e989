"""Models that Hugging Face's library made are read, and what is saved it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm
from dlm import vocab
from dlm.hf.saving import save_hf
from dlm.models import decoder
from dlm.presets import PRESETS
from dlm.tokenizer import byte_tokenizer
from dlm.window import Window
from tests.lib.checkpoints import random_params
from tests.lib.families import FAMILIES, small

torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
EXPERTS = dict(
    moe_intermediate_size=20, shared_expert_intermediate_size=24, num_experts=8,
    num_experts_per_tok=3,
)  # fmt: skip
THEIRS = {
    "Olmo2": ("Olmo2", dict(rms_norm_eps=1e-5)),
    "Granite": (
        "Granite",
        dict(
            embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22,
            attention_multiplier=0.0156, tie_word_embeddings=True,
        ),
    ),
    "Qwen2Moe, some layers": ("Qwen2Moe", dict(**EXPERTS, decoder_sparse_step=2)),
    "Qwen2Moe, sliding": (
        "Qwen2Moe",
        dict(
            **EXPERTS, norm_topk_prob=True, use_sliding_window=True, sliding_window=5,
            max_window_layers=3,
        ),
    ),
    "SeedOss": (
        "SeedOss",
        dict(head_dim=16, attention_dropout=0.0, residual_dropout=0.0, attention_out_bias=True),
    ),
}  # fmt: skip
# Their own code reads these; it is not in the library.
DIFFUSION = ("LLaDAMoEModelLM", "LLaDA2MoeModelLM", "SDARMoeForCausalLM")
SAVED = {name: cfg for name, cfg in FAMILIES.items() if name not in DIFFUSION} | {
    "LlamaForCausalLM": small(PRESETS["llama3_1_8b"]),
    "Qwen2ForCausalLM": small(PRESETS["qwen2_5_7b"]),
    "Qwen3ForCausalLM": small(PRESETS["qwen3_0_6b"]),
}


def logits_of(lm, tokens):
    forward = jax.jit(decoder.forward, static_argnames=("cfg",))
    window = Window.at(jnp.asarray(tokens), jnp.zeros(len(tokens), jnp.int32), is_causal=True)
    hidden = forward(lm.params, lm.cfg, window).hidden
    return vocab.logits(vocab.head(lm.params), hidden)


def random_tokens():
    return np.random.default_rng(0).integers(0, 96, (2, 24)).astype(np.int32)


@pytest.mark.parametrize("name", THEIRS)
def test_their_models_are_read(tmp_path, name):
    family, changes = THEIRS[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for leaf, weight in model.named_parameters():
            scale, mean = (0.3, 0.0) if weight.ndim > 1 else (0.2, float("norm" in leaf))
            weight.copy_(torch.randn_like(weight) * scale + mean)
        expected = model(torch.from_numpy(random_tokens()).long()).logits.numpy()
    model.save_pretrained(tmp_path)
    np.testing.assert_allclose(logits_of(dlm.load(tmp_path), random_tokens()), expected, atol=1e-4)


@pytest.mark.parametrize("architecture", SAVED)
def test_they_read_what_is_saved(tmp_path, architecture):
    cfg = SAVED[architecture]
    params = jax.tree.map(lambda x: (0.3 * x).astype(x.dtype), random_params(cfg))
    save_hf(tmp_path / "model", params, cfg)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert type(model).__name__ == architecture
    with torch.no_grad():
        expected = model(torch.from_numpy(random_tokens()).long()).logits.numpy()
    lm = dlm.LanguageModel(params, cfg)
    np.testing.assert_allclose(logits_of(lm, random_tokens()), expected, atol=1e-4, rtol=1e-4)


def test_they_read_the_tokenizer_and_settings_that_are_saved(tmp_path):
    cfg = small(PRESETS["qwen3_0_6b"], vocab_size=260, eos_token_id=256, more_eos_ids=(259,))
    generation = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "stop": ("x", "yz")}
    lm = dlm.LanguageModel(random_params(cfg), cfg, byte_tokenizer(), generation=generation)
    dlm.save(tmp_path / "model", lm)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in ("Hello wörld\n\n  x", " a", "", "日本<|endoftext|>"):
        ids = [int(i) for i in lm.tokenizer.encode(text)]
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == 256
    said = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    assert said.eos_token_id == [256, 259]
    assert (said.do_sample, said.temperature, said.top_k, said.top_p) == (True, 0.6, 20, 0.9)
    assert said.stop_strings == ["x", "yz"]
