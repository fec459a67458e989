"""One file per experiment: `get_config(arg)` gives its settings, see `train.config`."""
