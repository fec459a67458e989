"""Running a method on prompts and knowing how long it takes: one way for both loops.

programs: Programs = {}  # methods of one structure share a compilation
for batch in batches(lm, method, prompts, gen_len=256, batch_size=32, programs=programs):
    batch.completions, batch.seconds, batch.compile_s
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax

from decode import complete, generate
from decode.core.results import Completion
from decode.diffusion import loop as diffusion
from decode.diffusion.loop import DiffusionMethod, DiffusionState
from decode.speculative import loop as speculative
from decode.speculative.loop import SpeculativeMethod, SpeculativeState
from dlm.lm import LanguageModel

Method = DiffusionMethod | SpeculativeMethod
Programs = dict[Hashable, tuple[jax.stages.Compiled, float]]  # with its seconds of compiling


@dataclasses.dataclass(frozen=True)
class Timed:
    """One batch, decoded.

    Attributes:
      completions: of the prompts, in their order.
      state: as the loop left it, on the device; without its cache and what a drafter kept, whose
        memory the next batch needs.
      prepare_s: seconds to make the first state, and to read the prompts where that is a program of
        its own (draft and verify). The first call of these shapes compiles that program, too.
      seconds: of the loop alone.
      compile_s: of compiling the loop, maybe for an earlier batch.
    """

    completions: list[Completion]
    state: DiffusionState | SpeculativeState
    prepare_s: float
    seconds: float
    compile_s: float


def timed(
    lm: LanguageModel,
    method: Method,
    prompts: Sequence[Sequence[int]],
    *,
    gen_len: int | Sequence[int],
    seeds: int | Sequence[int] = 0,
    prompt_len: int | None = None,
    batch_size: int | None = None,
    programs: Programs | None = None,
) -> Timed:
    """Decodes one batch; compiles unless `programs` has what it needs.

    Args:
      lm: the model, or the target.
      method: how to decode.
      prompts: token ids per row, of any lengths.
      gen_len: completion length, one for all rows or one per row.
      seeds: random seed, one for all rows (row i then uses seed + i) or one per row.
      prompt_len: at least the longest prompt; default: just that.
      batch_size: at least the number of prompts; the rows added are done from the start.
      programs: compiled by earlier calls; added to. None: nothing is kept.

    Raises:
      ValueError: on prompts or lengths the model does not allow, or a method that makes no sense.
    """
    programs = {} if programs is None else programs
    with contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh):
        began = time.perf_counter()
        loop: Any = speculative if isinstance(method, SpeculativeMethod) else diffusion
        state = loop.init_state(
            lm.cfg, method, prompts, gen_len=gen_len, seeds=seeds, prompt_len=prompt_len,
            batch_size=batch_size,
        )  # fmt: skip
        if isinstance(method, SpeculativeMethod):
            state = speculative.prefill(lm.params, lm.cfg, method, state)
        jax.block_until_ready(state)
        prepare_s = time.perf_counter() - began

        leaves, structure = jax.tree.flatten((lm.params, method, state))
        key = lm.cfg, lm.mesh, structure, tuple(map(jax.typeof, leaves))
        if key not in programs:
            began = time.perf_counter()
            compiled = loop.decode.lower(lm.params, lm.cfg, method, state).compile()
            programs[key] = compiled, time.perf_counter() - began
        compiled, compile_s = programs[key]

        began = time.perf_counter()
        state = jax.block_until_ready(compiled(lm.params, method, state))
        seconds = time.perf_counter() - began
    if isinstance(method, SpeculativeMethod):
        state = state.replace(cache=None, drafter=None)
        completions = complete.collect(state, lm, method, num=len(prompts))
    else:
        state = state.replace(cache=None)
        completions = generate.collect(state, lm, method, num=len(prompts))
    return Timed(completions, state, prepare_s, seconds, compile_s)


def batches(
    lm: LanguageModel,
    method: Method,
    prompts: Sequence[Sequence[int]],
    *,
    gen_len: int,
    batch_size: int,
    programs: Programs | None = None,
) -> Iterator[Timed]:
    """Decodes any number of prompts, so many at a time, all of them with one program.

    Prompt i has the seed i, so that its answer does not depend on `batch_size`.

    Args:
      lm, method, prompts, gen_len, programs: as `timed` takes them.
      batch_size: rows at once; the last batch is filled with rows that are done.

    Raises:
      ValueError: as `timed`.
    """
    programs = {} if programs is None else programs
    longest = max(map(len, prompts))
    for first in range(0, len(prompts), batch_size):
        yield timed(
            lm, method, prompts[first : first + batch_size], gen_len=gen_len, seeds=first,
            prompt_len=longest, batch_size=batch_size, programs=programs,
        )  # fmt: skip


def device() -> str:
    """What this process computes on, for tables."""
    return f"{jax.devices()[0].device_kind} ({platform.machine()})"
