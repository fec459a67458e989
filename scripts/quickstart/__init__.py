"""From nothing to a table of decoding methods: `python -m scripts.quickstart`."""
