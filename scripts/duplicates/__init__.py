"""Whether the same code stands twice: `python -m scripts.duplicates`."""
