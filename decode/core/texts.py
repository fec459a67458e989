"""Strings in, completions out: what `decode.generate` and `decode.complete` share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np

from decode.core.requests import Prompt, encode, is_single, repeat_requests
from decode.core.results import Completion, gather_samples, read_stops, run_until
from dlm.lm import LanguageModel


class TextOptions(TypedDict, total=False):
    """The keyword arguments of both."""

    gen_len: int | Sequence[int]
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str]
    stop_ids: Sequence[int]
    seed: int | Sequence[int]
    num_return: int
    top_logprobs: int


@dataclasses.dataclass(frozen=True)
class Asked:
    """Checked prompts as token ids, `num_return` times each.

    Attributes:
      lm: who is to answer.
      is_single: whether one prompt was given, not a list of them.
      prompts: token ids.
      gen_lens: most tokens to write, per prompt.
      seeds: one per prompt.
      stops: strings that end a text.
      num_return: samples per prompt.
    """

    lm: LanguageModel
    is_single: bool
    prompts: list[list[int]]
    gen_lens: list[int]
    seeds: list[int]
    stops: list[str]
    num_return: int

    def answer(
        self,
        method: Any,
        prepare: Callable[..., Any],
        decode: jax.stages.Wrapped,
        settled: Callable[[Any], list[np.ndarray]],
        collect: Callable[..., list[Completion]],
    ) -> Completion | list[Completion]:
        """Runs a method of either loop.

        Args:
          method: how to decode.
          prepare: its first state, of the model, the method, prompts, `gen_len` and `seed`.
          decode: its loop.
          settled: the tokens that rows of a state have written for certain.
          collect: completions, of a state, the model, the method, their number and `stops`.
        """
        lm = self.lm
        with contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh):
            state = prepare(lm, method, self.prompts, gen_len=self.gen_lens, seed=self.seeds)
            state = run_until(
                lambda state, rounds: decode(lm.params, lm.cfg, method, state, rounds),
                state,
                lambda state: self._texts(settled(state)),
                self.stops,
            )
        completions = collect(state, lm, method, num=len(self.prompts), stops=self.stops)
        answers = gather_samples(completions, self.num_return)
        return answers[0] if self.is_single else answers

    def _texts(self, rows: list[np.ndarray]) -> list[str]:
        assert self.lm.tokenizer is not None
        return [self.lm.tokenizer.decode(row.tolist()) for row in rows]


def read_asked(
    lm: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    gen_len: int | Sequence[int],
    seed: int | Sequence[int],
    num_return: int,
    stop: str | Sequence[str],
) -> Asked:
    """Checks and encodes what was asked for.

    Raises:
      ValueError: on prompts, lengths or options that make no sense, in one sentence.
      TypeError: if `prompts` is neither text nor token ids.
    """
    stops = read_stops(lm, stop)
    single = is_single(prompts)
    every: Any = [prompts] if single else prompts
    encoded = [encode(lm, prompt) for prompt in every]
    repeated = repeat_requests(encoded, gen_len, seed, num_return)
    return Asked(lm, single, *repeated, stops, num_return)
