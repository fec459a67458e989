"""Searches, and what they find."""

import jax

from decode.search.loop import begin, decode, results


def search(toy, method, prompts=None, gen_len=10, **options):
    """The state at the end, and what was found; `toy` is a model's cfg and parameters, and prompts.

    Prompts may be others.
    """
    cfg, params, every = toy
    state = begin(params, cfg, method, prompts or every, gen_len=gen_len, chunk=8, **options)
    state = decode(params, cfg, method, state)
    return state, jax.device_get(results(method, state))


def found(result, b, r=0):
    """Completion r of prompt b."""
    return result.tokens[b, r, : result.num_tokens[b, r]].tolist()
