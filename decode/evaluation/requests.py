"""What evaluation harnesses put into requests, in the words of the decoding loops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from decode.core.requests import whole_number
from decode.core.sampling import FILTERS
from decode.core.texts import GEN_LEN
from dlm import chat
from dlm.tokenizer import Tokenizer

# Names under which requests say how long an answer may be; the first one counts.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
Ids = tuple[list[int], list[int]]


def read_settings(settings: Mapping[str, Any], gen_len: int) -> tuple[dict[str, Any], int]:
    """Keyword arguments of `generate` and `complete`, and the most tokens of an answer.

    Args:
      settings: `until`, one of `LENGTHS`, `do_sample`, `temperature`, the filters of
        `decode.core.sampling`, and `num_beams` if it is 1. Temperatures count unless `do_sample` is
        false, which leaves the method as it is: one that draws draws.
      gen_len: what counts instead of the length there; 0: that does.

    Raises:
      ValueError: a setting is unknown or makes no sense.
    """
    known = ("until", "do_sample", "temperature", *FILTERS, "num_beams", *LENGTHS)
    if unknown := sorted(settings.keys() - set(known)):
        raise ValueError(
            f"generation_kwargs has {unknown[0]}={settings[unknown[0]]!r}, which is not supported; "
            f"there are {', '.join(known)}"
        )
    if settings.get("num_beams", 1) != 1:
        raise ValueError(
            f"num_beams={settings['num_beams']} must be 1: the method says how to search"
        )
    until = settings.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    options: dict[str, Any] = {"stop": [stop for stop in stops if stop]}
    lengths = (settings[name] for name in LENGTHS if settings.get(name) is not None)
    length = gen_len or next(lengths, GEN_LEN)
    temperature = float(settings.get("temperature") or 0.0)
    if settings.get("do_sample") and not temperature > 0:
        raise ValueError(f"do_sample=True needs a temperature above 0, not {temperature:g}")
    does = settings.get("do_sample")
    if temperature > 0 if does is None else does:
        options["temperature"] = temperature
        options |= {k: settings[k] for k in FILTERS if settings.get(k) is not None}
    return options, whole_number("max_gen_toks", length)


def rolling_windows(tokens: Sequence[int], begin: int, size: int) -> Iterator[Ids]:
    """What an autoregressive model of `size` positions is asked to predict a text of any length.

    Yields:
      (what it goes on from, what it predicts): every token is predicted once.
    """
    for start in range(0, len(tokens), size):
        end = min(start + size, len(tokens))
        before = tokens[max(end - size - 1, 0) : start] if start else [begin]
        yield list(before), list(tokens[start:end])


def render_chat(
    tokenizer: Tokenizer, history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
) -> chat.Rendered:
    """The prompt for a conversation.

    Without a generation prompt its last message is the beginning of an answer, to be gone on with:
    what a template writes behind it is left out.

    Raises:
      ValueError: there is no template, it refuses the messages, or it does not write the last one.
    """
    whole = tokenizer.apply_chat_template(history, add_generation_prompt)
    if add_generation_prompt:
        return whole
    last = history[-1]["content"]
    place = whole.rfind(last.strip())
    if place < 0:
        raise ValueError(f"the chat template does not write the last message {last[:40]!r}")
    kept = last.lstrip()  # some templates leave white space at the end out
    end = place + len(kept if whole.startswith(kept, place) else last.strip())
    return chat.Rendered(whole[:end])
