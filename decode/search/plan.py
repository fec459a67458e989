"""The tree of planning-guided decoding, whatever completes texts and rewards them.

Rules, reference and what makes it affordable: `decode.search.pg_td`. The tree lives on the host.

Letters: k children.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from decode.core.explored import Explored, Fate, Node

if TYPE_CHECKING:
    from decode.search.pg_td import PGTD

Tokens = tuple[int, ...]
LEAST = 1e-30  # a prior, positive however sure the model is of another token


@dataclasses.dataclass(frozen=True)
class Run:
    """A completion of a prefix.

    Attributes:
      tokens: behind the prefix.
      log_prob: of each.
      top: the k most probable tokens before each and their log-probabilities; (): not known.
    """

    tokens: Tokens
    log_prob: tuple[float, ...]
    top: tuple[tuple[Tokens, tuple[float, ...]], ...]


@dataclasses.dataclass
class Action:
    """A token that may follow a prefix.

    Attributes:
      token: it.
      prior: P(a).
      log_prob: by the model, among all tokens.
      returns: rewards of the rollouts that took it.
      pending: rollouts under way that do.
      child: the node behind it; None: nobody took it.
    """

    token: int
    prior: float
    log_prob: float
    returns: list[float] = dataclasses.field(default_factory=list)
    pending: int = 0
    child: Decision | None = None


@dataclasses.dataclass
class Decision:
    """A prefix.

    Attributes:
      prefix: tokens behind the prompt.
      log_prob: of each.
      is_terminal: whether nothing follows.
      actions: the most probable first; None: it is not expanded yet.
      visits: see the module.
      pending: rollouts under way that come by.
    """

    prefix: Tokens
    log_prob: tuple[float, ...]
    is_terminal: bool
    actions: list[Action] | None = None
    visits: int = 1
    pending: int = 0


@dataclasses.dataclass
class _Known:
    """What is known of a prefix: the first completion that goes by it, and what may follow it."""

    children: dict[int, _Known] = dataclasses.field(default_factory=dict)
    run: Run | None = None
    top: tuple[Tokens, tuple[float, ...]] | None = None


@dataclasses.dataclass(frozen=True)
class Rewarded:
    """A whole text.

    Attributes:
      reward: of it.
      log_prob: of each of its tokens.
    """

    reward: float
    log_prob: tuple[float, ...]


class Plan:
    """The search itself, whatever completes texts.

    Attributes:
      root: the node of the prompt.
      rewarded: whole texts in the order in which they were rewarded.
      num_calls: completions that were made.
      num_rollouts: so far.
    """

    def __init__(
        self,
        method: PGTD,
        completer: Any,
        reward: Callable[[Tokens], float],
        is_terminal: Callable[[Tokens], bool],
    ) -> None:
        self.method, self.completer = method, completer
        self._reward, self._is_terminal = reward, is_terminal
        self._known = _Known()
        self.root = Decision((), (), False)
        self.rewarded: dict[Tokens, Rewarded] = {}
        self.num_calls = self.num_rollouts = 0

    def run(self) -> None:
        """All rollouts, as far as budgets go, or to a reward of 1."""
        run = self._complete([self.root])[0]
        self._expand(self.root, run)
        best = -math.inf
        while self.num_rollouts < self.method.num_rollouts and best < 1:
            if self.num_calls >= self.method.max_calls:
                break
            best = max(best, *self._round())
        if not self.rewarded:  # there was no call left for a rollout
            self._value(self.root, run)

    def _round(self) -> list[float]:
        """Rollouts to as many leaves as go together, and their returns."""
        left = self.method.num_rollouts - self.num_rollouts
        calls = self.method.max_calls - self.num_calls
        ways: list[tuple[list[tuple[Decision, Action]], Decision]] = []
        for _ in range(min(self.method.num_leaves, left, calls)):
            way, leaf = self._descend()
            for node, action in way:
                node.pending += 1
                action.pending += 1
            leaf.pending += 1
            ways.append((way, leaf))
        leaves = {id(leaf): leaf for _, leaf in ways if not leaf.is_terminal}
        runs = dict(zip(leaves, self._complete([*leaves.values()]), strict=True))
        returns = []
        for way, leaf in ways:
            run = runs.get(id(leaf), Run((), (), ()))
            if not leaf.is_terminal and leaf.actions is None:
                self._expand(leaf, run)
            value = self._value(leaf, run)
            for node, action in way:
                node.pending -= 1
                action.pending -= 1
                node.visits += 1
                action.returns.append(value)
            leaf.pending -= 1
            leaf.visits += 1
            returns.append(value)
        self.num_rollouts += len(ways)
        return returns

    def _descend(self) -> tuple[list[tuple[Decision, Action]], Decision]:
        """Decisions and actions on the way to a leaf, and the leaf."""
        node, way = self.root, list[tuple[Decision, Action]]()
        while not node.is_terminal and node.actions is not None:
            action = self._select(node)
            way.append((node, action))
            if action.child is None:
                prefix = (*node.prefix, action.token)
                log_prob = (*node.log_prob, action.log_prob)
                action.child = Decision(prefix, log_prob, self._is_terminal(prefix))
                return way, action.child
            node = action.child
        return way, node

    def _select(self, node: Decision) -> Action:
        assert node.actions is not None
        method, visits = self.method, node.visits + node.pending
        spread = math.sqrt(math.log(visits))

        def worth(action: Action) -> float:
            q, n = 0.0, len(action.returns) + action.pending
            if action.returns:
                best, mean = max(action.returns), sum(action.returns) / len(action.returns)
                q = best if method.mode == "best" else mean
            if method.policy == "uct":
                return q + method.exploration * spread / math.sqrt(n) if n else math.inf
            c = method.exploration
            if method.policy == "var_p_uct":
                c += math.log((visits + method.base + 1) / method.base)
            return q + c * action.prior * spread / (1 + n)

        return max(node.actions, key=worth)  # the first of equals

    def _complete(self, leaves: Sequence[Decision]) -> list[Run]:
        """Completions of leaves, those that are known without the model."""
        found: dict[int, Run] = {}
        is_kept = self.method.is_cached and self.method.mode == "best"
        for i, leaf in enumerate(leaves):
            if is_kept and (run := self._find(leaf.prefix).run) is not None:
                found[i] = run
        asked = [i for i in range(len(leaves)) if i not in found]
        if asked:
            self.num_calls += len(asked)
            runs = self.completer.complete([leaves[i].prefix for i in asked])
            for i, run in zip(asked, runs, strict=True):
                found[i] = run
                if is_kept:
                    self._keep(leaves[i].prefix, run)
        return [found[i] for i in range(len(leaves))]

    def _find(self, prefix: Tokens) -> _Known:
        node = self._known
        for token in prefix:
            node = node.children.setdefault(token, _Known())
        return node

    def _keep(self, prefix: Tokens, run: Run) -> None:
        """Says at all prefixes on the way of a completion what its rest is."""
        node = self._find(prefix)
        for i, token in enumerate(run.tokens):
            if node.run is None:
                top = run.top[i:]
                node.run = Run(run.tokens[i:], run.log_prob[i:], top)
                node.top = top[0] if top else None
            node = node.children.setdefault(token, _Known())

    def _expand(self, node: Decision, run: Run) -> None:
        """Gives a node its actions."""
        known = self._find(node.prefix) if self.method.is_cached else _Known()
        top = run.top[0] if run.top else known.top
        if top is None:
            top = self.completer.top(node.prefix)
            known.top = top
        tokens, log_probs = top
        among = np.asarray(log_probs, np.float64)
        priors = np.exp(among - np.logaddexp.reduce(among))
        node.actions = [
            Action(token, max(float(p), LEAST), lp)
            for token, p, lp in zip(tokens, priors, log_probs, strict=True)
        ]

    def _value(self, leaf: Decision, run: Run) -> float:
        """The reward of a leaf's text; each text is rewarded once."""
        text = (*leaf.prefix, *run.tokens)
        if text not in self.rewarded:
            reward = float(self._reward(text))
            if math.isnan(reward):
                raise ValueError("reward gave nan, which must be a number")
            self.rewarded[text] = Rewarded(reward, (*leaf.log_prob, *run.log_prob))
        return self.rewarded[text].reward

    def best(self) -> list[tuple[Tokens, Rewarded]]:
        """Whole texts by reward, of equal ones the likelier first."""
        return sorted(self.rewarded.items(), key=lambda x: (-x[1].reward, -sum(x[1].log_prob)))

    def explored(self, decode: Callable[[Sequence[int]], str]) -> Explored:
        """For a picture; the score of a node is the best reward behind it."""
        best, nodes = self.best()[0][0], list[Node]()
        todo = [(-1, self.root)]
        while todo:
            number, node = todo.pop(0)
            for action in node.actions or ():
                if (child := action.child) is None:
                    continue
                fate: Fate = "kept" if any(a.child for a in child.actions or ()) else "dropped"
                if child.is_terminal:
                    fate = "found"
                if child.prefix == best[: len(child.prefix)]:
                    fate = "won"
                todo.append((len(nodes), child))
                parts = {"P": action.prior, "n": float(len(action.returns))}
                text = decode(child.prefix[-1:])
                nodes.append(Node(number, text, fate, max(action.returns), parts))
        return Explored(tuple(nodes), self.num_calls, len(self.rewarded))
