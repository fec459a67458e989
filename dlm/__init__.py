"""What a language model is here: configuration, parameters, a window forward, caches, files."""

from dlm.config import PRESETS, ModelConfig
from dlm.lm import LanguageModel, load, save

__all__ = ["PRESETS", "LanguageModel", "ModelConfig", "load", "save"]
