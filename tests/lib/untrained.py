"""Untrained models with tokenizers."""

import dataclasses
import string

import jax

import dlm
from dlm.config import ModelConfig
from dlm.presets import PRESETS
from dlm.tokenizer import Tokenizer, byte_tokenizer, word_tokenizer
from tests.lib.models import spread
from tests.lib.weights import init_params


def untrained(task) -> dlm.LanguageModel:
    """A tiny model with the task's own vocabulary."""
    tokenizer = word_tokenizer(task.pieces)
    cfg = dataclasses.replace(
        PRESETS["tiny"],
        n_kv_heads=4,
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return dlm.LanguageModel(init_params(jax.random.key(0), cfg), cfg, tokenizer)


def byte_lm() -> dlm.LanguageModel:
    """A tiny autoregressive or diffusion model of bytes, with a tokenizer."""
    return tiny(byte_tokenizer(), 128)


def char_lm() -> dlm.LanguageModel:
    """A tiny autoregressive or diffusion model that chats in small letters.

    A token is a character, so that what it wrote is read as it was written.
    """
    tokenizer = dataclasses.replace(
        word_tokenizer([*string.ascii_lowercase, *" .,!?<>"]),
        chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    return tiny(tokenizer, 2048)


def tiny(tokenizer: Tokenizer, max_seq_len: int) -> dlm.LanguageModel:
    """A tiny autoregressive or diffusion model with a vocabulary of its own."""
    cfg = ModelConfig(
        d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24,
        max_seq_len=max_seq_len, vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id, mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id, shifted_logits=True, dtype="float32",
    )  # fmt: skip
    return dlm.LanguageModel(spread(init_params(jax.random.key(0), cfg)), cfg, tokenizer)
