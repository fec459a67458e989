"""Strings in, completions out: what `decode.generate` and `decode.complete` share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from decode.core.loop import FOREVER
from decode.core.refill import refill
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
)
from decode.core.results import (
    STOP_ROUNDS,
    Completion,
    cut,
    gather_samples,
    read_bias,
    read_stops,
)
from decode.core.sampling import Sampling
from dlm.config import ModelConfig
from dlm.lm import LanguageModel


class MethodOptions(TypedDict, total=False):
    """The keyword arguments of both that say how to decode."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
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


def read_sampling(lm: LanguageModel, given: MethodOptions, temperature: float | None) -> Sampling:
    """The temperature and filters that were asked for."""
    return Sampling(
        temperature, given.get("top_k"), given.get("top_p"), given.get("min_p"),
        given.get("repetition_penalty"), read_bias(lm, given.get("logit_bias")),
    )  # fmt: skip


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
    decode: jax.stages.Wrapped
    reported: Callable[[Any], Any]
    written: Callable[[Any, Any], tuple[list[np.ndarray], list[np.ndarray]]]
    collect: Callable[..., list[Completion]]
    may_be_empty: Callable[[ModelConfig], bool]
    ready: Callable[[LanguageModel, Any, Callable[[Any], Any]], Any] = lambda lm, method, start: (
        method
    )


@dataclasses.dataclass(frozen=True)
class Asked:
    """Requests of a model.

    Attributes:
      lm: who is to answer.
      prompts: token ids.
      gen_lens: most tokens to write, per prompt.
      seeds: one per prompt.
      stops: strings that end a text.
      given: per prompt, what stands at its first completion positions, see `split_gaps`; None:
        nothing.
    """

    lm: LanguageModel
    prompts: list[list[int]]
    gen_lens: list[int]
    seeds: list[int]
    stops: Sequence[str] = ()
    given: list[list[int]] | None = None

    def answers(
        self, loop: Loop, method: Any, batch_size: int | None, progress: bool
    ) -> list[Completion]:
        """In the order of the prompts; the arguments are those of `as_finished`."""
        found = dict(self.as_finished(loop, method, batch_size, progress))
        return [found[i] for i in range(len(self.prompts))]

    def as_finished(
        self, loop: Loop, method: Any, batch_size: int | None = None, progress: bool = False
    ) -> Iterator[tuple[int, Completion]]:
        """The number of each prompt and its completion, as they finish.

        Rows that are done make place for the next prompts, see `decode.core.refill`. Prompts of
        very different lengths are decoded one bucket of lengths after the other, the longest first.

        Args:
          loop: which of them.
          method: how to decode.
          batch_size: rows at once; None: as many as there are prompts, up to 32.
          progress: whether to show a bar.
        """
        lm, num = self.lm, len(self.prompts)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        mesh = contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh)
        with mesh, tqdm(total=num, unit="prompt", disable=not progress) as bar:
            read_requests(  # what is wrong with any of them is said before the first is decoded
                lm.cfg, self.prompts, self.gen_lens, self.seeds, None, None, None,
                may_be_empty=loop.may_be_empty(lm.cfg),
            )  # fmt: skip
            rows = round_rows(num, batch_size)
            for bucket in prompt_buckets(self.prompts, rows):
                for i, completion in self._decode(loop, method, bucket, rows):
                    bar.update()
                    yield i, completion

    def _decode(
        self, loop: Loop, method: Any, bucket: list[int], rows: int
    ) -> Iterator[tuple[int, Completion]]:
        lm = self.lm
        P, G = round_lengths(
            lm.cfg, [self.prompts[i] for i in bucket], [self.gen_lens[i] for i in bucket]
        )

        def begin(method: Any, chosen: Sequence[int], batch_size: int) -> Any:
            some = lambda values: [values[bucket[i]] for i in chosen]  # noqa: E731
            gaps = {} if self.given is None else {"given": some(self.given)}
            return loop.prepare(
                lm, method, some(self.prompts), gen_len=some(self.gen_lens),
                seeds=some(self.seeds), prompt_len=P, canvas_len=G, batch_size=batch_size, **gaps,
            )  # fmt: skip

        first = range(min(rows, len(bucket)))
        method = loop.ready(lm, method, lambda method: begin(method, first, rows))
        start = functools.partial(begin, method)

        def run(state: Any, max_done: int) -> Any:
            rounds = STOP_ROUNDS if self.stops else FOREVER
            state = loop.decode(lm.params, lm.cfg, method, state, rounds, max_done)
            if self.stops:
                certain, _ = loop.written(state, method)
                has_stop = np.array([self._has_stop(row) for row in certain])
                state = state.replace(has_stopped=state.has_stopped | jnp.asarray(has_stop))
            return state

        if len(bucket) <= rows:
            state = start(first, rows)
            while not bool(state.has_stopped.all()):
                state = run(state, FOREVER)
            groups: Any = [(range(len(bucket)), loop.reported(state))]
        else:
            groups = refill(len(bucket), rows, start, run, loop.reported)
        for finished, state in groups:
            found = loop.collect(state, lm, method, num=len(finished), stops=self.stops)
            yield from zip((bucket[i] for i in finished), found, strict=True)

    def _has_stop(self, tokens: np.ndarray) -> bool:
        assert self.lm.tokenizer is not None
        text = self.lm.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        return cut(text, self.stops) < len(text)


def answer(
    lm: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    loop: Loop,
    method: Any,
    *,
    gen_len: int | Sequence[int],
    seed: int | Sequence[int],
    num_return: int,
    stop: str | Sequence[str],
    batch_size: int | None,
    progress: bool,
    infill: bool = False,
) -> Completion | list[Completion]:
    """What `generate` and `complete` do once they know the loop and the method.

    With `infill`, MASK tokens inside of prompts are decided too.

    Raises:
      ValueError: on prompts, lengths or options that make no sense, in one sentence.
      TypeError: if `prompts` is neither text nor token ids.
    """
    stops = read_stops(lm, stop)
    single = is_single(prompts)
    every: Any = [prompts] if single else prompts
    encoded, bodies = [encode(lm, prompt) for prompt in every], None
    if infill:
        if stops:
            raise ValueError("infill=True has no stop strings: they may stand in what is given")
        encoded, bodies, gen_len = split_gaps(lm.cfg, encoded, gen_len)
        bodies = [body for body in bodies for _ in range(num_return)]
    asked = Asked(lm, *repeat_requests(encoded, gen_len, seed, num_return), stops, bodies)
    answers = gather_samples(asked.answers(loop, method, batch_size, progress), num_return)
    return answers[0] if single else answers
