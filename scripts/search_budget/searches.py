"""Ways to find an answer that passes a check, and what each took: forwards, one text's each.

A forward reads one token of one text, so that a batch of four texts makes four: what an accelerator
does at once is not free. Prompts are not counted, nor is what a search reads again of a text that
it goes on with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypedDict, cast

import jax
from tqdm import tqdm

from decode.complete import complete
from decode.core.requests import round_lengths
from decode.core.sampling import Sampling
from decode.evaluation.job import Job
from decode.evaluation.record import Record
from decode.evaluation.run import device
from decode.files import describe
from decode.search.astar import AStar
from decode.search.pg_td import PGTD
from decode.search.planner import Planner, Writer, root_key
from decode.search.scorers import Verifier
from decode.speculative.loop import SpeculativeMethod
from dlm.lm import fingerprint
from dlm.tasks import Example
from scripts.search_budget.asked import Asked, Check


class Tried(TypedDict):
    """What a search found; the lists have one entry per example.

    Attributes:
      right: whether its answer is right.
      forwards: until it ended, which it does with the first answer that passes the check.
      checked: answers, and beginnings of some, that were checked.
      seconds: of all; of samples, which are drawn at once, those behind the first one that passes
        included.
    """

    right: list[bool]
    forwards: list[int]
    checked: list[int]
    seconds: float


class Answer(NamedTuple):
    """What a search says of an example: the text, forwards, and how often something was checked."""

    text: str
    forwards: int
    checked: int


@dataclasses.dataclass(frozen=True)
class Search:
    """A way to find an answer.

    Attributes:
      settings: text that differs where searches do.
      answer: of the example with a number.
    """

    settings: str
    answer: Callable[[Job, int], Answer]


def sampled(asked: Asked, temperature: float, num: int) -> Search:
    """One sample after the other, `num` at most; they are drawn at once, and the prompt is read
    once."""
    method = SpeculativeMethod(sampling=Sampling(temperature))

    def answer(job: Job, i: int) -> Answer:
        lm, prompt, check = job.lm, job.prompts[i], asked.check(job.examples[i])
        assert lm.tokenizer is not None
        P, G = round_lengths(lm.cfg, [prompt], [job.gen_len])
        (drawn,) = Writer(lm, method, prompt, P + G).go_on(
            [prompt], [job.gen_len], [root_key(i)], times=num, rows=1, G=G
        )
        forwards = 0
        for checked, one in enumerate(drawn, 1):
            text = lm.tokenizer.decode(one.tokens[: len(one.tokens) - one.has_ended])
            forwards += len(one.tokens)
            if check(job.examples[i].prompt, text) >= 1:
                return Answer(text, forwards, checked)
        return Answer(text, forwards, num)

    return Search(f"{num} of {describe(method)}", answer)


def planned(planner: Planner, reward: Callable[[Example], Check] | None = None) -> Search:
    """A search on the host.

    Args:
      planner: it.
      reward: what it is told of whole answers to an example; None: nothing.
    """

    def answer(job: Job, i: int) -> Answer:
        told = {} if reward is None else {"reward": reward(job.examples[i])}
        method = planner.replace(**told)
        (found,) = complete(job.lm, [job.prompts[i]], method=method, gen_len=job.gen_len)
        assert found.explored is not None
        return Answer(found.text or "", found.num_forwards, found.explored.num_scored)

    return Search(describe(planner), answer)


def try_one(job: Job, search: Search) -> Tried:
    """All examples, one after the other."""
    found = Tried(right=[], forwards=[], checked=[], seconds=0.0)
    for i in {0, max(range(len(job.prompts)), key=lambda i: len(job.prompts[i]))}:
        search.answer(job, i)  # compiles
    for i, example in enumerate(tqdm(job.examples, leave=False, unit="example")):
        began = time.perf_counter()
        text, forwards, checked = search.answer(job, i)
        found["seconds"] += time.perf_counter() - began
        found["right"].append(job.task.score(example, text)["score"] >= 1)
        found["forwards"].append(forwards)
        found["checked"].append(checked)
    return found


def unknown(prompt: str, text: str) -> float:
    """What a search is told of answers before it knows the example."""
    return 0.0


def searches(asked: Asked, num: int) -> dict[str, Search]:
    """By name.

    Args:
      asked: the task.
      num: samples, expansions and rollouts, at most.
    """
    found = {"samples, T 1": sampled(asked, 1.0, num), "samples, T 0.8": sampled(asked, 0.8, num)}
    if asked.progress is not None:
        queue = AStar(scorer=Verifier(asked.progress), delimiter=",", max_expansions=num)
        wide = queue.replace(num_samples=8, sampling=Sampling(1.0))
        found["A*"] = planned(queue)
        found["A*, 8 steps, T 1"] = planned(wide)
    found["PG-TD"] = planned(PGTD(reward=unknown, num_rollouts=num), asked.check)
    return found


def try_all(job: Job, named: Mapping[str, Search], log: pathlib.Path) -> dict[str, Tried]:
    """What each search finds, unless `log` has it with the same settings.

    Raises:
      ValueError: a line of the log is broken, or another process writes it.
    """
    same = {
        "prompts": list(job.prompts), "checkpoint": fingerprint(job.lm),
        "dtype": job.lm.cfg.dtype, "gen_len": job.gen_len,
        "device": device(), "jax": jax.__version__,
    }  # fmt: skip
    record, found = Record(log), {}
    with record.adding() as add:
        for name, search in (bar := tqdm(named.items(), unit="search")):
            bar.set_description(name)
            key = hashlib.sha256(
                json.dumps(same | {"search": search.settings}).encode()
            ).hexdigest()
            if key not in record.found:
                add(key, {"name": name, **try_one(job, search)})
            found[name] = cast(Tried, record.found[key])
    return found
