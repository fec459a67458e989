"""Searches and ways to sample, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from decode.core.component import check_numbers
from decode.core.results import Completion
from decode.core.sampling import Sampling
from decode.evaluation.run import Method
from decode.search.components import METHODS
from decode.search.contracts import Strategy
from decode.search.loop import SearchMethod
from decode.search.strategies.beam import Beam
from decode.search.strategies.diverse_beam import DiverseBeam
from decode.speculative.loop import SpeculativeMethod
from dlm.lm import LanguageModel

GREEDY = "greedy"
# One text at a time, drawn: as many as are wanted, each with a random stream of its own.
SAMPLING = {
    "sampled": Sampling(1.0),
    "sampled_0.7": Sampling(0.7),
    "top_k_50": Sampling(1.0, top_k=50),
    "top_p_0.95": Sampling(1.0, top_p=0.95),
    "min_p_0.1": Sampling(1.0, min_p=0.1),
}
# Beside those that have a name: as many hypotheses as `diverse_beam_6`, in one group and in six.
SEARCHES = {
    "beam_6": SearchMethod(Beam(num_beams=6)),
    "diverse_beam_6x1": SearchMethod(DiverseBeam(group=Beam(num_beams=1), num_groups=6)),
    **METHODS,
}
NAMES = (GREEDY, *SAMPLING, *SEARCHES)


def named(name: str, num_return: int, others: Mapping[str, SearchMethod]) -> Method:
    """A method that gives at most so many texts.

    Args:
      name: of `NAMES`; behind that of a search other numbers of its strategy may stand, such as
        "adadec:theta=1.2:num_tried=5".
      num_return: texts.
      others: searches beside those that have a name.

    Raises:
      ValueError: there is no such name, or the strategy has no such number.
    """
    searches = {**SEARCHES, **others}
    name, *numbers = name.split(":")
    if name in searches:
        search = searches[name]
        search = search.replace(strategy=_with_numbers(search.strategy, numbers))
        return search.replace(num_return=min(num_return, search.strategy.num_results))
    if numbers or (name != GREEDY and name not in SAMPLING):
        name = ":".join([name, *numbers])
        raise ValueError(f"there is no method {name!r}; there are {', '.join([*NAMES, *others])}")
    return SpeculativeMethod(sampling=SAMPLING.get(name, Sampling(temperature=None)))


def _with_numbers(strategy: Strategy, others: Sequence[str]) -> Strategy:
    """The strategy with numbers like "theta=1.2" instead of its own."""
    numbers = {}
    for other in others:
        field, _, value = other.partition("=")
        if type(getattr(strategy, field, None)) not in (int, float):
            raise ValueError(f"{type(strategy).__name__} has no number {field!r} for {other!r}")
        try:
            numbers[field] = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{other!r} must end with a number") from error
    replaced: Strategy = strategy.replace(**numbers)  # type: ignore[attr-defined]
    check_numbers(replaced)
    return replaced


def methods_of(
    names: Sequence[str],
    num_return: int,
    lm: LanguageModel,
    others: Mapping[str, SearchMethod] | None = None,
) -> tuple[dict[str, Method], list[str]]:
    """Methods by name, and a sentence for every one that is left out.

    Args:
      names: what must be there; (): all that make sense for the model.
      num_return: most texts per prompt.
      lm: the model.
      others: searches beside those that have a name; they are always there.

    Raises:
      ValueError: there is no such method, or one that was asked for makes no sense.
    """
    found: dict[str, Method] = {}
    left_out = []
    others = others or {}
    for name in dict.fromkeys([*(names or NAMES), *others]):
        method = named(name, num_return, others)
        try:
            if isinstance(method, SearchMethod):
                method = method.replace(strategy=method.strategy.for_model(lm))
            method.validate(lm.cfg)
        except ValueError as error:
            if names:
                raise ValueError(f"{name}: {error}") from error
            left_out.append(f"{name} is left out: {error}")
        else:
            found[name] = method
    return found, left_out


def num_texts(method: Method, num_return: int) -> int:
    """How many texts of a prompt are decoded one by one: of what draws; others give all at once."""
    if isinstance(method, SearchMethod):
        return num_return if method.strategy.draws else 1
    is_drawn = isinstance(method, SpeculativeMethod) and method.sampling.temperature is not None
    return num_return if is_drawn else 1


def num_read(method: Method, answer: Completion) -> int:
    """Tokens that the model has read for an answer, its prompt aside.

    A forward reads one of every hypothesis, unless the strategy counts what it has others wait for.
    """
    if not isinstance(method, SearchMethod):
        return answer.num_forwards
    each = method.num_rows * method.strategy.num_candidates
    return answer.counts.get("num_read", answer.num_forwards * each)
