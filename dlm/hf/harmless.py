"""Keys of config.json that change nothing here; all others must be known to the family.

A key that is null counts as absent.
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

# Where a file comes from, and how other libraries run it.
ORIGIN = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _flash_attn_2_enabled _name_or_path _num_labels architectures attn_implementation auto_map
    cache_implementation chunk_size_feed_forward deterministic_flash_attn dtype
    experts_implementation finetuning_task flash_attention fuse_cross_entropy
    has_no_defaults_at_init id2label init_device is_decoder is_llama_config label2id license
    model_type name_or_path num_labels output_attentions output_hidden_states output_past
    output_router_logits precision predict_special_tokens prefix pretraining_tp problem_type
    return_dict tf_legacy_loss tokenizer_class torch_dtype torchscript transformers.js_config
    transformers_version unsloth_fixed unsloth_tracker unsloth_version use_bfloat16 use_cache
"""

# How weights were drawn and learned.
TRAINING = """
    attention_dropout attn_pdrop classifier_dropout debug embd_pdrop embedding_dropout ep_size
    gradient_checkpointing hidden_dropout init_cutoff_factor init_fn init_std
    initializer_cutoff_factor initializer_range micro_forward mlp_dropout output_dropout
    resid_pdrop residual_dropout router_aux_loss_coef router_jitter_noise router_z_loss_coef
    skip_checkpoint summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params tie_encoder_decoder train_max_sequence_length use_deepep
"""

# How `transformers` generates; here the arguments of a call say it.
GENERATION = """
    bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature
    top_k top_p typical_p
"""

# Tokens that nothing here writes.
TOKENS = "cls_token_id sep_token_id unk_token_id"

# What no code reads where something else is off, or given (`embedding_size`, `mlp_hidden_size`,
# `weight_tying` of LLaDA).
UNREAD = """
    alibi_bias_max attention_layer_norm_with_affine max_sequence_length max_window_layers mlp_ratio
    n_ctx tie_word_embeddings vocab_size
"""

HARMLESS = frozenset(" ".join([ORIGIN, TRAINING, GENERATION, TOKENS, UNREAD]).split())

# Harmless if they say this, as all published code takes for granted where they are absent.
USUAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "embedding_layer_norm": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_encoder_decoder": (False,),
    "lm_head_bias": (False,),
    "mlp_bias": (False,),
    "n_special": (0,),
    "num_nextn_predict_layers": (0,),
    "partial_rotary_factor": (1,),
    "pruned_heads": ({}, []),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}

# Which keys say that weights are quantised.
QUANTISED = ("quantization_config", "compression_config", "quantization", "quant_config")


def check_keys(file: pathlib.Path, raw: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuses what a config.json says and nobody here reads.

    Args:
      file: for messages.
      raw: what it says.
      known: keys that the family reads.

    Raises:
      ValueError: weights are quantised, or there is a key that is not known.
    """
    for key in QUANTISED:
        if said := raw.get(key):
            method = said.get("quant_method") if isinstance(said, Mapping) else None
            raise ValueError(
                f"{file}: {key} says that the weights are quantised"
                f"{f' ({method})' if isinstance(method, str) else ''}, and only floats are read: "
                "download the model as it was before, or a GGUF of it"
            )
    for key, value in raw.items():
        is_list = key == "layer_types" and isinstance(value, list)
        is_full = is_list and value == ["full_attention"] * len(value)
        is_off = key == "sliding_window" and raw.get("use_sliding_window") is False
        is_nothing = value is None or (key in QUANTISED and not value)
        if key in known or key in HARMLESS or is_nothing or is_full or is_off:
            continue
        if key in USUAL:
            if value in USUAL[key]:
                continue
            right = f"only {' or '.join(map(repr, USUAL[key]))} is supported for this family"
        else:
            right = "it is not known here and may change what the model computes"
        raise ValueError(f"{file}: {key}={_short(value)}: {right}; without effect, take it out")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
