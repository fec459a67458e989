"""Running a method on prompts and knowing how long it takes: one way for all loops.

done = answered(lm, method, prompts, gen_len=256, batch_size=32)  # any number, rows kept busy
done.completions, done.seconds, done.compile_s

`timed` decodes one batch, and leaves its state to be looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
from collections.abc import Hashable, Sequence

import jax

from decode import complete, generate
from decode.core.requests import per_prompt, per_prompt_seeds
from decode.core.results import Completion
from decode.core.texts import Asked, Loop, Pace
from decode.diffusion.loop import DiffusionMethod, DiffusionState
from decode.search.loop import SearchMethod, SearchState
from decode.speculative.loop import SpeculativeMethod, SpeculativeState
from dlm.lm import LanguageModel

Method = DiffusionMethod | SpeculativeMethod | SearchMethod
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
    state: DiffusionState | SpeculativeState | SearchState
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
        loop = _loop_of(method)
        if not isinstance(loop.decode, jax.stages.Wrapped):
            raise ValueError(
                f"method={type(method).__name__} must be one program to be timed as one: use "
                "`answered`, which times rounds"
            )
        state = loop.prepare(
            lm, method, prompts, gen_len=gen_len, seeds=seeds, prompt_len=prompt_len,
            batch_size=batch_size,
        )  # fmt: skip
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
    state = loop.reported(state)
    completions = loop.collect(state, lm, method, num=len(prompts))
    return Timed(completions, state, prepare_s, seconds, compile_s)


@dataclasses.dataclass(frozen=True)
class Answered:
    """Any number of prompts, decoded.

    Attributes:
      completions: in the order of the prompts.
      rounds: of the loop, each over all rows at once.
      seconds: wall time of reading prompts, of rounds, and of replacing rows that are done.
      compile_s: of compiling; 0 where earlier prompts needed the same programs.
    """

    completions: list[Completion]
    rounds: int
    seconds: float
    compile_s: float


def answered(
    lm: LanguageModel,
    method: Method,
    prompts: Sequence[Sequence[int]],
    *,
    gen_len: int | Sequence[int],
    seeds: int | Sequence[int] = 0,
    batch_size: int | None = None,
) -> Answered:
    """Decodes prompts in a batch that stays full, see `decode.core.refill`.

    Args:
      lm, method, prompts, gen_len, seeds: as `timed` takes them.
      batch_size: rows at once; None: as many as there are prompts, up to 32.

    Raises:
      ValueError: as `timed`.
    """
    num = len(prompts)
    asked = Asked(
        lm,
        [list(prompt) for prompt in prompts],
        per_prompt("gen_len", gen_len, num),
        per_prompt_seeds(seeds, num),
    )
    loop = _loop_of(method)
    pace = Pace()
    compile_s = asked.warm_up(loop, method, batch_size)
    completions = asked.answers(loop, method, batch_size, pace=pace)
    return Answered(completions, pace.rounds, pace.seconds, compile_s)


def _loop_of(method: Method) -> Loop:
    return generate.LOOP if isinstance(method, DiffusionMethod) else complete.loop_of(method)


def device() -> str:
    """What this process computes on, for tables."""
    return f"{jax.devices()[0].device_kind} ({platform.machine()})"
