"""Rounds as they were recorded, put through the loop: what it decides, without a model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from decode.diffusion.loop import init_state
from decode.diffusion.round import Round
from decode.diffusion.step import apply, make_frame
from kernels_pallas.unembed_stats import VocabStats


@functools.partial(jax.jit, static_argnames="cfg")
def _decide(cfg, method, state, proposal, log_prob):
    """The round in which the model proposes `proposal` [B, S] with `log_prob` [B, S], applied."""
    frame = make_frame(cfg, method, state)
    here = jnp.minimum(state.prompt_len + frame.index, proposal.shape[1] - 1)
    token, sure = (jnp.take_along_axis(x, here, axis=1) for x in (proposal, log_prob))
    none = jnp.zeros_like(sure)
    stats = VocabStats(token, sure, jnp.log1p(-jnp.exp(sure)), none, none)
    round = Round(**vars(frame), proposal=token, log_prob=sure, confidence=sure, stats=stats)
    return apply(cfg, method, state, round, ~state.has_stopped)


def replay(cfg, method, prompt, gen_len, calls):
    """The state after every recorded round.

    Args:
      cfg: a model's; only its token ids and sizes count.
      method: how to decode.
      prompt: token ids.
      gen_len: completion length.
      calls: per round, where its block starts in the text, what stands in it [C], what the model
        proposes there [C], and with which probability [C].

    Raises:
      AssertionError: the loop has something else there before a round, or is done.
    """
    state = init_state(cfg, method, [list(prompt)], gen_len=gen_len)
    S = len(prompt) + gen_len
    for start, tokens, proposal, prob in calls:
        assert not state.has_stopped[0]
        stop = min(start + len(tokens), S)
        block = max(start, len(prompt)), stop
        assert (int(state.block_start[0]), int(state.block_end[0])) == block
        there = np.asarray(state.tokens)[0, start:stop]
        np.testing.assert_array_equal(there, tokens[: stop - start])
        said, sure = np.zeros((1, S), np.int32), np.zeros((1, S), np.float32)
        said[0, start:stop] = proposal[: stop - start]
        with np.errstate(divide="ignore"):
            sure[0, start:stop] = np.log(np.asarray(prob, np.float32))[: stop - start]
        state = _decide(cfg, method, state, said, sure)
    return state
