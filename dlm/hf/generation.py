"""How a model's authors generate with it: generation_config.json as arguments of decoding.

What is drawn is what the well-known library draws: of `do_sample`, among the `top_k` most probable
tokens, 50 where the file does not say. Nothing here is a default of decoding: a call says it.

Example:
    >>> lm = dlm.load("path/to/checkpoint")
    >>> lm.generation
    {'temperature': 0.6, 'top_p': 0.95, 'top_k': 20}
    >>> decode.complete(lm, "Once", **lm.generation)
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from dlm.hf import keys
from dlm.hf.format import TOKEN_IDS
from dlm.json_lines import read_json

# What `read` gives, by keys of the file.
_FILTERS = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")  # but for top_k
_READ = ("do_sample", "temperature", "top_k", *_FILTERS, "repetition_penalty")
_STOPS = "stop_strings"

_RANGES = {
    "temperature": (0, math.inf),
    "top_k": (-1, keys.LARGEST),  # 0 and, in files of other engines, -1: all tokens
    **dict.fromkeys(_FILTERS, (0, 1)),
}
# Filters that say this leave everything.
_ALL = {"top_p": (1,), "typical_p": (1,), "min_p": (0,)} | dict.fromkeys(_FILTERS[3:], (0, 1))

# What changes no text: lengths and numbers of answers, which a call says; how it is computed.
_HARMLESS = [
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "assistant_ngram_size",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "early_stopping",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_length",
    "max_matching_ngram_size",
    "max_new_tokens",
    "max_time",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "return_legacy_cache",
    "target_lookbehind",
    "token_healing",
    "transformers_version",
    "trust_remote_code",
    "use_cache",
    "use_mtp",
]

# Arguments of the decoders of diffusion models, which methods have; see `decode.diffusion.public`.
_OF_METHODS = [
    "alg",
    "alg_temp",
    "block_length",
    "block_size",
    "cfg_scale",
    "confidence_threshold",
    "denoising_steps",
    "diffusion_steps",
    "dynamic_threshold",
    "eps",
    "gen_length",
    "mask_id",
    "output_history",
    "remasking",
    "remasking_strategy",
    "small_block_size",
    "steps",
    "steps_per_block",
    "threshold",
]

# What the library leaves undone if it says this.
_OFF: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "suppress_tokens": ([],),
}


def read_generation(root: pathlib.Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `decode.complete` and `decode.generate`.

    A warning names what else the file wants, which is not done.

    Args:
      root: the directory.
      raw: its config.json, where older models have these settings.

    Raises:
      ValueError: a setting is of another type than it should be.
    """
    file = root / "generation_config.json"
    if file.is_file():
        said = read_json(file)
    else:
        file, known = root / "config.json", {*_READ, *_OFF}
        said = {key: value for key, value in raw.items() if key in known}
    try:
        found = _read(said)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    known = {*_READ, _STOPS, *_HARMLESS, *_OF_METHODS, *TOKEN_IDS}
    undone = [
        f"{key}={value!r:.60}"
        for key, value in said.items()
        if key not in known and value is not None and value not in _OFF.get(key, ())
    ]
    if undone:
        logging.warning("%s: %s: not followed here.", file, ", ".join(undone[:10]))
    return found


def _read(said: dict[str, Any]) -> dict[str, Any]:
    numbers = {key: keys.number(said, key) for key in ("temperature", *_FILTERS)}
    top_k, penalty = keys.whole(said, "top_k", 50), keys.number(said, "repetition_penalty")
    for key, (least, most) in _RANGES.items():
        value = said.get(key)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{key}={value!r} must be in [{least}, {most}]")
    if penalty is not None and not penalty > 0:
        raise ValueError(f"repetition_penalty={penalty} must be positive")
    found: dict[str, Any] = {}
    if keys.flag(said, "do_sample", False):
        found["temperature"] = 1.0 if numbers["temperature"] is None else numbers["temperature"]
        found |= {"top_k": top_k} if top_k and top_k > 0 else {}
        found |= {
            key: number
            for key in _FILTERS
            if (number := numbers[key]) is not None and number not in _ALL[key]
        }
    if penalty not in (None, 1):
        found["repetition_penalty"] = penalty
    if stops := said.get(_STOPS):
        stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(stops, list) or not all(isinstance(x, str) and x for x in stops):
            raise ValueError(f"{_STOPS}={stops!r} must be a list of texts")
        found["stop"] = tuple(stops)
    return found


def write_generation(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of generation_config.json that `read_generation` reads as these arguments."""
    said = dict(generation)
    stop = said.pop("stop", ())
    if is_drawn := "temperature" in said:
        said |= {"do_sample": is_drawn, "top_k": said.get("top_k", 0)}
    return said | ({_STOPS: list(stop)} if stop else {})


# Keys of GGUF files, "general.sampling." before them.
_OF_GGUF = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def read_gguf_generation(path: pathlib.Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """As `read_generation`, of what a GGUF file says; what it does not say is left out."""
    prefix = "general.sampling."
    said = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    found: dict[str, Any] = {}
    for key, name in _OF_GGUF.items():
        if key in said:
            check = keys.whole if name == "top_k" else keys.number
            try:
                value = check(said, key)
            except ValueError as error:
                raise ValueError(f"{path}: {prefix}{error}") from error
            found |= {name: value} if value > 0 else {}
    if undone := [
        f"{prefix}{key}={value!r:.60}" for key, value in said.items() if key not in _OF_GGUF
    ]:
        logging.warning("%s: %s: not followed here.", path, ", ".join(undone[:10]))
    return found
