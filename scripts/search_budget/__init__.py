"""Searches that may check answers, at equal forwards: `python -m scripts.search_budget`."""
