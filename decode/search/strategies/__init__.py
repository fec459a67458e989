"""Strategies: which hypotheses go on, and with what, one file per method."""
