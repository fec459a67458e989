"""From nothing to a table of drafters: `python -m scripts.quickstart_spec`."""
