"""What a model of blocks has kept and learned: see `__main__`."""
