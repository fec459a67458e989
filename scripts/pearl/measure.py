"""What a round of PEARL takes on this device, and what that comes to where there are two."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from decode.speculative import pearl
from decode.speculative.loop import SpeculativeMethod, decode, init_state, prefill
from decode.speculative.pearl import Pearl
from dlm.lm import LanguageModel


def seconds_of(call: Callable[[Any], Any], fresh: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, whose argument may be given away; the first is for compiling."""
    times = []
    for _ in range(repeats + 1):
        given = jax.block_until_ready(fresh())
        began = time.perf_counter()
        jax.block_until_ready(call(given))
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


def measure(
    lm: LanguageModel, method: Pearl, prompt: Sequence[int], gen_len: int, repeats: int
) -> dict[str, Any]:
    """Numbers of one greedy text, as plain Python.

    Args:
      lm: the target.
      method: with a draft model, on this device: what is drafted and judged takes turns here.
      prompt: token ids.
      gen_len: most tokens to write.
      repeats: of every measurement; the median counts.

    Returns:
      "seconds" of the programs of a round ("draft", "judge", "settle", "follow"), of a round of
      plain decoding ("plain") and of draft and verify ("chain"); "tokens" that were written in each
      round of PEARL; "rounds" of "plain" and "chain"; "total": seconds of the text by each, PEARL's
      on "one_device" (the sum of its programs) and on "two_devices" (drafting beside judging).
    """
    params, cfg = lm.params, lm.cfg
    asked: dict[str, Any] = dict(prompts=[prompt], gen_len=gen_len)
    begin = lambda: pearl.prepare(params, cfg, method, **asked)  # noqa: E731
    state, tokens, length = begin(), [], len(prompt)
    while not bool(state.has_stopped.all()):
        state = pearl.step(params, cfg, method, state)
        tokens.append(int(state.length[0]) - length)
        length += tokens[-1]

    target, side = method.at_target, begin().drafter
    of_draft = (cfg, method.drafter, method.sampling, side.replace(memory=None))
    said, _ = pearl.judge(params, cfg, target, _rest(begin()), begin().cache)
    drafts, cost, _ = pearl.draft(*of_draft, begin().drafter.memory)
    _, outcome = pearl.settle(cfg, target, _rest(begin()), *said, drafts, cost)
    seconds = {
        "draft": seconds_of(
            lambda memory: pearl.draft(*of_draft, memory), lambda: begin().drafter.memory, repeats
        ),
        "judge": seconds_of(
            lambda state: pearl.judge(params, cfg, target, _rest(state), state.cache),
            begin, repeats,
        ),
        "settle": seconds_of(
            lambda state: pearl.settle(cfg, target, state, *said, drafts, cost),
            lambda: _rest(begin()), repeats,
        ),
        "follow": seconds_of(
            lambda memory: pearl.follow(*of_draft, memory, drafts, outcome),
            lambda: begin().drafter.memory, repeats,
        ),
    }  # fmt: skip
    rounds = {}
    for name, other in (
        ("plain", SpeculativeMethod()),
        ("chain", SpeculativeMethod(method.drafter)),
    ):
        start = lambda other=other: prefill(  # noqa: E731
            params, cfg, other, init_state(cfg, other, **asked)
        )
        run = lambda state, other=other: decode(params, cfg, other, state)  # noqa: E731
        rounds[name] = int(run(start()).num_forwards[0])
        seconds[name] = seconds_of(run, start, repeats) / rounds[name]
    between = seconds["settle"] + seconds["follow"]
    at_once = max(seconds["draft"], seconds["judge"])
    return {
        "seconds": seconds,
        "tokens": tokens,
        "rounds": rounds,
        "total": {
            **{name: num * seconds[name] for name, num in rounds.items()},
            "one_device": len(tokens) * (seconds["draft"] + seconds["judge"] + between),
            "two_devices": len(tokens) * (at_once + between),
        },
    }


def _rest(state: pearl.PearlState) -> pearl.PearlState:
    """What the target's programs read beside the cache."""
    rest: pearl.PearlState = state.replace(drafter=None, cache=None)
    return rest
