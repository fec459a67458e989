"""A file of prompts in, a file of answers out; a run that is interrupted goes on.

    from decode.files import answer_file

    answer_file(lm, "in.jsonl", "out.jsonl", functools.partial(as_finished, method="klass"))

Prompts are JSON lines: a text, a list of token ids, or an object that has one of

    prompt      text, or token ids
    messages    a conversation, for the checkpoint's chat template

and, if it differs from the others', `gen_len`. Answers are JSON lines, added as they finish, each
with

    index       the number of its prompt, from 0
    text        up to the end of the text; null without a tokenizer
    tokens      of it
    num_forwards, finish_reason    as `Completion` has them

When all are there, they are put into the order of the prompts. `<answers>.settings.json` says what
they were made with. One process at a time writes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from decode.core.requests import encode, whole_number
from decode.core.results import Completion
from dlm.json_lines import parse_lines, read_json
from dlm.lm import LanguageModel, fingerprint
from dlm.written import naming, write_text

HOW_FAST = ("batch_size", "progress")  # options on which no answer depends
SAID_HERE = ("gen_len", "seed")  # options that are arguments of `answer_file`
NOT_WRITTEN = ("num_return", "top_logprobs")  # options that ask for what answers do not hold
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function in memory
MOST_SEEN = 2**20  # entries of an array, evenly spread, by which it is told from others


def answer_file(
    lm: LanguageModel,
    prompts: str | os.PathLike[str],
    answers: str | os.PathLike[str],
    decode: Callable[..., Iterator[tuple[int, Completion]]],
    *,
    gen_len: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> int:
    """Answers what is not answered yet.

    Args:
      lm: from `dlm.load`.
      prompts: file, see above.
      answers: file, see above; made, or gone on with.
      decode: `as_finished` of `decode.generate` or `decode.complete`, or a `functools.partial` of
        it with more options.
      gen_len: most tokens of an answer, for prompts that do not say it.
      seed: of the first prompt; prompt i has seed + i.
      progress: whether to show a bar.

    Returns:
      How many answers this call added.

    Raises:
      ValueError: a line is no prompt, `answers` holds those of other prompts, models or options, or
        is being written by another process, `decode` is something else, or what it raises.
      OSError: a file cannot be read or written.
    """
    gen_len, seed = whole_number("gen_len", gen_len), whole_number("seed", seed)
    source, target = pathlib.Path(prompts), pathlib.Path(answers)
    raw = source.read_bytes()
    asked = [
        _read(lm, said, f"{source}, line {n}", gen_len) for n, said in parse_lines(raw, source)
    ]
    settings = _settings(lm, raw, decode, gen_len, seed)
    with open_to_add(target) as file:
        _claim(target, settings)
        done = _read_answers(target, len(asked))
        todo = [i for i in range(len(asked)) if i not in done]
        if not todo:
            return 0
        found = decode(
            lm,
            [asked[i][0] for i in todo],
            gen_len=[asked[i][1] for i in todo],
            seed=[seed + i for i in todo],
            progress=progress,
        )
        for n, completion in found:
            line = _write(todo[n], completion)
            with naming(target):
                file.write(line)
                file.flush()
            done[todo[n]] = line
        replace_file(target, "".join(done[i] for i in range(len(asked))))
    return len(todo)


def _read(lm: LanguageModel, said: Any, where: str, gen_len: int) -> tuple[list[int], int]:
    """The token ids of a prompt, and its length."""
    said = said if isinstance(said, dict) else {"prompt": said}
    if unknown := sorted(said.keys() - {"prompt", "messages", "gen_len"}):
        raise ValueError(f"{where} has {unknown[0]!r}; known are prompt, messages and gen_len")
    if len(said.keys() & {"prompt", "messages"}) != 1:
        raise ValueError(f"{where} must have either a prompt or messages")
    try:
        length = whole_number("gen_len", said.get("gen_len", gen_len))
        if "prompt" in said:
            return encode(lm, said["prompt"]), length
        if lm.tokenizer is None:
            raise ValueError("messages need a tokenizer, and the checkpoint has none")
        return encode(lm, lm.tokenizer.apply_chat_template(said["messages"])), length
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _settings(
    lm: LanguageModel, prompts: bytes, decode: Callable[..., Any], gen_len: int, seed: int
) -> dict[str, str]:
    """All that answers depend on."""
    options: dict[str, Any] = {}
    while isinstance(decode, functools.partial):
        options, decode = {**decode.keywords, **options}, decode.func
    name = getattr(decode, "__name__", "")
    if name != "as_finished":
        raise ValueError(
            f"decode={decode!r} must be as_finished of decode.generate or decode.complete, or a "
            "functools.partial of it"
        )
    for option in (*SAID_HERE, *NOT_WRITTEN):
        if option in options:
            why = "give it to answer_file" if option in SAID_HERE else "answers do not hold it"
            raise ValueError(f"decode has {option}={options[option]!r}: leave it out, {why}")
    return {
        "prompts": hashlib.sha256(prompts).hexdigest(),
        "model": fingerprint(lm),
        "dtype": lm.cfg.dtype,
        "decode": f"{decode.__module__}.{name}",
        "gen_len": str(gen_len),
        "seed": str(seed),
    } | {name: describe(options[name]) for name in sorted(options.keys() - set(HOW_FAST))}


def describe(option: Any) -> str:
    """Text that differs where options do: of arrays, all entries count, or `MOST_SEEN` of them.

    It is the same in every process: functions are said by name.
    """
    leaves, structure = jax.tree.flatten(option)
    if not any(np.ndim(leaf) for leaf in leaves):
        return _ADDRESS.sub("", repr(option))
    digest = hashlib.sha256(_ADDRESS.sub("", str(structure)).encode())
    for leaf in leaves:
        if callable(leaf):
            digest.update(_ADDRESS.sub("", repr(leaf)).encode())
            continue
        seen = np.linspace(0, np.size(leaf) - 1, min(np.size(leaf), MOST_SEEN)).astype(np.int64)
        digest.update(f"{np.shape(leaf)}".encode())
        digest.update(np.asarray(jnp.ravel(leaf)[seen]).tobytes())
    return f"{type(option).__name__} with SHA-256 {digest.hexdigest()[:16]}"


@contextlib.contextmanager
def open_to_add(target: pathlib.Path) -> Iterator[TextIO]:
    """The answers, to add some, in a folder made if needed; ValueError if another process does."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{target} is being written by another process: wait for its end, or choose "
                "another file"
            ) from None
        except OSError as error:
            logging.warning("%s cannot be locked (%s): let one process write it.", target, error)
        yield file


