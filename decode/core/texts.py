"""Strings in, completions out: what `decode.generate` and `decode.complete` share."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from decode.core.loop import FOREVER
from decode.core.refill import refill, warm_up
from decode.core.requests import (
    Prompt,
    encode,
    is_single,
    prompt_buckets,
    read_requests,
    repeat_requests,
    round_lengths,
    round_rows,
    split_gaps,
    whole_number,
)
from decode.core.results import STOP_ROUNDS, Completion, cut, read_bias, read_stops, settled
from decode.core.sampling import FILTERS
from dlm.compilation import Compiling
from dlm.config import ModelConfig
from dlm.lm import LanguageModel

Item = TypeVar("Item")
GEN_LEN = 256  # tokens, unless it is said


class MethodOptions(TypedDict, total=False):
    """The keyword arguments of both that say how to decode."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop_ids: Sequence[int]
    top_logprobs: int


class TextOptions(TypedDict, total=False):
    """The keyword arguments of both that say what is asked for."""

    gen_len: int | Sequence[int]
    stop: str | Sequence[str]
    seed: int | Sequence[int]
    num_return: int
    batch_size: int | None
    progress: bool


def check_known(function: str, options: Mapping[str, Any], kind: Any) -> None:
    """Raises TypeError, as Python would, on a keyword argument that a `TypedDict` does not have."""
    if unknown := sorted(options.keys() - kind.__optional_keys__):
        close = difflib.get_close_matches(unknown[0], kind.__optional_keys__, n=1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}{hint}")


def read_sampling(lm: LanguageModel, given: MethodOptions) -> dict[str, Any]:
    """Fields of `Sampling` that were asked for; temperature 0 is its None."""
    asked: dict[str, Any] = {name: given.get(name) for name in (*FILTERS, "repetition_penalty")}
    asked["logit_bias"] = read_bias(lm, given.get("logit_bias"))
    asked = {name: value for name, value in asked.items() if value is not None}
    temperature = given.get("temperature")
    return asked if temperature is None else asked | {"temperature": temperature or None}


@dataclasses.dataclass(frozen=True)
class Loop:
    """One of the decoding loops, as texts need it.

    Attributes:
      prepare: the state before the first round, of a model, a method, prompts, `gen_len` and
        `seeds` per prompt, `prompt_len`, `canvas_len` and `batch_size`.
      decode: rounds of it, see `decode.core.loop`.
      reported: a state without what only the loop needs.
      written: of each row of a state, with its method, the tokens that are certain, and those
        behind them that may still change, MASK where nothing is decided.
      collect: completions, of a state, the model, the method, their number and stop strings.
      may_be_empty: whether a model can begin without a prompt.
      ready: the method with what has to be measured for it, of a model, the method and what makes
        the first state of a method.
    """

    prepare: Callable[..., Any]
    decode: Callable[..., Any]
    reported: Callable[[Any], Any]
    written: Callable[[Any, Any], tuple[list[np.ndarray], list[np.ndarray]]]
    collect: Callable[..., list[Completion]]
    may_be_empty: Callable[[ModelConfig], bool]
    ready: Callable[[LanguageModel, Any, Callable[[Any], Any]], Any] = lambda lm, method, start: (
        method
    )


