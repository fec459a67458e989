"""Drafters: who proposes what the target judges, one file per method."""
