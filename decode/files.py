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
they were made with.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from decode.core.requests import Prompt
from decode.core.results import Completion
from dlm.lm import LanguageModel, fingerprint

HOW_FAST = ("batch_size", "progress")  # options on which no answer depends


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
        what the decoder raises.
      OSError: a file cannot be read or written.
    """
    source, target = pathlib.Path(prompts), pathlib.Path(answers)
    text = source.read_text(encoding="utf-8")
    asked = [
        _read(lm, line, f"{source}, line {n}", gen_len)
        for n, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    settings = _settings(lm, text, decode, gen_len, seed)
    _claim(target, settings)
    done = _read_answers(target)
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
    with target.open("a", encoding="utf-8") as file:
        for n, completion in found:
            line = _write(todo[n], completion)
            file.write(line)
            file.flush()
            done[todo[n]] = line
    _replace(target, "".join(done[i] for i in range(len(asked))))
    return len(todo)


def _read(lm: LanguageModel, line: str, where: str, gen_len: int) -> tuple[Prompt, int]:
    """A prompt and its length."""
    try:
        said = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    said = said if isinstance(said, dict) else {"prompt": said}
    if unknown := sorted(said.keys() - {"prompt", "messages", "gen_len"}):
        raise ValueError(f"{where} has {unknown[0]!r}; known are prompt, messages and gen_len")
    if len(said.keys() & {"prompt", "messages"}) != 1:
        raise ValueError(f"{where} must have either a prompt or messages")
    length = said.get("gen_len", gen_len)
    if isinstance(length, bool) or not isinstance(length, int):
        raise ValueError(f"{where}: gen_len={length!r} must be a whole number")
    if "messages" in said:
        if lm.tokenizer is None:
            raise ValueError(f"{where} has messages, but the checkpoint has no tokenizer")
        try:
            return lm.tokenizer.apply_chat_template(said["messages"]), length
        except (TypeError, KeyError) as error:
            raise ValueError(f"{where}: messages={said['messages']!r}: {error!r}") from error
    prompt = said["prompt"]
    is_ids = isinstance(prompt, list) and all(
        isinstance(token, int) and not isinstance(token, bool) for token in prompt
    )
    if not isinstance(prompt, str) and not is_ids:
        raise ValueError(f"{where}: prompt={prompt!r} must be a text or a list of token ids")
    return prompt, length


def _settings(
    lm: LanguageModel, prompts: str, decode: Callable[..., Any], gen_len: int, seed: int
) -> dict[str, str]:
    """All that answers depend on."""
    options: dict[str, Any] = {}
    while isinstance(decode, functools.partial):
        options, decode = {**decode.keywords, **options}, decode.func
    return {
        "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
        "model": fingerprint(lm),
        "decode": f"{decode.__module__}.{decode.__name__}",
        "gen_len": str(gen_len),
        "seed": str(seed),
    } | {name: repr(options[name]) for name in sorted(options.keys() - set(HOW_FAST))}


def _claim(target: pathlib.Path, settings: dict[str, str]) -> None:
    """Writes the settings beside new answers; ValueError if there are some of others."""
    file = target.with_name(f"{target.name}.settings.json")
    if not target.exists() or not target.stat().st_size:
        _replace(file, json.dumps(settings, indent=1) + "\n")
        target.touch()
        return
    if not file.exists():
        raise ValueError(f"{target} is there without {file.name}: choose another file")
    before = json.loads(file.read_text(encoding="utf-8"))
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            raise ValueError(
                f"{target} has answers of another run ({name} was {before.get(name)} and is "
                f"{settings.get(name)}): choose another file"
            )


def _read_answers(target: pathlib.Path) -> dict[int, str]:
    """Lines by the number of their prompt; one that an interruption cut short is taken away."""
    whole = target.read_text(encoding="utf-8", errors="replace")
    kept = whole[: whole.rfind("\n") + 1]
    if kept != whole:
        _replace(target, kept)
    lines = kept.split("\n")[:-1]  # only this ends a line: texts may hold U+2028 and the like
    return {json.loads(line)["index"]: f"{line}\n" for line in lines}


def _write(index: int, completion: Completion) -> str:
    answer = {
        "index": index,
        "text": completion.text,
        "tokens": completion.tokens.tolist(),
        "num_forwards": completion.num_forwards,
        "finish_reason": completion.finish_reason,
    }
    return json.dumps(answer, ensure_ascii=False) + "\n"


def _replace(file: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
