"""Chat templates: the Jinja sources with which models are published, from messages to a prompt.

They are run as `transformers` runs them: sandboxed, with the same tags, filters and names.

Example:
    >>> messages = [{"role": "user", "content": "Hi"}]
    >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    >>> render(template, messages) + " Ho"
    '<user>Hi<assistant> Ho'
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np
from absl import logging

# Names under which messages hold what the model thought; templates read one of the first two.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class Rendered(str):
    """A prompt that a chat template wrote: it is whole, so nothing is put before or behind it.

    It stays one when text is added at its end.
    """

    __slots__ = ()

    def __add__(self, other: str) -> Rendered:
        return Rendered(super().__add__(other))


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any] | None = None,
    tokens: Mapping[str, Any] | None = None,
    now: datetime.date | None = None,
) -> Rendered:
    """The prompt for a conversation.

    As in `transformers`, keys of messages whose value is None count as absent, and what a model
    thought may be called `reasoning_content`, `thinking` or `reasoning`. Unlike there, a warning
    says what of all this the template does not write or read.

    Args:
      template: Jinja source.
      messages: such as `[{"role": "user", "content": "Hi"}]`.
      variables: what else the template sees, by name.
      tokens: special tokens, likewise, but without warnings.
      now: the time that `strftime_now` tells; None: this moment.

    Raises:
      TypeError: `now` is no date or time.
      ValueError: the template is broken, or it refuses the messages, or takes a list of parts for
        text, or there is something else than text, numbers, lists and dictionaries.
    """
    if now is not None and not isinstance(now, datetime.date):
        raise TypeError(f"now={now!r} must be a datetime.datetime or a datetime.date")
    variables = {name: _plain(value, name) for name, value in (variables or {}).items()}
    chat = [_message(_plain(message, "messages")) for message in messages]

    def tell(form: str) -> str:
        return (now or datetime.datetime.now()).strftime(form)

    seen = {"tools": None, "documents": None, "strftime_now": tell, **(tokens or {}), **variables}
    try:
        compiled, reads = _compile(template)
        text = compiled.render(seen, messages=chat)
    except Exception as error:  # templates may do anything
        raise ValueError(f"the chat template cannot write these messages: {error}") from error
    for message in chat:
        content = message.get("content")
        if isinstance(content, list) and content and str(content) in text:
            raise ValueError(
                f"the chat template writes content={content!s:.60}... as Python would print it: "
                "it must be text, not a list of parts"
            )
    unread = [name for name, value in variables.items() if value is not None and name not in reads]
    if unread:
        _warn(template, f"The chat template reads no {' and no '.join(unread)}.")
    if roles := _unwritten(compiled, seen, chat):
        _warn(template, f"The chat template leaves out messages with role {' and '.join(roles)}.")
    return Rendered(text)


def _unwritten(
    compiled: jinja2.Template, seen: Mapping[str, Any], chat: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Roles of messages that the prompt does not show, found by rendering others in their place."""
    marks = {i: f"qz{i}zq" for i, m in enumerate(chat) if isinstance(m.get("content"), str)}
    marked = [{**m, "content": marks.get(i, m.get("content"))} for i, m in enumerate(chat)]
    try:
        text = compiled.render(seen, messages=marked)
    except Exception:  # a template may want what these are not, such as JSON
        return []
    missing = [i for i, mark in marks.items() if chat[i]["content"] and mark not in text]
    return sorted({repr(chat[i].get("role")) for i in missing})


@functools.lru_cache(maxsize=256)
def _warn(template: str, said: str) -> None:
    """Says it once of a template, however many prompts it writes."""
    logging.warning("%s", said)


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> tuple[jinja2.Template, frozenset[str]]:
    """A template, and the names of what it reads."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    reads = jinja2.meta.find_undeclared_variables(environment.parse(template))
    return environment.from_string(template), frozenset(reads)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant wrote; a scope of its own."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, which writes for web pages."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"messages has {message!r}, which must be a dictionary with role, content")
    said = {key: value for key, value in message.items() if value is not None}
    thought = next((said[name] for name in _THOUGHTS if name in said), None)
    if thought is None:
        return said
    return {"thinking": thought} | said | {"reasoning_content": thought}


def _plain(value: Any, name: str) -> Any:
    """A copy made of nothing that a template could misuse."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {_plain(key, name): _plain(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise ValueError(
        f"{name} has a {type(value).__name__}, which must be text, a number, a list or a "
        "dictionary (of a function its JSON schema)"
    )
