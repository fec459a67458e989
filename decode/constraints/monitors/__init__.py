"""Monitors: what static analysis says of a text while it is written."""
