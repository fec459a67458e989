"""Untrained models that read and write a task's words."""

import dataclasses

import jax

import dlm
from dlm.params import init_params
from dlm.presets import PRESETS
from dlm.tokenizer import word_tokenizer


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
