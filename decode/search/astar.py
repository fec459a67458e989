"""A*-decoding: a queue of partial answers, of which the most promising one is gone on with.

Reference: Chatziveroglou, "A*-Decoding: Token-Efficient Inference Scaling", arXiv:2505.13672. There
is no published code; path cost and budget follow descriptions of it. A state s is a prompt with
some steps behind it, a goal one that ends with end-of-text. With a scorer's r(s) in [0, 1],

    h(s) = 1 - r(s)
    cost(s, s') = max(0, h(s) - h(s'))         "consistent": the smallest under which h is so
                  max(0, h(s') - h(s))         "drops": reported in places; f can fall
    g(s') = g(s) + cost(s, s'),  f(s) = g(s) + h(s)

so that f = h(root) + what quality has dropped on the way, which later gains do not make good. The
state with the smallest f is taken out: of equals the deeper one, then the one that came first. A
goal is an answer; of any other state k next steps are drawn and scored.

`num_parents` > 1 takes several states out at a time, for the sake of an accelerator: their order is
then that of A* only from round to round.

Letters: k samples.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from decode.core.explored import Explored, Fate, Node
from decode.core.requests import round_lengths
from decode.core.results import Completion
from decode.core.sampling import Sampling
from decode.search.planner import (
    Continuation,
    Planner,
    Writer,
    check_count,
    completed,
    root_key,
)
from decode.search.scorers import Partial, SelfConfidence, StepScorer
from decode.speculative.loop import GREEDY, SpeculativeMethod
from dlm.lm import LanguageModel
from dlm.token_bytes import token_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class AStar(Planner):
    """Best-first search over steps of an answer. Only with a learned or exact scorer is it A*'s.

    Example:
      >>> method = AStar(scorer=Verifier(countdown.progress), delimiter=",")
      >>> complete(lm, "15,44,79,50\n", method=method).score

    A search ends with `num_goals` goals, or when one of the budgets is used up; what was begun then
    is finished, so by at most one expansion they are exceeded. Without a goal the best state that
    is open is finished by arg-max. Equal texts are one state.

    Attributes:
      scorer: says how good a partial answer is.
      num_samples: >= 1, k.
      delimiter: text that ends a step: a step ends with the first token that holds it.
      step_len: >= 1, most tokens of a step.
      sampling: how steps are drawn.
      path_cost: see above.
      max_expansions: >= 1.
      max_tokens: >= 1; None: no limit.
      max_scored: >= 1, texts that are scored; None: no limit.
      num_goals: >= 1; the further ones are the answer's `others`.
      num_parents: >= 1, states that are expanded at once.
      max_open: >= 1: of more open states the worst are forgotten; None: no limit.
      stop_ids: tokens that end a text, besides the model's end-of-text.
    """

    scorer: StepScorer = SelfConfidence()
    num_samples: int = 4
    delimiter: str = "\n"
    step_len: int = 64
    sampling: Sampling = Sampling(0.8)
    path_cost: Literal["consistent", "drops"] = "consistent"
    max_expansions: int = 32
    max_tokens: int | None = None
    max_scored: int | None = None
    num_goals: int = 1
    num_parents: int = 1
    max_open: int | None = None
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "num_samples", "step_len", "max_expansions", "max_tokens", "max_scored", "num_goals",
            "num_parents", "max_open",
        ):  # fmt: skip
            check_count(name, getattr(self, name))
        if self.path_cost not in ("consistent", "drops"):
            raise ValueError(f"path_cost={self.path_cost!r} must be 'consistent' or 'drops'")
        if not isinstance(self.delimiter, str) or not self.delimiter:
            raise ValueError(f"delimiter={self.delimiter!r} must be some text")
        if not isinstance(self.scorer, StepScorer):
            raise ValueError(f"scorer={self.scorer!r} must be of class StepScorer")

    @property
    def num_results(self) -> int:
        return self.num_goals

    def validate(self, lm: LanguageModel) -> None:
        super().validate(lm)
        if lm.tokenizer is None:
            raise ValueError(
                f"delimiter={self.delimiter!r} must be found in tokens, and the checkpoint has no "
                "tokenizer that could be read"
            )

    def answer(
        self, lm: LanguageModel, prompt: Sequence[int], gen_len: int, seed: int
    ) -> list[Completion]:
        self.validate(lm)
        tokenizer, mark = lm.tokenizer, self.delimiter.encode()
        assert tokenizer is not None
        words = token_bytes(tokenizer, lm.cfg.vocab_size)
        delimiters = [i for i, word in enumerate(words) if mark in word]
        P, G = round_lengths(lm.cfg, [prompt], [gen_len])
        steps = SpeculativeMethod(sampling=self.sampling, stop_ids=(*delimiters, *self.stop_ids))
        writer = Writer(lm, steps, prompt, P + G)
        ends = {*lm.cfg.eos_ids, *self.stop_ids}

        def expand(states: Sequence[State]) -> list[list[State]]:
            rooms = [min(self.step_len, gen_len - len(s.tokens)) for s in states]
            found = writer.go_on(
                [[*prompt, *s.tokens] for s in states], rooms, [s.key for s in states],
                times=self.num_samples, rows=self.num_parents, G=min(self.step_len, G),
            )  # fmt: skip
            return [
                [s.child(step, ends, gen_len) for step in some]
                for s, some in zip(states, found, strict=True)
            ]

        asked = tokenizer.decode(prompt)

        def score(states: Sequence[State]) -> Sequence[float]:
            partial = [
                Partial(
                    (*prompt, *s.tokens), asked, tokenizer.decode(s.tokens), s.log_prob[s.start :],
                    s.is_goal or s.is_full,
                )
                for s in states
            ]  # fmt: skip
            return self.scorer.score(lm, partial)

        root = State((), root_key(seed))
        found = best_first(root, expand, score, self)
        goals = found.goals or [self._finish(lm, prompt, found, writer, P + G, G, gen_len)]
        answers = [
            completed(lm, s.tokens, s.log_prob, ends, writer.num_forwards, -s.f) for s in goals
        ]
        explored = found.explored(tokenizer.decode)
        return [dataclasses.replace(answers[0], explored=explored), *answers[1:]]

    def _finish(
        self, lm: LanguageModel, prompt: Sequence[int], found: Found, writer: Writer,
        num_slots: int, G: int, gen_len: int,
    ) -> State:  # fmt: skip
        """The best state that is open, finished by arg-max."""
        state = found.best_open
        if (room := gen_len - len(state.tokens)) < 1:
            return state
        method = SpeculativeMethod(sampling=GREEDY, stop_ids=self.stop_ids)
        greedy = Writer(lm, method, prompt, num_slots)
        ((rest,),) = greedy.go_on(
            [[*prompt, *state.tokens]], [room], [state.key], times=1, rows=1, G=G
        )
        found.num_tokens += greedy.num_tokens
        writer.num_forwards += greedy.num_forwards
        return dataclasses.replace(
            state,
            tokens=(*state.tokens, *rest.tokens.tolist()),
            log_prob=np.concatenate([state.log_prob, rest.log_prob]),
        )


@dataclasses.dataclass
class State:
    """A partial answer.

    Attributes:
      tokens: behind the prompt.
      key: [2] uint32. Its random stream.
      log_prob: [n] float32. Of the tokens.
      start: where its last step begins.
      is_goal: whether it ends the text.
      is_full: whether nothing may follow, though it is no goal.
      parent: its number in the search; -1: it is the root.
      depth: steps.
      g, h: see the module.
      num_pops: how often it was taken out.
    """

    tokens: tuple[int, ...]
    key: np.ndarray
    log_prob: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    start: int = 0
    is_goal: bool = False
    is_full: bool = False
    parent: int = -1
    depth: int = 0
    g: float = 0.0
    h: float = 0.0
    num_pops: int = 0

    @property
    def f(self) -> float:
        return self.g + self.h

    def child(self, step: Continuation, ends: set[int], gen_len: int) -> State:
        """The state behind one step more."""
        tokens = (*self.tokens, *step.tokens.tolist())
        is_goal = bool(step.tokens.size) and int(step.tokens[-1]) in ends
        log_prob = np.concatenate([self.log_prob, step.log_prob])
        is_full = len(tokens) >= gen_len and not is_goal
        return State(tokens, step.key, log_prob, len(self.tokens), is_goal, is_full)


@dataclasses.dataclass
class Found:
    """What a search has found.

    Attributes:
      states: all there were, the root first.
      goals: the best first.
      popped: numbers of states, in the order in which they were taken out.
      open: numbers of states that are open, the best first.
      num_expansions: states that were expanded.
      num_tokens: that were drawn, or written to finish a state.
      num_scored: texts that were scored.
    """

    states: list[State]
    goals: list[State] = dataclasses.field(default_factory=list)
    popped: list[int] = dataclasses.field(default_factory=list)
    open: list[int] = dataclasses.field(default_factory=list)
    num_expansions: int = 0
    num_tokens: int = 0
    num_scored: int = 0

    @property
    def best_open(self) -> State:
        """The best state that is not taken out; where there is none, that has no room to go on."""
        full = [i for i, state in enumerate(self.states) if state.is_full]
        among = self.open or full or [0]
        return self.states[min(among, key=lambda i: (self.states[i].f, -self.states[i].depth, i))]

    def explored(self, decode: Callable[[Sequence[int]], str]) -> Explored:
        """For a picture; a node is a step, and its score is -f."""
        fates: list[Fate] = ["kept" if s.num_pops else "dropped" for s in self.states]
        for i in self.popped:
            if self.states[i].is_goal:
                fates[i] = "found"
        best = self.goals[0] if self.goals else self.best_open
        number = next(i for i, s in enumerate(self.states) if s is best)
        while number >= 0:
            fates[number] = "won"
            number = self.states[number].parent
        nodes = [
            Node(s.parent - 1, decode(s.tokens[s.start :]), fate, -s.f, {"r": 1 - s.h})
            for s, fate in zip(self.states[1:], fates[1:], strict=True)
        ]
        return Explored(tuple(nodes), self.num_expansions, self.num_scored, self.num_tokens)


def best_first(
    root: State,
    expand: Callable[[Sequence[State]], list[list[State]]],
    score: Callable[[Sequence[State]], Sequence[float]],
    method: AStar,
) -> Found:
    """The search itself, whatever states are.

    Args:
      root: the first state.
      expand: next states of some states, as they are drawn.
      score: r of some states, in [0, 1].
      method: its numbers, and the path cost.

    Raises:
      ValueError: a score is not in [0, 1].
    """
    found = Found([root])
    root.h = 1 - _scores(found, score, [root])[0]
    queue, known = [(root.f, 0, 0)], {root.tokens: 0}

    def is_spent() -> bool:
        return (
            found.num_expansions >= method.max_expansions
            or found.num_tokens >= (method.max_tokens or float("inf"))
            or found.num_scored >= (method.max_scored or float("inf"))
        )

    while queue and len(found.goals) < method.num_goals and not is_spent():
        parents: list[int] = []
        most = min(method.num_parents, method.max_expansions - found.num_expansions)
        while queue and len(parents) < most and len(found.goals) < method.num_goals:
            f, _, i = heapq.heappop(queue)
            state = found.states[i]
            if state.num_pops or f != state.f:
                continue  # it is there with a smaller g
            state.num_pops = 1
            found.popped.append(i)
            if state.is_goal:
                found.goals.append(state)
            elif not state.is_full:
                parents.append(i)
        if len(found.goals) >= method.num_goals or not parents:
            continue
        found.num_expansions += len(parents)
        drawn = expand([found.states[i] for i in parents])
        pairs = [(i, child) for i, some in zip(parents, drawn, strict=True) for child in some]
        found.num_tokens += sum(len(c.tokens) - len(found.states[i].tokens) for i, c in pairs)
        new = {c.tokens: c for _, c in reversed(pairs) if c.tokens not in known}
        new = {c.tokens: new[c.tokens] for _, c in pairs if c.tokens in new}  # in their order
        for child, r in zip(new.values(), _scores(found, score, [*new.values()]), strict=True):
            child.h = 1 - r
        for i, child in pairs:
            parent = found.states[i]
            is_new = child.tokens not in known
            place = known.setdefault(child.tokens, len(found.states))
            state = child if is_new else found.states[place]
            g = parent.g + _cost(parent.h, state.h, method.path_cost)
            if is_new:
                found.states.append(state)
            elif state.num_pops or g >= state.g:
                continue
            state.parent, state.depth, state.g = i, parent.depth + 1, g
            heapq.heappush(queue, (state.f, -state.depth, place))
        if method.max_open is not None and len(queue) > method.max_open:
            queue = heapq.nsmallest(method.max_open, queue)
    found.goals.sort(key=lambda state: state.f)
    found.open = [
        i for f, _, i in sorted(queue) if not found.states[i].num_pops and f == found.states[i].f
    ]
    return found


def _scores(
    found: Found, score: Callable[[Sequence[State]], Sequence[float]], states: list[State]
) -> list[float]:
    """r of each."""
    if not states:
        return []
    scores = [float(r) for r in score(states)]
    found.num_scored += len(states)
    for r in scores:
        if not 0 <= r <= 1:
            raise ValueError(f"scorer gave r={r:g}, which must be in [0, 1]: use a sigmoid")
    return scores


def _cost(h: float, following: float, path_cost: str) -> float:
    return max(0.0, h - following if path_cost == "consistent" else following - h)
