"""Searches beside those of transformers: the same weights, prompts and beams, in turns.

    python -m scripts.bench search --methods=beam_4 --pythons=path/of/transformers-5/bin/python
    python -m scripts.bench search --methods=beam_4,diverse_beam_6,contrastive \\
        --pythons=path/of/transformers-5/bin/python,path/of/transformers-4.49/bin/python

Every interpreter of `--pythons` must have torch and transformers, and decodes what its version has:
diverse beams and contrastive search are in 4.49, and in 5 no more. Prompts are those of `--prompts`
or `--task`, else passages (see `scripts.bench.refill`), each at batch 1. Columns:

    tokens_per_s   of the best text, reading the prompt included; medians of `--repeats` per prompt
    over           our tokens_per_s over theirs, with a 95 % interval over prompts (bootstrap)
    same_text      prompts whose text is ours, token for token
    forwards       per prompt; theirs include the one that reads it
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import dlm
from decode.evaluation.run import Programs, device, timed
from decode.evaluation.statistics import bootstrap_total
from decode.search.components import METHODS
from decode.search.loop import SearchMethod
from decode.search.strategies.beam import Beam
from decode.search.strategies.contrastive import Contrastive
from decode.search.strategies.diverse_beam import DiverseBeam
from dlm.lm import LanguageModel
from scripts.compare_hf.decoders import Decoder, Tally

COLUMNS = ["method", "library", "tokens_per_s", "over", "interval", "same_text", "forwards"]
OURS = "ours"
SERVE = "from scripts.bench.their_searches import serve; serve()"
EARLY = {"first": True, "now": False}  # their `early_stopping`, by `Beam.ends`


def methods_of(names: Sequence[str]) -> dict[str, SearchMethod]:
    """Searches by name.

    Raises:
      ValueError: there is no such search.
    """
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"there is no search {unknown[0]!r}; there are {', '.join(METHODS)}")
    return {name: METHODS[name] for name in names}


def counterpart(method: SearchMethod) -> tuple[str, dict[str, Any]] | None:
    """What is the same search in transformers: a function and its options; None: nothing is."""
    strategy = method.strategy
    if isinstance(strategy, Contrastive):
        options = {"penalty_alpha": float(strategy.alpha), "top_k": strategy.k}
        return "_contrastive_search", options
    beam = strategy.group if isinstance(strategy, DiverseBeam) else strategy
    if not isinstance(beam, Beam) or beam.ends not in EARLY:
        return None
    if float(beam.length_offset) or int(beam.min_len):
        return None
    options = {
        "num_beams": strategy.width,
        "length_penalty": float(beam.length_penalty),
        "early_stopping": EARLY[beam.ends],
    }
    if not isinstance(strategy, DiverseBeam):
        return "_beam_search", options
    options |= {
        "num_beam_groups": strategy.num_groups,
        "diversity_penalty": float(strategy.diversity),
    }
    return "_group_beam_search", options


class Theirs:
    """Transformers in a process of another interpreter.

    Attributes:
      name: such as "transformers 5.24.0".
      has: which functions of `counterpart` it has.
    """

    def __init__(self, python: str, folder: pathlib.Path) -> None:
        """Starts it; it reads the checkpoint in a folder.

        Raises:
          OSError: there is no such interpreter.
          ValueError: it has no transformers, or cannot read the checkpoint.
        """
        self._python = python
        self._process = subprocess.Popen(
            [python, "-c", SERVE, str(folder)], cwd=pathlib.Path(__file__).parents[2], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        said = self._hear()
        self.name, self.has = f"transformers {said['version']}", said["has"]

    def decode(self, **asked: Any) -> tuple[list[int], int, float]:
        """Tokens, forwards and seconds of a prompt."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        said = self._hear()
        return said["tokens"], said["forwards"], said["seconds"]

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise ValueError(
                f"{self._python} ended with code {code}: what it says above is why; it must have "
                "torch and transformers"
            )
        said: dict[str, Any] = json.loads(line)
        return said


def ours(lm: LanguageModel, method: SearchMethod, gen_len: int, prompt_len: int) -> Decoder:
    """A search of this library."""
    programs: Programs = {}

    def run(prompt: list[int]) -> tuple[list[int], int, float]:
        done = timed(
            lm, method, [prompt], gen_len=gen_len, prompt_len=prompt_len, programs=programs
        )
        (found,) = done.completions
        return found.canvas.tolist(), found.num_forwards, done.prepare_s + done.seconds

    return run


