"""What a language model is here: configuration, parameters, a window forward, caches, files."""

from dlm.compilation import keep_programs
from dlm.config import ModelConfig
from dlm.lm import LanguageModel, check_same_tokens, fingerprint, load, save
from dlm.presets import PRESETS
from dlm.xla_flags import prefer_cublas

__all__ = [
    "PRESETS",
    "LanguageModel",
    "ModelConfig",
    "check_same_tokens",
    "fingerprint",
    "keep_programs",
    "load",
    "save",
]

prefer_cublas()
