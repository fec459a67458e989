"""How models are trained: configuration, data, objectives, and one loop."""
