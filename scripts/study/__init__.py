"""What learned parallelism buys: `python -m scripts.study`."""
