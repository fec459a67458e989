"""PG-TD: a Monte-Carlo tree over tokens, whose leaves are completed and rewarded as whole texts.

Reference: Zhang et al., "Planning with Large Language Models for Code Generation",
arXiv:2303.05510, Alg. 1, and the public code's defaults. A decision node s is a prefix, its actions
the k most probable next tokens, with P(a) their probabilities among each other. A rollout goes down
from the root by

    argmax_a  Q(a) + c(s) P(a) sqrt(ln visits(s)) / (1 + n(a)),
    c(s) = ln((visits(s) + base + 1) / base) + exploration

to the first action that nobody took, makes its node, completes the text from there, and gives the
reward of that to all actions on the way. Q(a) is the best of them ("best") or their mean
("sample"), 0 without any, n(a) their number. `visits` begins at 1, and counts every rollout that
comes by a node, or ends there. Of equals the more probable action is taken.

What makes it affordable: a completion made by arg-max or beams is that of all prefixes on its way,
and the k most probable tokens behind each of these come with it, so one call of the model serves
all nodes along a completion. No text is rewarded twice.

With several leaves in a round, actions on the way of one count as taken for the others (virtual
loss), so that all are completed in one batch.

Letters: k children.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import jax
import numpy as np

from decode.core.requests import round_lengths
from decode.core.results import Completion
from decode.core.sampling import Sampling
from decode.search import loop
from decode.search.plan import Plan, Run, Tokens
from decode.search.planner import Planner, Writer, check_count, completed, root_key
from decode.search.strategies.beam import Beam
from decode.speculative.loop import GREEDY, SpeculativeMethod
from dlm.lm import LanguageModel

Reward = Callable[[str, str], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PGTD(Planner):
    """Planning-guided decoding: of all completions on the way the one with the largest reward.

    Example:
      >>> method = PGTD(reward=ProgramTests(["assert add(1, 2) == 3"]))
      >>> complete(lm, "def add(a, b):\n", method=method).score

    It ends early with a reward of 1. Of equal rewards the likelier text is taken.

    Attributes:
      reward: of a prompt and what was written behind it, such as the share of tests passed.
      num_children: >= 1, k.
      num_rollouts: >= 1.
      exploration: at least 0, c.
      base: > 0, c's base; the larger, the less c grows.
      policy: "var_p_uct" as above; "p_uct" with a constant c(s) = c; "uct" without a prior:
        Q(a) + c sqrt(ln visits(s) / n(a)), actions that nobody took first.
      mode: "best" completes by arg-max or beams, "sample" draws.
      num_beams: >= 1, of completions in mode "best"; 1: arg-max.
      max_calls: >= 1, completions that the model makes.
      num_leaves: >= 1, leaves of a round.
      is_cached: whether completions and their most probable tokens are kept.
      num_return: >= 1, further ones are the answer's `others`.
      sampling: how completions are drawn in mode "sample".
      stop_ids: tokens that end a text, besides the model's end-of-text.
    """

    reward: Reward
    num_children: int = 3
    num_rollouts: int = 16
    exploration: float = 4.0
    base: float = 10.0
    policy: Literal["var_p_uct", "p_uct", "uct"] = "var_p_uct"
    mode: Literal["best", "sample"] = "best"
    num_beams: int = 1
    max_calls: int = 768
    num_leaves: int = 1
    is_cached: bool = True
    num_return: int = 1
    sampling: Sampling = Sampling(1.0)
    stop_ids: Tokens = ()

    def __post_init__(self) -> None:
        for name in (
            "num_children", "num_rollouts", "num_beams", "max_calls", "num_leaves", "num_return",
        ):  # fmt: skip
            check_count(name, getattr(self, name))
        if not 0 <= self.exploration < math.inf:
            raise ValueError(f"exploration={self.exploration:g} must be finite and at least 0")
        if not 0 < self.base < math.inf:
            raise ValueError(f"base={self.base:g} must be above 0")
        if self.policy not in ("var_p_uct", "p_uct", "uct"):
            raise ValueError(f"policy={self.policy!r} must be 'var_p_uct', 'p_uct' or 'uct'")
        if self.mode not in ("best", "sample"):
            raise ValueError(f"mode={self.mode!r} must be 'best' or 'sample'")
        if self.num_beams > 1 and self.mode == "sample":
            raise ValueError(f"num_beams={self.num_beams} must be 1 with mode='sample'")

    @property
    def num_results(self) -> int:
        return self.num_return

    @property
    def draws(self) -> bool:
        return self.mode == "sample"

    def with_choices(self, sampling: Mapping[str, Any] | None, stop_ids: Tokens | None) -> Self:
        if sampling is not None and not self.draws:
            raise ValueError("temperature and filters must be left out with mode='best'")
        return super().with_choices(sampling, stop_ids)

    def validate(self, lm: LanguageModel) -> None:
        super().validate(lm)
        if not callable(self.reward):
            raise ValueError(f"reward={self.reward!r} must be a function of a prompt and a text")
        if lm.tokenizer is None:
            raise ValueError("reward is of text, and the checkpoint has no tokenizer to write it")
        if self.num_children > lm.cfg.vocab_size:
            raise ValueError(
                f"num_children={self.num_children} must be at most vocab_size={lm.cfg.vocab_size}"
            )

    def answer(
        self, lm: LanguageModel, prompt: Sequence[int], gen_len: int, seed: int
    ) -> list[Completion]:
        self.validate(lm)
        tokenizer = lm.tokenizer
        assert tokenizer is not None
        completer = Completer(lm, self, list(prompt), gen_len, seed)
        asked = tokenizer.decode(prompt)

        def reward(tokens: Tokens) -> float:
            is_whole = bool(tokens) and tokens[-1] in completer.ends
            return self.reward(asked, tokenizer.decode(tokens[: len(tokens) - is_whole]))

        plan = Plan(self, completer, reward, lambda t: t[-1] in completer.ends or len(t) >= gen_len)
        plan.run()
        answers = [
            completed(lm, text, one.log_prob, completer.ends, completer.num_forwards, one.reward)
            for text, one in plan.best()[: self.num_return]
        ]
        explored = plan.explored(tokenizer.decode)
        return [dataclasses.replace(answers[0], explored=explored), *answers[1:]]


class Completer:
    """The model, as a plan needs it.

    Attributes:
      ends: tokens that end a text.
      num_forwards: of the model.
    """

    def __init__(
        self, lm: LanguageModel, method: PGTD, prompt: list[int], gen_len: int, seed: int
    ) -> None:
        self.lm, self.method, self.prompt, self.gen_len = lm, method, prompt, gen_len
        self._key, self._num = root_key(seed), 0
        self._P, self._G = round_lengths(lm.cfg, [prompt], [gen_len])
        writes = SpeculativeMethod(
            sampling=method.sampling if method.mode == "sample" else GREEDY,
            stop_ids=method.stop_ids, top_logprobs=method.num_children,
        )  # fmt: skip
        self._writer = Writer(lm, writes, prompt, self._P + self._G)
        self.ends, self._beam_forwards = self._writer.ends, 0

    @property
    def num_forwards(self) -> int:
        return self._writer.num_forwards + self._beam_forwards

    def complete(self, prefixes: Sequence[Tokens]) -> list[Run]:
        """Each prefix to an end, or to the length that was asked for."""
        if self.method.num_beams > 1:
            return self._beams(prefixes)
        return self._write(prefixes, [self.gen_len - len(prefix) for prefix in prefixes], self._G)

    def top(self, prefix: Tokens) -> tuple[Tokens, tuple[float, ...]]:
        """The k most probable tokens behind a prefix."""
        return self._write([prefix], [1], 1)[0].top[0]

    def _write(self, prefixes: Sequence[Tokens], lengths: list[int], G: int) -> list[Run]:
        numbers = self._numbers(prefixes)
        keys = [np.array([self._key[0] ^ n, self._key[1]], np.uint32) for n in numbers]
        rows = self.method.num_leaves if G > 1 else 1
        found = self._writer.go_on(
            [[*self.prompt, *prefix] for prefix in prefixes], lengths, keys, times=1, rows=rows, G=G
        )
        return [
            Run(
                tuple(one.tokens.tolist()),
                tuple(one.log_prob.tolist()),
                tuple(
                    (tuple(tokens), tuple(log_probs))
                    for tokens, log_probs in zip(
                        one.top_tokens.tolist(), one.top_log_probs.tolist(), strict=True
                    )
                ),
            )
            for (one,) in found
        ]

    def _numbers(self, prefixes: Sequence[Tokens]) -> range:
        """A number for every completion: each has a random stream of its own."""
        self._num += len(prefixes)
        return range(self._num - len(prefixes), self._num)

    def _beams(self, prefixes: Sequence[Tokens]) -> list[Run]:
        beam = Beam(num_beams=self.method.num_beams)
        method: Any = loop.SearchMethod(beam, stop_ids=self.method.stop_ids)
        texts = [[*self.prompt, *prefix] for prefix in prefixes]
        state = loop.begin(
            self.lm.params, self.lm.cfg, method, texts,
            gen_len=[self.gen_len - len(prefix) for prefix in prefixes],
            prompt_len=self._P + self._G, canvas_len=self._G, batch_size=self.method.num_leaves,
        )  # fmt: skip
        state = loop.decode(self.lm.params, self.lm.cfg, method, state)
        found, forwards = jax.device_get((loop.results(method, state), state.num_forwards))
        self._beam_forwards += int(forwards[: len(prefixes)].sum())
        runs = []
        for b in range(len(prefixes)):
            n = int(found.num_tokens[b, 0])
            tokens, log_prob = found.tokens[b, 0, :n], found.log_prob[b, 0, :n]
            runs.append(Run(tuple(tokens.tolist()), tuple(log_prob.tolist()), ()))
        return runs
