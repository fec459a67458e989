"""A dialogue by command: commands and answers from a pipe, and what a terminal shows."""

import io
import json
import re

import pytest

import dlm
from decode.conversation import Conversation
from scripts.chat import screen
from scripts.chat.screen import DIM, PLAIN, Screen
from scripts.chat.session import Session
from tests.lib.mains import run_main
from tests.lib.untrained import char_lm


@pytest.fixture(scope="module")
def lm():
    return char_lm()


def piped(monkeypatch, lines, *flags, code=0):
    """What the command prints, told these lines."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    return run_main("scripts.chat", *flags, code=code)


def test_a_dialogue_through_a_pipe(lm, tmp_path, monkeypatch):
    model, saved = tmp_path / "model", tmp_path / "talk.jsonl"
    dlm.save(model, lm)
    lines = [
        "hello there", "/stats", "", "//ok", "/nonsense x", "/save", f"/save {saved}",
        f"/save {saved}", "/system be nice", "hi", "/reset", "/stats", "/help", "/quit", "never",
    ]  # fmt: skip
    flags = [f"--checkpoint={model}", "--gen_len=16", "--drafter=token_recycling", "--stats"]
    said = piped(monkeypatch, lines, *flags).splitlines()
    assert said.pop(1) == "[cut at 16 tokens, see --gen_len]"
    said.remove("[cut at 16 tokens, see --gen_len]")  # the other answer, too
    talk = Conversation(dlm.load(model), gen_len=16)
    answers = [talk.ask("hello there").text]
    with pytest.raises(ValueError, match="not covered by the vocabulary"):
        talk.ask("/ok")
    assert said[0] == answers[0]
    assert re.fullmatch(
        r"\[1?\d tokens in \d+ forwards, \d\.\d\d per forward, [\d.]+ tokens/s; 28 of 28 prompt "
        r"tokens read in [\d.]+ s; [\d.]+ s of compiling\]", said[1],
    ), said[1]  # fmt: skip
    assert said[2] == said[1] and said[3].startswith("[1 whole answers: ")
    assert "error: text[" in said[4] and "'/ok<assistant>'" in said[4]
    assert said[5] == "error: there is no /nonsense; /help says what there is"
    assert said[6].startswith("error: /save needs") and said[7] == f"[2 messages are in {saved}]"
    assert said[8].startswith("error: ") and "exists" in said[8]
    assert said[9] == "[system prompt: be nice]"
    talk.system = "be nice"
    assert said[10] == talk.ask("hi").text
    assert " prompt tokens read in " in said[11] and said[12] == "[a new dialogue]"
    assert said[13] == "[nothing was answered yet]" and said[-1].startswith("Lines that begin")
    (line,) = map(json.loads, saved.read_text().splitlines())
    assert [m["content"] for m in line["messages"]] == ["hello there", answers[0]]
    # A diffusion method of the same weights; and what makes no sense.
    flags = [f"--checkpoint={model}", "--gen_len=16"]
    text, *_ = piped(monkeypatch, ["hello there"], *flags, "--method=klass").splitlines()
    assert text == Conversation(dlm.load(model), gen_len=16, method="klass").ask("hello there").text
    wrong = piped(monkeypatch, [], *flags, "--method=klas", code=1)
    assert "error: there is no method 'klas'" in wrong and "Traceback" not in wrong


def test_ctrl_c_ends_an_answer(lm, capsys):
    class Interrupted(Screen):
        def write(self, text, ahead=""):
            super().write(text, ahead)
            if text and len(self.out.getvalue()) > 3:
                raise KeyboardInterrupt

    talk = Conversation(lm, gen_len=16)
    shown = Interrupted(io.StringIO(), False)
    session = Session(talk, shown, True)
    session.run(["hello there"])
    assert "[interrupted" in capsys.readouterr().out
    assert talk.messages[-1]["content"] == shown.out.getvalue()
    Session(talk, Screen(io.StringIO(), False), False).run(["more", "/stats"])
    assert len(talk.messages) == 4 and talk.turns[1].num_kept > len(talk.turns[0].prompt) - 2


def test_what_a_terminal_shows(monkeypatch):
    """Whatever is certain stays as it is; what is behind it is what it is now."""
    width = 10
    monkeypatch.setattr(screen.shutil, "get_terminal_size", lambda: (width, 8))
    for steps in (
        [("ab", "cd···"), ("", "cd·ef"), ("cdef", "gh"), ("gh", "")],
        [("0123456789", "ab"), ("", "abc"), ("ab", "c")],  # ends in the last column
        [
            ("", "0123456789"),
            ("01234", "56789abcdefghi"),
            ("56789", "abcdefghij"),
            ("abcdefghij", ""),
        ],
        [("one\n", "two\nthree"), ("two", "\nthree four five"), ("\nthr", "ee")],
        [("日本語日本", "語·"), ("語", "日本語日本語"), ("日", "")],  # two columns each
        [("", "x" * 300), ("x", "y" * 3)],  # more than fits
        [("a\x1b[2Jb", "\x07c")],  # nothing that would command the terminal
    ):
        terminal, text = Terminal(width), ""
        out = Screen(terminal, True)
        out.begin()
        for new, ahead in steps:
            out.write(new, ahead)
            text += re.sub(r"[\x07\x1b]", "\N{REPLACEMENT CHARACTER}", new)
            ahead = re.sub(r"[\x07\x1b]", "\N{REPLACEMENT CHARACTER}", ahead)
            plain, dim = terminal.shown()
            assert plain == laid_out(text, width)
            assert dim == ahead.replace("\n", "") or ("x" * 30 in dim and dim in ahead)
    monkeypatch.setattr(screen.shutil, "get_terminal_size", lambda: (width, 1))
    terminal = Terminal(width)
    Screen(terminal, True).write("ab", "cd")  # there is no room for what is not certain
    assert terminal.shown() == (laid_out("ab", width), "")


def laid_out(text, width):
    """A text as rows of a terminal."""
    terminal = Terminal(width)
    terminal.write(text)
    return terminal.shown()[0]


class Terminal:
    """As much of a terminal as `Screen` needs: rows, a cursor, wrapping when the next one comes."""

    def __init__(self, width):
        self.width, self.cells, self.row, self.column, self.is_dim = width, {}, 0, 0, False

    def write(self, text):
        for part in re.split(r"(\x1b\[\d*[A-Za-z]|\r|\n)", text):
            if part in (DIM, PLAIN):
                self.is_dim = part == DIM
            elif part == "\r":
                self.column = 0
            elif part == "\n":
                self.row, self.column = self.row + 1, 0
            elif match := re.fullmatch(r"\x1b\[(\d*)([ACJ])", part):
                n, what = int(match[1] or 1), match[2]
                self.row -= n * (what == "A")
                self.column = min(self.column + n * (what == "C"), self.width - 1)
                assert self.row >= 0
                if what == "J":
                    here = (self.row, self.column)
                    self.cells = {at: cell for at, cell in self.cells.items() if at < here}
            else:
                assert "\x1b" not in part
                for character in part:
                    cells = 2 if ord(character) in range(0x3000, 0xA000) else 1
                    if self.column + cells > self.width:
                        self.row, self.column = self.row + 1, 0
                    self.cells[self.row, self.column] = (character, self.is_dim)
                    self.column += cells

    def flush(self):
        pass

    def shown(self):
        """Cells that are certain; the text that may change."""
        certain = {at: c for at, (c, is_dim) in self.cells.items() if not is_dim}
        return certain, "".join(c for _, (c, is_dim) in sorted(self.cells.items()) if is_dim)
