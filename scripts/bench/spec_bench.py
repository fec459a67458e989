"""What drafters do for real prompts, by category: acceptance, speed, and whether texts stay.

Every prompt is decoded greedily, at batch 1, by each method in turn, as often as asked for; then
comes the next prompt. Decoders of other libraries take part in the same turns.
`scripts.bench.spec_report` says what is reported. A run that is interrupted goes on behind the
prompts that its log has, if they were measured with the same methods, weights, versions and device.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import dlm
from decode.complete import complete
from decode.core.loop import FOREVER
from decode.core.results import Completion
from decode.evaluation.lossless import Parting, first_parting
from decode.evaluation.record import Record
from decode.evaluation.run import device
from decode.files import describe
from decode.speculative.answers import collect
from decode.speculative.controller import Controller
from decode.speculative.costs import with_costs
from decode.speculative.loop import SpeculativeMethod, SpeculativeState, decode, init_state, prefill
from decode.speculative.points import named
from scripts.compare_hf.decoders import Decoder

PLAIN, CONTROLLED = "plain", ", controlled"
SHORTEST = 256  # prompts are padded to a power of two, at least this: fewer programs are compiled


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt, by its number within its category."""

    category: str
    number: int
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One method on one prompt.

    Attributes:
      method: its name.
      category: of the prompt.
      prompt: its number within the category.
      seconds: of decoding, per repeat; of other libraries with the prompt.
      prefill_s: of reading the prompt; None: in `seconds`.
      took_s: seconds of all repeats, compiling included.
      num_tokens: that were written.
      num_forwards: of the target.
      parting: where the text leaves plain decoding's.
      rounds_by_width: what the controller has chosen; None without one.
    """

    method: str
    category: str
    prompt: int
    seconds: list[float]
    prefill_s: float | None
    took_s: float
    num_tokens: int
    num_forwards: int
    parting: Parting | None
    rounds_by_width: dict[int, int] | None


def methods_of(names: list[str], controllers: list[str]) -> dict[str, SpeculativeMethod]:
    """Plain decoding, and each drafter as `both` has it.

    Raises:
      ValueError: there is no such drafter.
    """
    methods = {PLAIN: named(PLAIN)}
    for name in names:
        methods |= both(name, named(name), controllers)
    return methods


def both(
    name: str, method: SpeculativeMethod, controllers: list[str]
) -> dict[str, SpeculativeMethod]:
    """A method without ("off") a controller and with one ("on"), as far as it is asked for.

    Raises:
      ValueError: it is asked for neither way.
    """
    if not controllers or set(controllers) - {"on", "off"}:
        raise ValueError(f"controller={controllers} must be of on and off")
    ways = {
        "off": (name, method),
        "on": (name + CONTROLLED, method.replace(controller=Controller())),
    }
    return dict(ways[way] for way in controllers)


def measure(
    lm: dlm.LanguageModel,
    methods: Mapping[str, SpeculativeMethod],
    prompts: Mapping[str, list[list[int]]],
    gen_len: int,
    repeats: int,
    others: Mapping[str, Decoder],
    log: str | os.PathLike[str] | None = None,
) -> Iterator[Measured]:
    """Every method, and every decoder of `others`, on every prompt, short prompts first.

    Programs are kept for prompts that are padded to the same length: those of all methods and
    lengths would have more parts than Linux maps for a process (vm.max_map_count).

    Args:
      lm: the target.
      methods: by name; plain decoding must be among them.
      prompts: token ids, by category.
      gen_len: most tokens to write.
      repeats: timed runs of each.
      others: decoders of other libraries, by name.
      log: JSON lines, see `decode.evaluation.record`; each prompt is added when all methods are
        done with it. None: nothing is kept.

    Raises:
      ValueError: a line of the log is broken, or another process writes it.
    """
    same = {
        "checkpoint": dlm.fingerprint(lm),
        "dtype": lm.cfg.dtype,
        "methods": {name: describe(method) for name, method in methods.items()},
        "others": list(others),
        "gen_len": gen_len,
        "repeats": repeats,
        "device": device(),
        "jax": jax.__version__,
    }
    asked = [Asked(c, i, prompt) for c, some in prompts.items() for i, prompt in enumerate(some)]
    asked.sort(key=_padded_len)
    record, warm = Record(log), set[tuple[str, int]]()
    with record.adding() as add:
        for one in tqdm(asked, unit="prompt"):
            settings = json.dumps(same | dataclasses.asdict(one))
            key = hashlib.sha256(settings.encode()).hexdigest()
            if key not in record.found:
                found = _of_prompt(lm, methods, one, gen_len, repeats, others, warm)
                add(key, {"measured": [dataclasses.asdict(m) for m in found]})
            yield from map(_from_log, record.found[key]["measured"])


def _from_log(said: dict[str, Any]) -> Measured:
    parting, widths = said["parting"], said["rounds_by_width"]
    read = {
        "parting": parting and Parting(**parting),
        "rounds_by_width": widths and {int(width): n for width, n in widths.items()},
    }
    return Measured(**said | read)


def _of_prompt(
    lm: dlm.LanguageModel, methods: Mapping[str, SpeculativeMethod], asked: Asked, gen_len: int,
    repeats: int, others: Mapping[str, Decoder], warm: set[tuple[str, int]],
) -> list[Measured]:  # fmt: skip
    """What `measure` finds with one prompt; `warm` gets what was compiled."""
    if not warm:
        for run in others.values():
            run(asked.tokens)
    P = _padded_len(asked)
    if any(padded != P for _, padded in warm):
        jax.clear_caches()
        warm.clear()
    ready, prefill_s, took_s = {}, {}, {}
    for name, method in methods.items():
        begun = time.perf_counter()
        start = functools.partial(_start, lm, prompt=asked.tokens, prompt_len=P, gen_len=gen_len)
        method = with_costs(lm.params, lm.cfg, method, start)
        if (name, P) not in warm:  # compiles
            jax.block_until_ready(decode(lm.params, lm.cfg, method, start(method), 1, FOREVER))
            warm.add((name, P))
        began = time.perf_counter()
        ready[name] = method, jax.block_until_ready(start(method))
        ended = time.perf_counter()
        prefill_s[name], took_s[name] = ended - began, ended - begun
    seconds: dict[str, list[float]] = {name: [] for name in (*methods, *others)}
    texts: dict[str, Completion] = {}
    found: dict[str, tuple[np.ndarray, int]] = {}
    for _ in range(repeats):
        for name, (method, first) in ready.items():
            state = jax.block_until_ready(jax.tree.map(jnp.copy, first))
            began = time.perf_counter()
            state = decode(lm.params, lm.cfg, method, state, FOREVER, FOREVER)
            jax.block_until_ready(state)
            seconds[name].append(time.perf_counter() - began)
            (texts[name],) = collect(state, lm, method)
            found[name] = texts[name].canvas, texts[name].num_forwards
        for name, run in others.items():
            tokens, forwards, elapsed = run(asked.tokens)
            seconds[name].append(elapsed)
            found[name] = np.array(tokens), forwards
    plain = texts[PLAIN]
    if any(not np.array_equal(canvas, plain.canvas) for canvas, _ in found.values()):
        plain = complete(lm, asked.tokens, gen_len=gen_len, top_logprobs=2)
    return [
        Measured(
            name, asked.category, asked.number, seconds[name], prefill_s.get(name),
            took_s.get(name, 0.0) + sum(seconds[name]), len(canvas), forwards,
            None if np.array_equal(canvas, plain.canvas) else first_parting(plain, canvas),
            texts[name].rounds_by_width if name in texts else None,
        )
        for name, (canvas, forwards) in found.items()
    ]  # fmt: skip


def _padded_len(asked: Asked) -> int:
    return max(SHORTEST, 1 << (len(asked.tokens) - 1).bit_length())


def _start(
    lm: dlm.LanguageModel,
    method: SpeculativeMethod,
    prompt: list[int],
    prompt_len: int,
    gen_len: int,
) -> SpeculativeState:
    state = init_state(lm.cfg, method, [prompt], gen_len=gen_len, prompt_len=prompt_len)
    return prefill(lm.params, lm.cfg, method, state)
