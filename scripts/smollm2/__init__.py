"""Drafters for a real model: see `__main__`."""
