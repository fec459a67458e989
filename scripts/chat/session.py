"""Lines in, answers out, and commands between them."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator

from decode.conversation import Conversation, Turn
from scripts.chat.screen import Screen

HELP = """\
/system TEXT   the system prompt from now on; without TEXT, none
/reset         begin anew
/stats         what the last answer took, and all of them
/save FILE     write the dialogue as one JSON line, as scripts.answer takes it
/help          this
/quit          leave, as the end of the input does
Lines that begin with // are said with one of them. Ctrl-C ends an answer."""


class Session:
    """A dialogue in a terminal, or through a pipe.

    Attributes:
      talk: the dialogue.
      screen: where it is shown.
      shows_stats: whether every answer is followed by what it took.
    """

    def __init__(self, talk: Conversation, screen: Screen, shows_stats: bool) -> None:
        self.talk, self.screen, self.shows_stats = talk, screen, shows_stats
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._system, "/reset": self._reset, "/stats": self._stats,
            "/save": self._save, "/help": lambda _: print(HELP),
        }  # fmt: skip

    def run(self, lines: Iterable[str]) -> None:
        """Until the lines end, or one of them says /quit."""
        for line in lines:
            line = line.rstrip("\r\n")
            if line.split()[:1] == ["/quit"]:
                return
            try:
                if line.startswith("/") and not line.startswith("//"):
                    self._obey(line)
                elif line.strip():
                    self.answer(line.removeprefix("/") if line.startswith("//") else line)
            except (OSError, ValueError) as error:
                print(f"error: {error}")

    def answer(self, text: str) -> None:
        """What the model says to it, as it is written; Ctrl-C ends that."""
        self.screen.begin()
        number = len(self.talk.turns)
        try:
            with contextlib.closing(self.talk.say(text)) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    self.screen.write(piece.text, piece.ahead)
        except KeyboardInterrupt:
            self.screen.write("")
            print(" [interrupted]", end="")
        print()
        if len(self.talk.turns) == number:
            return
        turn = self.talk.turns[-1]
        if turn.num_dropped:
            print(f"[the context was full: the oldest {turn.num_dropped} messages were dropped]")
        if turn.completion is not None and turn.completion.finish_reason == "length":
            print(f"[cut at {self.talk.gen_len} tokens, see --gen_len]")
        if self.shows_stats:
            print(took(turn))

    def _obey(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise ValueError(f"there is no {name}; /help says what there is")
        self._commands[name](rest.strip())

    def _system(self, text: str) -> None:
        self.talk.system = text or None
        print(f"[system prompt: {text}]" if text else "[no system prompt]")

    def _reset(self, _: str) -> None:
        self.talk.reset()
        print("[a new dialogue]")

    def _stats(self, _: str) -> None:
        turns = self.talk.turns
        if not turns:
            print("[nothing was answered yet]")
            return
        print(took(turns[-1]))
        done = [turn.completion for turn in turns if turn.completion is not None]
        tokens, forwards = (
            sum(len(c.tokens) for c in done), sum(c.num_forwards for c in done)
        )  # fmt: skip
        print(
            f"[{len(done)} whole answers: {tokens} tokens in {forwards} forwards, "
            f"{tokens / max(forwards, 1):.2f} per forward]"
        )

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs the name of a file: /save talk.jsonl")
        with pathlib.Path(name).open("x", encoding="utf-8") as file:
            json.dump({"messages": self.talk.messages}, file, ensure_ascii=False)
            file.write("\n")
        print(f"[{len(self.talk.messages)} messages are in {name}]")


def typed() -> Iterator[str]:
    """Lines from the terminal, until Ctrl-D; Ctrl-C gives a line up."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - makes input() remember lines

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n[/quit leaves]")
        except EOFError:
            print()
            return


def begin(talk: Conversation) -> str:
    """What is said before the first line."""
    first = "/help says what can be typed, /quit leaves."
    if talk.lm.tokenizer is not None and talk.lm.tokenizer.chat_template is None:
        first += "\nThis checkpoint has no chat template: it writes on from what you type."
    return first


def took(turn: Turn) -> str:
    """What an answer took, in one line."""
    num_read = len(turn.prompt) - turn.num_kept
    read = f"{num_read} of {len(turn.prompt)} prompt tokens read"
    read += f" in {turn.read_s:.2f} s" if turn.read_s else " in every forward"
    compiled = f"; {turn.compile_s:.1f} s of compiling" if turn.num_programs else ""
    if turn.completion is None:
        return f"[interrupted; {read}{compiled}]"
    answer = turn.completion
    rate = len(answer.tokens) / max(turn.write_s, 1e-9)
    drafts = ""
    if answer.draft_forwards:
        drafts = f" and {answer.draft_forwards} of the draft"
    return (
        f"[{len(answer.tokens)} tokens in {answer.num_forwards} forwards{drafts}, "
        f"{answer.tokens_per_forward:.2f} per forward, {rate:.1f} tokens/s; {read}{compiled}]"
    )
