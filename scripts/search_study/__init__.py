"""Searches and ways to sample, measured on a task: `python -m scripts.search_study`."""
