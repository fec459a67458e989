"""Searches, and what they find."""

import dataclasses

import jax
import numpy as np

from decode.core.loop import FOREVER
from decode.search.components import METHODS
from decode.search.loop import begin, decode, results
from decode.speculative.loop import SpeculativeMethod
from tests.lib.speculation import random_prompts, run, texts


def point(name, cfg):
    """A named search for a model without a tokenizer: some tokens are punctuation."""
    method = METHODS[name]
    if name == "cntp":
        marks = np.arange(cfg.vocab_size) % 5 == 0
        method = method.replace(strategy=method.strategy.replace(punctuation=marks))
    return method


def ending(cfg, params, num=8):
    """The configuration of a model without MASK whose texts end now and then, and prompts."""
    prompts = random_prompts(cfg, num)
    rows = texts(run(params, cfg, SpeculativeMethod(), prompts), num)
    used = np.bincount(np.concatenate(rows), minlength=cfg.vocab_size)
    eos = int(np.argsort(used)[-3])
    return dataclasses.replace(cfg, eos_token_id=eos, mask_token_id=None), prompts


def search(toy, method, prompts=None, gen_len=10, **options):
    """The state at the end, and what was found; `toy` is a model's cfg and parameters, and prompts.

    Prompts may be others.
    """
    cfg, params, every = toy
    state = begin(params, cfg, method, prompts or every, gen_len=gen_len, chunk=8, **options)
    state = decode(params, cfg, method, state, FOREVER)
    return state, jax.device_get(results(method, state))


def found(result, b, r=0):
    """Completion r of prompt b."""
    return result.tokens[b, r, : result.num_tokens[b, r]].tolist()
