"""A dialogue with any checkpoint, in the terminal: `python -m scripts.chat`."""
