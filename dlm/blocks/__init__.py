"""The parts of a layer, as pure functions: a model is a pattern of them."""
