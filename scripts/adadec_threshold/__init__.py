"""The entropy from which on AdaDec pauses, learned for a model."""
