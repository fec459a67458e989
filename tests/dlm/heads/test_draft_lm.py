"""A draft model may come from whatever the target may come from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dlm.heads.draft_lm import DraftLM, keep_layers, with_layers
from dlm.hf.saving import save_hf
from dlm.models import decoder
from dlm.window import Window
from tests.lib.checkpoints import assert_same, random_params
from tests.lib.families import FAMILIES
from tests.lib.gguf_files import TOKENIZER, renamed, write_gguf
from tests.lib.jitted import as_one_program
from tests.lib.tiers import more

CFG = dataclasses.replace(
    FAMILIES["MistralForCausalLM"], n_layers=1, sliding_window=None, vocab_size=260,
    pattern=("dense global rotary",), family=None, bos_token_id=None,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    save_hf(tmp_path / "model", random_params(CFG), CFG)
    return tmp_path / "model"


def as_gguf(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    metadata = {
        "general.architecture": "qwen2", "qwen2.embedding_length": 32, "qwen2.block_count": 1,
        "qwen2.attention.head_count": 4, "qwen2.attention.head_count_kv": 2,
        "qwen2.feed_forward_length": 48, "qwen2.context_length": 128,
        "qwen2.attention.layer_norm_rms_epsilon": CFG.norm_eps, "qwen2.rope.freq_base": 1e4,
    }  # fmt: skip
    path = folder.parent / "draft.gguf"
    write_gguf(path, metadata | TOKENIZER, renamed(tensors, 1))
    return path


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("family", ["LLaDA2MoeModelLM", *more("Gemma3ForCausalLM")])
def test_some_layers_are_a_model_of_their_own(family):
    """Also of layers of several kinds: what the target gives if only those are run."""
    cfg, kept = FAMILIES[family], (0, 2, 3)
    params = jax.device_put(random_params(cfg))
    smaller, own = with_layers(cfg, kept), keep_layers(params, cfg, kept)
    assert smaller.n_layers == 3
    window = Window.at(jnp.arange(20, 28)[None], jnp.zeros(1, jnp.int32), is_causal=True)
    run = as_one_program(
        lambda: (
            decoder.forward(own, smaller, window).hidden,
            decoder.forward(params, cfg, window, layers=kept).hidden,
        )
    )
    np.testing.assert_allclose(*run(), atol=1e-6)
    assert with_layers(cfg, ()) == cfg and keep_layers(params, cfg, ()) is params
    for wrong in ((2, 0), (0, cfg.n_layers), (1, 1)):
        with pytest.raises(ValueError, match=r"must be rising layers of the"):
            with_layers(cfg, wrong)


def test_folders_and_gguf_files_are_the_same_draft(folder):
    expected = random_params(CFG)
    for path in (folder, as_gguf(folder)):
        draft = DraftLM(checkpoint=str(path), reference=str(path))
        own = random_params(dataclasses.replace(CFG, d_ff=48))
        assert_same(draft.start(CFG, {}, own), expected)
        assert_same(draft.beside(CFG, None), expected)
        with pytest.raises(ValueError, match="has a vocabulary of 260 tokens and the target one"):
            draft.specs(dataclasses.replace(CFG, vocab_size=96))
