"""Ways to find an answer that passes a check, and what each took: forwards, one text's each.

A forward reads one token of one text, so that a batch of four texts makes four: what an accelerator
does at once is not free. Prompts are not counted, nor is what a search reads again of a text that
it goes on with.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import TypedDict, cast

import jax
from tqdm import tqdm

from decode.complete import complete
from decode.core.sampling import Sampling
from decode.evaluation.job import Job
from decode.evaluation.record import Record
from decode.evaluation.run import answered, device
from decode.search.astar import AStar
from decode.search.pg_td import PGTD
from decode.search.planner import Planner
from decode.search.scorers import Verifier
from decode.speculative.loop import SpeculativeMethod
from dlm.lm import fingerprint
from dlm.tasks import Example
from scripts.search_budget.asked import Asked


class Tried(TypedDict):
    """What a search found; the lists have one entry per example.

    Attributes:
      right: whether its answer is right. One that the check rejects never is.
      forwards: until it ended, which it does with the first answer that passes the check.
      checked: answers, and beginnings of some, that were checked.
      seconds: of all; of samples those behind the first right one included.
    """

    right: list[bool]
    forwards: list[int]
    checked: list[int]
    seconds: float


Search = Callable[[Job, Asked], Tried]


def sampled(job: Job, asked: Asked, *, temperature: float, num: int) -> Tried:
    """One sample after the other, `num` at most."""
    prompts = [prompt for prompt in job.prompts for _ in range(num)]
    method = SpeculativeMethod(sampling=Sampling(temperature))
    done = answered(job.lm, method, prompts, gen_len=job.gen_len, batch_size=job.batch_size)
    found = Tried(right=[], forwards=[], checked=[], seconds=done.seconds)
    for i, example in enumerate(job.examples):
        check = asked.check(example)
        drawn = done.completions[i * num : (i + 1) * num]
        texts = [one.text or "" for one in drawn]
        passing = (n for n, text in enumerate(texts) if check(example.prompt, text) >= 1)
        first = next(passing, None)
        used = drawn if first is None else drawn[: first + 1]
        found["right"].append(
            first is not None and job.task.score(example, texts[first])["score"] >= 1
        )
        found["forwards"].append(sum(one.num_forwards for one in used))
        found["checked"].append(len(used))
    return found


def planned(job: Job, asked: Asked, *, method: Callable[[Example], Planner]) -> Tried:
    """A search on the host, told what it may know of an example."""
    found = Tried(right=[], forwards=[], checked=[], seconds=0.0)
    asks = lambda i: complete(  # noqa: E731
        job.lm, [job.prompts[i]], method=method(job.examples[i]), gen_len=job.gen_len
    )
    asks(0)  # compiles
    began = time.perf_counter()
    for i, example in enumerate(tqdm(job.examples, leave=False, unit="prompt")):
        (answer,) = asks(i)
        assert answer.explored is not None
        text = answer.text or ""
        passes = asked.check(example)(example.prompt, text) >= 1
        found["right"].append(passes and job.task.score(example, text)["score"] >= 1)
        found["forwards"].append(answer.num_forwards)
        found["checked"].append(answer.explored.num_scored)
    found["seconds"] = time.perf_counter() - began
    return found


def searches(asked: Asked, num: int) -> dict[str, Search]:
    """By name.

    Args:
      asked: the task.
      num: samples, expansions and rollouts, at most.
    """

    def samples(temperature: float) -> Search:
        return lambda job, asked: sampled(job, asked, temperature=temperature, num=num)

    found = {"samples, T 1": samples(1.0), "samples, T 0.8": samples(0.8)}
    if asked.progress is not None:
        queue = AStar(scorer=Verifier(asked.progress), delimiter=",", max_expansions=num)
        wide = queue.replace(num_samples=8, sampling=Sampling(1.0))
        found["A*"] = lambda job, asked: planned(job, asked, method=lambda _: queue)
        found["A*, 8 steps, T 1"] = lambda job, asked: planned(job, asked, method=lambda _: wide)

    def plan(example: Example) -> Planner:
        return PGTD(reward=asked.check(example), num_rollouts=num)

    found["PG-TD"] = lambda job, asked: planned(job, asked, method=plan)
    return found


def try_all(
    job: Job, asked: Asked, named: Mapping[str, Search], num: int, log: pathlib.Path
) -> dict[str, Tried]:
    """What each search finds, unless `log` has it with the same settings.

    Raises:
      ValueError: a line of the log is broken, or another process writes it.
    """
    same = {
        "prompts": list(job.prompts), "checkpoint": fingerprint(job.lm), "num": num,
        "dtype": job.lm.cfg.dtype, "gen_len": job.gen_len, "batch_size": job.batch_size,
        "device": device(), "jax": jax.__version__,
    }  # fmt: skip
    record, found = Record(log), {}
    with record.adding() as add:
        for name, search in (bar := tqdm(named.items(), unit="search")):
            bar.set_description(name)
            key = hashlib.sha256(json.dumps(same | {"search": name}).encode()).hexdigest()
            if key not in record.found:
                add(key, {"name": name, **search(job, asked)})
            found[name] = cast(Tried, record.found[key])
    return found
