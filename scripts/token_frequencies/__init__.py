"""Shares of tokens in texts: `python -m scripts.token_frequencies`."""
