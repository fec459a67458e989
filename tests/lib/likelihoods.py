"""Likelihoods of answers as cards define them, mask by mask."""

import itertools

import numpy as np

from tests.lib import oracle


def score(lm, prompt, answer, is_masked, guidance=0.0):
    """Sum of log-probabilities of the masked tokens, in float64, without padding."""
    model, mask = oracle.Model(lm.params, lm.cfg), lm.cfg.mask_token_id
    noisy = [mask if hidden else token for token, hidden in zip(answer, is_masked, strict=True)]

    def logits(prompt):
        tokens = [*prompt, *noisy]
        return model.logits(model.run(tokens, range(len(tokens)))[0])

    z, blind = logits(prompt), logits([mask] * len(prompt))
    z = blind + (guidance + 1) * (z - blind)
    z = z - np.log(np.exp(z).sum(-1, keepdims=True))
    first = len(prompt) - int(lm.cfg.shifted_logits)
    return sum(z[first + i, token] for i, token in enumerate(answer) if is_masked[i])


def expectation(lm, prompt, answer):
    """The bound itself: all mask counts, all sets of that size."""
    A, total = len(answer), 0.0
    for n in range(1, A + 1):
        sets = [set(chosen) for chosen in itertools.combinations(range(A), n)]
        scores = [score(lm, prompt, answer, [i in chosen for i in range(A)]) for chosen in sets]
        total += np.mean(scores) / n
    return total
