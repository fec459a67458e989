"""Making training data out of a model's own answers."""
