"""All examples decoded by each method, once: what was written is kept, and worked on later."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import TypedDict, cast

import jax
from tqdm import tqdm

from decode.causal_likelihood import causal_log_likelihood
from decode.evaluation.job import Job
from decode.evaluation.record import Record
from decode.evaluation.run import Method, answered, device
from decode.files import describe
from decode.search.contracts import NEVER
from decode.search.loop import SearchMethod
from dlm.lm import fingerprint
from scripts.search_study.methods import num_read, num_texts


class Written(TypedDict):
    """What a method wrote; the lists have one entry per example.

    Attributes:
      texts: the best first, or in the order in which they were drawn.
      tokens: of the first, up to end-of-text.
      log_prob: of the first, by the model, summed up; end-of-text included.
      forwards: of all its texts.
      read: tokens that the model read in these.
      seconds: of decoding.
      compile_s: of compiling.
    """

    texts: list[list[str]]
    tokens: list[int]
    log_prob: list[float]
    forwards: list[int]
    read: list[int]
    seconds: float
    compile_s: float


def write(job: Job, method: Method, num_return: int) -> Written:
    """Decodes all examples once, in a batch that stays full.

    Args:
      job: what is asked.
      method: how to decode.
      num_return: texts per example, of methods that draw them.
    """
    num = num_texts(method, num_return)
    prompts = [prompt for prompt in job.prompts for _ in range(num)]
    done = answered(job.lm, method, prompts, gen_len=job.gen_len, batch_size=job.batch_size)
    found = Written(
        texts=[], tokens=[], log_prob=[], forwards=[], read=[], seconds=done.seconds,
        compile_s=done.compile_s,
    )  # fmt: skip
    for i in range(0, len(prompts), num):
        drawn = done.completions[i : i + num]
        first, forwards = drawn[0], sum(completion.num_forwards for completion in drawn)
        texts = [*drawn, *first.others]
        there = [text for text in texts if text.score is None or text.score > NEVER / 2]
        found["texts"].append([text.text or "" for text in there or texts[:1]])
        found["tokens"].append(len(first.tokens))
        found["log_prob"].append(float(first.log_prob.sum()))
        found["forwards"].append(forwards)
        found["read"].append(sum(num_read(method, completion) for completion in drawn))
    if isinstance(method, SearchMethod) and method.strategy.shares_row:
        # Its own are of the mean of all drafts.
        firsts = [done.completions[i].canvas.tolist() for i in range(0, len(prompts), num)]
        judged = causal_log_likelihood(job.lm, list(zip(job.prompts, firsts, strict=True)))
        found["log_prob"] = [one.log_prob for one in judged]
    return found


def write_all(
    job: Job, methods: Mapping[str, Method], num_return: int, log: pathlib.Path
) -> dict[str, Written]:
    """What each method writes, unless `log` has it with the same settings.

    Args:
      job: what all of them are asked.
      methods: by name.
      num_return: see `write`.
      log: JSON lines, see `decode.evaluation.record`; each method's is added when it is there.

    Raises:
      ValueError: a line of the log is broken, or another process writes it.
    """
    same = {
        "prompts": list(job.prompts),
        "checkpoint": fingerprint(job.lm),
        "dtype": job.lm.cfg.dtype,
        "gen_len": job.gen_len,
        "batch_size": job.batch_size,
        "device": device(),
        "jax": jax.__version__,
    }
    record, found = Record(log), {}
    with record.adding() as add:
        for name, method in (bar := tqdm(methods.items(), unit="method")):
            bar.set_description(name)
            num = num_texts(method, num_return)
            settings = json.dumps(same | {"method": describe(method), "num_texts": num})
            key = hashlib.sha256(settings.encode()).hexdigest()
            if key not in record.found:
                add(key, {"name": name, **write(job, method, num_return)})
            found[name] = cast(Written, record.found[key])
    return found