def of_params(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """A loop's `prepare`, of one that takes parameters and a configuration instead of a model."""
    return lambda lm, method, prompts, **asked: prepare(lm.params, lm.cfg, method, prompts, **asked)


def read_one(
    lm: LanguageModel, prompt: Any, gen_len: int, seed: int, may_be_empty: bool = False
) -> tuple[list[int], int, int]:
    """One request as numbers: token ids, how many to write, and the seed.

    Raises:
      ValueError: on a prompt or numbers that make no sense.
    """
    tokens = encode(lm, prompt)
    gen_len, seed = whole_number("gen_len", gen_len), whole_number("seed", seed)
    read_requests(lm.cfg, [tokens], [gen_len], [seed], None, None, None, may_be_empty=may_be_empty)
    return tokens, gen_len, seed


def begin_one(
    lm: LanguageModel, loop: Loop, method: Any, tokens: list[int], gen_len: int, seed: int
) -> Any:
    """The state before the first round of one request alone; inside of the model's mesh."""
    P, G = round_lengths(lm.cfg, [tokens], [gen_len])
    return loop.prepare(
        lm, method, [tokens], gen_len=[gen_len], seeds=[seed], prompt_len=P, canvas_len=G,
        batch_size=round_rows(1, None),
    )  # fmt: skip


@dataclasses.dataclass
class Pace:
    """How fast it goes so far.

    Attributes:
      rounds: of the loop, each over all rows at once.
      tokens: of completions that are done.
      seconds: wall time, that of compiling aside.
      compile_s: seconds of compiling, or of reading programs from disk.
    """

    rounds: int = 0
    tokens: int = 0
    seconds: float = 0.0
    compile_s: float = 0.0

    def __str__(self) -> str:
        rate = self.tokens / self.seconds if self.seconds > 0 else 0.0
        return f"{rate:.0f} tokens/s after {self.compile_s:.1f} s of compiling"


@dataclasses.dataclass(frozen=True)
class Asked:
    """Requests of a model.

    Attributes:
      lm: who is to answer.
      prompts: token ids.
      gen_lens: most tokens to write, per prompt.
      seeds: one per prompt.
      stops: strings that end a text.
      beside: what else the loop's `prepare` takes, by name, one per prompt.
    """

    lm: LanguageModel
    prompts: list[list[int]]
    gen_lens: list[int]
    seeds: list[int]
    stops: Sequence[str] = ()
    beside: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)

    def answers(
        self,
        loop: Loop,
        method: Any,
        batch_size: int | None = None,
        progress: bool = False,
        pace: Pace | None = None,
    ) -> list[Completion]:
        """In the order of the prompts; the arguments are those of `as_finished`."""
        found = dict(self.as_finished(loop, method, batch_size, progress, pace))
        return [found[i] for i in range(len(self.prompts))]

    def as_finished(
        self,
        loop: Loop,
        method: Any,
        batch_size: int | None = None,
        progress: bool = False,
        pace: Pace | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """The number of each prompt and its completion, as they finish.

        Rows that are done make place for the next prompts, see `decode.core.refill`. Prompts of
        very different lengths are decoded one bucket of lengths after the other, the longest first.
        What is wrong with any of them is said before the first is decoded.

        Args:
          loop: which of them.
          method: how to decode.
          batch_size: rows at once; None: as many as there are prompts, up to 32.
          progress: whether to show a bar.
          pace: kept up to date.
        """
        rows = self._rows(loop, batch_size)
        found = self._decode_all(loop, method, rows, progress, pace or Pace())
        return inside(self.lm, found)

    def warm_up(self, loop: Loop, method: Any, batch_size: int | None = None) -> float:
        """Compiles what decoding them needs, and decodes nothing. The seconds of compiling.

        The arguments are those of `as_finished`.
        """
        rows = self._rows(loop, batch_size)
        with Compiling() as compiling, _mesh(self.lm):
            for bucket in prompt_buckets(self.prompts, rows):
                ready, start = self._ready(loop, method, bucket, rows)
                state = start([0], rows)
                state = loop.decode(self.lm.params, self.lm.cfg, ready, state, 0, rows)
                if len(bucket) > rows:
                    warm_up(rows, state, start, loop.reported)
        return compiling.seconds

    def _rows(self, loop: Loop, batch_size: int | None) -> int:
        """B; ValueError if anything is wrong with the requests."""
        if batch_size is not None:
            batch_size = whole_number("batch_size", batch_size)
            if batch_size < 1:
                raise ValueError(f"batch_size={batch_size} must be at least 1")
        read_requests(
            self.lm.cfg, self.prompts, self.gen_lens, self.seeds, None, None, None,
            may_be_empty=loop.may_be_empty(self.lm.cfg),
        )  # fmt: skip
        with _mesh(self.lm):
            return round_rows(len(self.prompts), batch_size)

    def _decode_all(
        self, loop: Loop, method: Any, rows: int, progress: bool, pace: Pace
    ) -> Iterator[tuple[int, Completion]]:
        """As `as_finished`."""
        began, before = time.perf_counter(), 0
        total = len(self.prompts)
        with (
            tqdm(total=total, unit="prompt", disable=not progress) as bar,
            Compiling() as compiling,
        ):
            for bucket in prompt_buckets(self.prompts, rows):
                for i, completion, rounds in self._decode(loop, method, bucket, rows):
                    pace.rounds = before + rounds
                    pace.tokens += len(completion.tokens)
                    pace.compile_s = compiling.seconds
                    pace.seconds = time.perf_counter() - began - pace.compile_s
                    bar.set_postfix_str(str(pace), refresh=False)
                    bar.update()
                    yield i, completion
                before = pace.rounds

    def _ready(
        self, loop: Loop, method: Any, bucket: list[int], rows: int
    ) -> tuple[Any, Callable[[Sequence[int], int], Any]]:
        """The method, all measured that it needs, and what makes states before the first round.

        The latter is told which requests of the bucket, and how many rows.
        """
        P, G = round_lengths(
            self.lm.cfg, [self.prompts[i] for i in bucket], [self.gen_lens[i] for i in bucket]
        )

        def begin(method: Any, chosen: Sequence[int], batch_size: int) -> Any:
            some = lambda values: [values[bucket[i]] for i in chosen]  # noqa: E731
            beside = {name: some(values) for name, values in self.beside.items()}
            return loop.prepare(
                self.lm, method, some(self.prompts), gen_len=some(self.gen_lens),
                seeds=some(self.seeds), prompt_len=P, canvas_len=G, batch_size=batch_size, **beside,
            )  # fmt: skip

        first = range(min(rows, len(bucket)))
        method = loop.ready(self.lm, method, lambda method: begin(method, first, rows))
        return method, functools.partial(begin, method)

    def _decode(
        self, loop: Loop, method: Any, bucket: list[int], rows: int
    ) -> Iterator[tuple[int, Completion, int]]:
        """Completions of a bucket, with the rounds that it took so far."""
        lm = self.lm
        method, start = self._ready(loop, method, bucket, rows)

        def run(state: Any, max_done: int) -> Any:
            rounds = STOP_ROUNDS if self.stops else FOREVER
            state = loop.decode(lm.params, lm.cfg, method, state, rounds, max_done)
            if self.stops:
                certain, _ = loop.written(state, method)
                has_stop = np.array([self._has_stop(row) for row in certain])
                state = state.replace(has_stopped=state.has_stopped | jnp.asarray(has_stop))
            return state

        if len(bucket) <= rows:
            state = start(range(len(bucket)), rows)
            while not np.asarray(state.has_stopped).all():
                state = run(state, rows)
            groups: Any = [(range(len(bucket)), loop.reported(state))]
        else:
            groups = refill(len(bucket), rows, start, run, loop.reported)
        for finished, state in groups:
            found = loop.collect(state, lm, method, num=len(finished), stops=self.stops)
            for i, completion in zip(finished, found, strict=True):
                yield bucket[i], completion, int(state.num_steps)

    def _has_stop(self, tokens: np.ndarray) -> bool:
        assert self.lm.tokenizer is not None
        text = settled(self.lm.tokenizer, tokens.tolist())
        return cut(text, self.stops) < len(text)


def read_asked(
    lm: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    options: TextOptions,
    infill: bool = False,
) -> Asked:
    """What is asked for, in the words of `generate` and `complete`, one request or many.

    With `infill`, MASK tokens inside of prompts are decided too.

    Raises:
      ValueError: on prompts, lengths or options that make no sense, in one sentence.
      TypeError: if `prompts` is neither text nor token ids.
    """
    stops = read_stops(lm, options.get("stop", ()))
    every: Any = [prompts] if is_single(prompts) else prompts
    encoded = [encode(lm, prompt) for prompt in every]
    gen_len = options.get("gen_len", GEN_LEN)
    num_return = whole_number("num_return", options.get("num_return", 1))
    beside: dict[str, list[Any]] = {}
    if not isinstance(infill, bool):
        raise ValueError(f"infill={infill!r} must be True or False")
    if infill:
        if stops:
            raise ValueError("infill=True has no stop strings: they may stand in what is given")
        encoded, bodies, gen_len = split_gaps(lm.cfg, encoded, gen_len)
        beside["given"] = [body for body in bodies for _ in range(num_return)]
    requests = repeat_requests(encoded, gen_len, options.get("seed", 0), num_return)
    return Asked(lm, *requests, stops, beside)


def gather(
    prompts: Prompt | Sequence[Prompt], found: Iterator[tuple[int, Completion]]
) -> Completion | list[Completion]:
    """The answers in the order of the prompts; the answer, if there was one prompt."""
    answers = dict(found)
    return answers[0] if is_single(prompts) else [answers[i] for i in range(len(answers))]


def gather_samples(
    found: Iterator[tuple[int, Completion]], num_return: int
) -> Iterator[tuple[int, Completion]]:
    """One completion per request, of `num_return` each, when the last of them is there."""
    waiting: dict[int, dict[int, Completion]] = collections.defaultdict(dict)
    for i, completion in found:
        request, sample = divmod(i, num_return)
        waiting[request][sample] = completion
        if len(waiting[request]) == num_return:
            samples = waiting.pop(request)
            first, *others = (samples[j] for j in range(num_return))
            yield request, dataclasses.replace(first, others=tuple(others))


def _mesh(lm: LanguageModel) -> contextlib.AbstractContextManager[object]:
    """In which a model computes."""
    return contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh)


def inside(lm: LanguageModel, found: Iterator[Item]) -> Iterator[Item]:
    """What an iterator gives that computes in the mesh of a model; who takes it does not."""
    while True:
        with _mesh(lm):
            try:
                item = next(found)
            except StopIteration:
                return
        yield item
