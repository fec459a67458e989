"""A draft model may come from whatever the target may come from."""

import dataclasses

import pytest
import safetensors.numpy

from dlm.heads.draft_lm import DraftLM
from dlm.hf.saving import save_hf
from tests.lib.checkpoints import assert_same, random_params
from tests.lib.families import FAMILIES
from tests.lib.gguf_files import TOKENIZER, renamed, write_gguf

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


def test_folders_and_gguf_files_are_the_same_draft(folder):
    expected = random_params(CFG)
    for path in (folder, as_gguf(folder)):
        draft = DraftLM(checkpoint=str(path), reference=str(path))
        own = random_params(dataclasses.replace(CFG, d_ff=48))
        assert_same(draft.start(CFG, {}, own), expected)
        assert_same(draft.beside(CFG, None), expected)
        with pytest.raises(ValueError, match="has a vocabulary of 260 tokens and the target one"):
            draft.specs(dataclasses.replace(CFG, vocab_size=96))