def _claim(target: pathlib.Path, settings: dict[str, str]) -> None:
    """Writes the settings beside new answers; ValueError if there are some of others."""
    file = target.with_name(f"{target.name}.settings.json")
    if not target.stat().st_size:
        replace_file(file, json.dumps(settings, indent=1) + "\n")
        return
    if not file.exists():
        raise ValueError(f"{target} is there without {file.name}: choose another file")
    try:
        before = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}: choose another file than {target}") from error
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            raise ValueError(
                f"{target} has answers of another run ({name} was {before.get(name)} and is "
                f"{settings.get(name)}): choose another file"
            )


def _read_answers(target: pathlib.Path, num: int) -> dict[int, str]:
    """Lines by the number of their prompt; one that an interruption cut short is taken away."""
    raw = target.read_bytes()
    kept = raw[: raw.rfind(b"\n") + 1]
    if kept != raw:
        os.truncate(target, len(kept))
    answers = {}
    for n, line in enumerate(kept.split(b"\n")[:-1], 1):  # texts may hold U+2028 and the like
        try:
            text = line.decode()
            index = json.loads(text)["index"]
        except (ValueError, TypeError, KeyError, RecursionError):
            index = None
        if not isinstance(index, int) or not 0 <= index < num:
            raise ValueError(
                f"{target}, line {n} is no answer to a prompt from 0 to {num - 1}: delete the "
                "line, and what it held is answered again"
            )
        answers[index] = f"{text}\n"
    return answers


def _write(index: int, completion: Completion) -> str:
    answer = {
        "index": index,
        "text": completion.text,
        "tokens": completion.tokens.tolist(),
        "num_forwards": completion.num_forwards,
        "finish_reason": completion.finish_reason,
    }
    return json.dumps(answer, ensure_ascii=False) + "\n"


def replace_file(file: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    write_text(partial, text)
    partial.replace(file)
