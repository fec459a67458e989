"""Monitor-guided decoding: a monitor reads a text as it is written, and says what may follow.

A monitor is dormant until something wakes it, such as the dot behind the name of an object. Then it
asks what is legal there, and nothing else may be written until that is whole. It reads bytes, so
it does not matter how a tokenizer cuts names, dots and half characters into tokens:

    a token is allowed if none of its bytes is refused, one after the other

which is what the source says of tokens that are a piece of a legal name, or end one and go on. It
says more of those that go on to a place where the monitor wakes again, and of those that wake a
dormant monitor and go on (".path" is one token in many vocabularies): these are read, too.

Masked laws are normalised again at each token. That is not the law of the model's texts under the
condition that all of it is legal.

Reference: Agrawal et al., "Guiding Language Models of Code with Global Context using Monitors",
arXiv:2306.10763.

Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

State = Hashable


class Monitor:
    """Says, byte by byte, what may follow a text. States never change: it knows many texts."""

    @property
    def wakes_at(self) -> frozenset[int]:
        """Bytes that may wake it: without one of these among the next bytes it stays dormant."""
        raise NotImplementedError

    def start(self) -> State:
        """The state of an empty text."""
        raise NotImplementedError

    def begin(self, prompt: bytes) -> State:
        """The state behind a prompt, of which everything is right as it stands."""
        state = self.start()
        for byte in prompt:
            following = self.advance(state, byte)
            if following is None:
                released = self.release(state)
                following = self.advance(released, byte)
                following = released if following is None else following
            state = following
        return state

    def advance(self, state: State, byte: int) -> State | None:
        """The state behind one byte more; None: it is refused."""
        raise NotImplementedError

    def is_dormant(self, state: State) -> bool:
        """Whether nothing is asked of what follows."""
        raise NotImplementedError

    def may_end(self, state: State) -> bool:
        """Whether the text may end here: nothing is begun that must be made whole."""
        raise NotImplementedError

    def release(self, state: State) -> State:
        """The dormant state of the same text."""
        raise NotImplementedError


# What ends a name in Python: any character of ASCII that is no part of one.
PYTHON_BREAKS = frozenset(b for b in range(0x80) if not (chr(b).isalnum() or chr(b) == "_"))


def breaks_of(first_word: Callable[[bytes], bytes]) -> frozenset[int]:
    """Bytes that end a name of a language, by what tells the first word of a text in it.

    Those behind which "abc" still is the first word.
    """
    return frozenset(b for b in range(256) if first_word(b"abc" + bytes([b])) == b"abc")
