"""Tasks of lm-evaluation-harness: `python -m scripts.lm_eval`."""
