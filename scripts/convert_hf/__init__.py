"""Published checkpoints, checked and written again: `python -m scripts.convert_hf`."""