def bench_search(
    lm: LanguageModel,
    methods: Mapping[str, SearchMethod],
    prompts: Sequence[list[int]],
    gen_len: int,
    repeats: int,
    pythons: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """A result per method and library.

    Args:
      lm: an autoregressive model.
      methods: searches by name.
      prompts: token ids.
      gen_len: most tokens of a text.
      repeats: timed runs of each.
      pythons: interpreters with transformers.

    Raises:
      OSError, ValueError: see `Theirs`.
    """
    others: list[Theirs] = []
    with tempfile.TemporaryDirectory() as folder:
        dlm.save(pathlib.Path(folder) / "model", lm)
        try:
            for python in pythons:
                others.append(Theirs(python, pathlib.Path(folder) / "model"))
            for name, method in methods.items():
                decoders = {OURS: ours(lm, method, gen_len, max(map(len, prompts)))}
                decoders |= dict(_of_others(lm, method, gen_len, others))
                tallies = in_turn(decoders, prompts, repeats)
                yield from (_result(lm, name, gen_len, repeats, x, tallies) for x in tallies)
        finally:
            for other in others:
                other.stop()


def _of_others(
    lm: LanguageModel, method: SearchMethod, gen_len: int, others: Sequence[Theirs]
) -> Iterator[tuple[str, Decoder]]:
    """Decoders of those that have the same search, by name."""
    same = counterpart(method)
    if same is None:
        return
    function, options = same
    options |= {
        "max_new_tokens": gen_len,
        "eos_token_id": list(lm.cfg.eos_ids),
        "pad_token_id": lm.cfg.pad_token_id,
    }

    def decoder(other: Theirs) -> Decoder:
        return lambda prompt: other.decode(prompt=prompt, options=options, dtype=lm.cfg.dtype)

    for other in others:
        if function in other.has:
            yield other.name, decoder(other)


def in_turn(
    decoders: Mapping[str, Callable[[list[int]], tuple[list[int], int, float]]],
    prompts: Sequence[list[int]],
    repeats: int,
) -> dict[str, Tally]:
    """Every prompt decoded by everyone, as often as asked for, before the next one is."""
    for run in decoders.values():
        run(prompts[0])  # compiles, or warms up
    tallies = {name: Tally() for name in decoders}
    for prompt in tqdm(prompts, unit="prompt"):
        seconds: dict[str, list[float]] = {name: [] for name in decoders}
        for repeat in range(repeats):
            for name, run in decoders.items():
                tokens, forwards, elapsed = run(prompt)
                seconds[name].append(elapsed)
                if not repeat:
                    tallies[name].texts.append(tokens)
                    tallies[name].forwards.append(forwards)
        for name, tally in tallies.items():
            tally.seconds.append(float(np.median(seconds[name])))
    return tallies


def _result(
    lm: LanguageModel, method: str, gen_len: int, repeats: int, library: str,
    tallies: Mapping[str, Tally],
) -> dict[str, Any]:  # fmt: skip
    mine, their = tallies[OURS], tallies[library]
    both = np.array(
        [
            [len(a), mine_s, len(b), their_s]
            for a, mine_s, b, their_s in zip(
                mine.texts, mine.seconds, their.texts, their.seconds, strict=True
            )
        ]
    )

    def over(total: np.ndarray) -> float:
        return float(total[0] / total[1] / (total[2] / total[3]))

    total, interval = both.sum(axis=0), bootstrap_total(both, over)
    same = sum(a == b for a, b in zip(mine.texts, their.texts, strict=True))
    return {
        "case": "search", "device": device(), "jax": jax.__version__, "dtype": lm.cfg.dtype,
        "gen_len": gen_len, "repeats": repeats, "method": method, "library": library,
        "tokens_per_s": round(float(total[2] / total[3]), 2), "over": round(over(total), 2),
        "interval": "{:.2f} to {:.2f}".format(*interval),
        "same_text": f"{same}/{len(both)}", "forwards": round(float(np.mean(their.forwards)), 1),
    }  # fmt: skip
