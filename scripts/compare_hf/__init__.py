"""Against Hugging Face's `generate`: `python -m scripts.compare_hf`."""
