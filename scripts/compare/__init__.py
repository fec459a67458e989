"""Many methods on the same examples: `python -m scripts.compare`."""
