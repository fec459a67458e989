"""What monitors allow: the rules of the card on suffixes, automata, and Python's introspection."""

import io
import re
import tokenize

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from decode.constraints.monitors.automaton import Automaton, AutomatonMonitor
from decode.constraints.monitors.contracts import PYTHON_BREAKS, breaks_of
from decode.constraints.monitors.dereference import IntrospectionMonitor, Reading
from decode.constraints.monitors.joint import JointMonitor
from decode.constraints.monitors.python import PythonMonitor
from decode.constraints.monitors.watched import Vocabulary, Watched
from dlm.token_bytes import token_bytes
from dlm.tokenizer import Tokenizer, byte_tokenizer, word_tokenizer

NAMES = {"T": ["name", "nation", "x", "\N{LATIN SMALL LETTER E WITH ACUTE}"]}
MONITOR = IntrospectionMonitor(NAMES, {"obj": "T", "a.b": "T"})


def by_rules(word, left, breaks=PYTHON_BREAKS):
    """Whether a token is allowed while suffixes are `left`, as the card says: (a) or (b)."""
    return any(q.startswith(word) or (word.startswith(q) and word[len(q)] in breaks) for q in left)


def after(monitor, text):
    """The state behind a text, of which every byte is read."""
    state = monitor.start()
    for byte in text:
        behind = monitor.advance(state, byte)
        if behind is None:
            behind = monitor.advance(monitor.release(state), byte)
        state = behind
    return state


def allows(monitor, prompt, text):
    state = monitor.begin(prompt.encode())
    for byte in text.encode():
        if state is not None:
            state = monitor.advance(state, byte)
    return state is not None


# ---- Bytes of tokens ----------------------------------------------------------------------------


def test_what_ends_a_name_is_what_pythons_lexer_says():
    def first_word(text):
        try:
            lines = io.StringIO(text.decode("latin-1")).readline
            return next(tokenize.generate_tokens(lines)).string.encode("latin-1")
        except (tokenize.TokenError, SyntaxError):  # of what stands behind the word
            return b"abc"

    assert breaks_of(first_word) & set(range(0x80)) == PYTHON_BREAKS


def test_bytes_of_tokens():
    said = "na\N{LATIN SMALL LETTER E WITH ACUTE}ve \N{SNOWMAN}\n<|endoftext|>"
    tokenizer = byte_tokenizer()
    words = token_bytes(tokenizer, 300)
    joined = b"".join(words[i] for i in tokenizer.encode(said))
    assert joined == said.encode().removesuffix(b"<|endoftext|>")
    assert words[256:] == (b"",) * 44
    assert token_bytes(word_tokenizer(["a.", "b"]), 5) == (b"a.", b"b", b"", b"", b"")
    backend = Backend(
        models.WordLevel({"\N{LOWER ONE EIGHTH BLOCK}a": 0, "<0xC3>": 1, "</s>": 2}, "</s>")
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    assert token_bytes(Tokenizer(backend, 2, 2), 3) == (b" a", b"\xc3", b"")


# ---- Members ------------------------------------------------------------------------------------


def test_masks_are_those_of_the_rules():
    """Random tables and tokens; none of these goes on to another dot."""
    rng = np.random.default_rng(0)
    letters = list(b"abc(_ ")
    for _ in range(40):
        draw = lambda high, among: bytes(rng.choice(among, rng.integers(1, high)).tolist())
        names = {draw(4, list(b"abc_")).decode() for _ in range(4)}
        monitor = IntrospectionMonitor({"T": sorted(names)}, {"v": "T"})
        words = sorted({draw(5, letters) for _ in range(60)})
        vocabulary = Vocabulary([*words, b""])
        state = after(monitor, b"v.")
        while state.left is not None:
            mask = vocabulary.mask(monitor, state)
            assert mask.tolist() == [*(by_rules(w, state.left) for w in words), False]
            byte = rng.choice(sorted({q[0] for q in state.left if q} | {ord("(")}))
            state = monitor.advance(state, int(byte)) or monitor.release(state)
        assert vocabulary.mask(monitor, state).all()


def test_states_follow_from_the_text():
    """Step by step, from scratch, and where a prompt ends in the middle of a name."""
    rng = np.random.default_rng(1)
    for monitor in (
        MONITOR,
        AutomatonMonitor(Automaton.words(["na", "x"]), "obj."),
        PythonMonitor(),
    ):
        for _ in range(20):
            pieces = rng.choice(["obj.", "na", "me", "x", "(", ".", "a", "b", " ", "zz"], 12)
            text = "".join(pieces).encode()
            cut = int(rng.integers(len(text)))
            state = monitor.begin(text[:cut])
            for byte in text[cut:]:
                behind = monitor.advance(state, byte)
                if behind is None:
                    behind = monitor.advance(monitor.release(state), byte)
                state = behind
            assert state == after(monitor, text) == monitor.begin(text)


def test_every_name_can_be_written_in_any_pieces():
    words = [*(bytes([b]) for b in range(256)), b"na", b"me(", b"name()", b".x", b"obj.", b"tion "]
    watched = Watched(MONITOR, Vocabulary(words), ())
    prompt = [words.index(b"obj.")]
    for name in NAMES["T"]:
        text = name.encode() + b"()"

        def ways(state, rest):
            found = []
            for i, word in enumerate(words):
                if rest.startswith(word) and (behind := watched.advance(state, i)) is not None:
                    assert watched.allowed(state)[i]
                    left = rest[len(word) :]
                    found += [[word, *way] for way in (ways(behind, left) if left else [[]])]
            return found

        every = ways(watched.begin(prompt), text)
        assert [bytes([b]) for b in text] in every
        assert ([b"name()"] in every) == (name == "name")
        assert ([b"na", b"me(", b")"] in every) == (name == "name")


@pytest.mark.parametrize(
    ("prompt", "text", "is_allowed"),
    [
        ("obj.", "name", True),
        ("obj.", "nam", True),
        ("obj.", "names", False),
        ("obj.", "other", False),
        ("obj.", " name", False),  # no space behind a dot
        ("obj.", "(", False),
        ("obj.na", "me(", True),
        ("obj.na", "other", False),
        ("ob", "j.other", False),  # it is awake inside of a token, too
        ("obj.", "name; obj.other", False),
        ("obj.", "name.whatever", True),  # nothing is known of that
        ("a.b", ".x ", True),
        ("a.b", ".y", False),
        ("c.a.b", ".y", True),  # another thing
        ("foo(obj).", "y", True),
        ("myobj", ".y", True),
        ("1", ".5", True),
        ("obj.zz", "y", True),  # what was given is as it is
    ],
)
def test_what_may_stand_behind_a_dot(prompt, text, is_allowed):
    assert allows(MONITOR, prompt, text) == is_allowed


def test_half_a_character_is_a_beginning():
    vocabulary = Vocabulary([b"\xc3", b"\xa9", b"\xe2", b"x"])
    state = after(MONITOR, b"obj.")
    assert vocabulary.mask(MONITOR, state).tolist() == [True, False, False, True]
    state = MONITOR.advance(state, 0xC3)
    assert vocabulary.mask(MONITOR, state).tolist() == [False, True, False, False]


def test_where_nothing_is_known_nothing_is_asked():
    monitor = IntrospectionMonitor({"T": list("abc"), "empty": []}, {"v": "T", "e": "empty"})
    assert not monitor.is_dormant(after(monitor, b"v."))
    assert monitor.is_dormant(after(monitor, b"e.")) and monitor.is_dormant(after(monitor, b"w."))
    few = IntrospectionMonitor({"T": list("abc")}, {"v": "T"}, max_names=2)
    assert few.is_dormant(after(few, b"v."))
    released = MONITOR.release(after(MONITOR, b"obj."))
    assert released == Reading(b"obj.") and MONITOR.may_end(released)
    assert not MONITOR.may_end(after(MONITOR, b"obj.nam")) and MONITOR.may_end(
        after(MONITOR, b"obj.x")
    )


# ---- Automata -----------------------------------------------------------------------------------


def test_members_of_an_enumeration():
    monitor = AutomatonMonitor(Automaton.words(["RED", "REDDISH", "BLUE"]), "Color.")
    for text, is_allowed in [
        ("Color.RED)", True), ("Color.REDDISH", True), ("Color.REDD)", False),
        ("Color.GREEN", False), ("x = Color.BLUE\nGREEN", True), ("Color.RED + Color.B)", False),
        ("Colour.GREEN", True),
    ]:  # fmt: skip
        assert allows(monitor, "", text) == is_allowed, text


def test_the_protocol_of_an_object():
    calls = {
        "new": {"open": "open"},
        "open": {"read": "open", "readline": "open", "close": "closed"},
    }
    monitor = AutomatonMonitor(Automaton.protocol(calls, "new"), "f.")
    for text, is_allowed in [
        ("f.open() f.read() f.readline() f.close() f.whatever", True), ("f.read()", False),
        ("f.open() f.open()", False), ("f.open() g.open() f.read()", True),
        ("f.open() f.close() f.read()", True),  # of closed ones nothing is said
    ]:  # fmt: skip
        assert allows(monitor, "", text) == is_allowed, text


def test_a_whole_answer():
    """Without a trigger it is awake from the first byte behind the prompt, to the end."""
    edges = {0: {ord(d): 1 for d in "123"}, 1: {ord(","): 0}}
    monitor = AutomatonMonitor(Automaton(edges, frozenset({1})), "")
    pattern = re.compile(r"[123](,[123])*")
    rng = np.random.default_rng(2)
    for _ in range(200):
        text = "".join(rng.choice(list("123,,4 "), rng.integers(1, 6)))
        state = after(monitor, b"")
        for byte in text.encode():
            state = state and monitor.advance(state, byte)
        is_whole = state is not None and monitor.may_end(state)
        assert is_whole == bool(pattern.fullmatch(text))
    assert monitor.begin(b"anything") == monitor.start()
    words = [b"1", b",", b"1,", b"4", b""]
    mask = Vocabulary(words).mask(monitor, monitor.start())
    assert mask.tolist() == [True, False, True, False, False]
    assert monitor.is_dormant(monitor.release(monitor.start()))


def test_joint_masks_are_intersections():
    first = IntrospectionMonitor({"T": ["red", "blue", "name"]}, {"v": "T"})
    second = AutomatonMonitor(Automaton.words(["red", "blue", "green"]), "v.")
    both = JointMonitor((first, second))
    words = [b"r", b"red", b"red)", b"n", b"green", b"blue", b"v.", b"v.name", b"v.red", b"x", b""]
    vocabulary = Vocabulary(words)
    for text in (b"", b"v", b"v.", b"v.r", b"v.red", b"v.blue", b"w."):
        masks = [vocabulary.mask(m, after(m, text)) for m in (first, second)]
        np.testing.assert_array_equal(
            vocabulary.mask(both, after(both, text)), masks[0] & masks[1], str(text)
        )
    asleep = vocabulary.mask(both, both.start())
    assert [w for w, is_allowed in zip(words, asleep, strict=True) if not is_allowed] == [b"v.name"]
    released = both.release(after(both, b"v."))
    assert both.is_dormant(released) and not both.is_dormant(after(both, b"v."))


# ---- Python -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "name", "is_allowed"),
    [
        ("import math\nx = math.", "sqrt(", True),
        ("import math\nx = math.", "squareroot", False),
        ("import math as m\nx = m.", "squareroot", False),
        ("import os.path\nos.path.", "joined", False),
        ("import os.path\nos.path.", "join(", True),
        ("from collections import deque\ndeque.", "appendright", False),
        ("from collections import deque\nd = deque()\nd.", "appendright", True),  # not known
        ("x = []\nx.", "append(", True),
        ("x = []\nx.", "push(", False),
        ("x = []\nx = {}\nx.", "push(", True),  # one or the other
        ("x = 'a'\nx = f'{x}'\nx.", "push(", False),  # a string, either way
        ("x = []\nfor x in y:\n    x.", "push(", True),
        ("import math\nfrom things import *\nmath.", "squareroot", True),  # anything may be there
        ("x = []\nmatch y:\n    case {**x}:\n        x.", "push(", True),
        ("x = []\ntry:\n    for x in y:\n        x.", "push(", True),
        ("def f(x):\n    return x.", "push(", True),
        ("import math\nfoo([1,\n  (2, math.", "squareroot", False),  # brackets are open
        ("import math\nif math.", "squareroot", False),
        ("import math\ntry:\n    y = math.", "squareroot", False),
        ("import math\n'math.", "squareroot", True),  # a string
        ("import math\n# math.", "squareroot", True),  # a comment
        ("import math\nfoo().math.", "squareroot", True),
        ("import antigravity\nantigravity.", "squareroot", True),  # is not imported
        ("import math\nmath.", "import", False),  # a keyword
        ("math.", "squareroot", True),
    ],
)
def test_members_by_introspection(program, name, is_allowed):
    assert allows(PythonMonitor(), program, name) == is_allowed


# ---- Refusals -----------------------------------------------------------------------------------


def test_nonsense_is_refused():
    for make, message in (
        (lambda: IntrospectionMonitor({}, {"v": "T"}), r"variables\['v'\]='T' must be a type"),
        (lambda: IntrospectionMonitor({"T": ["a b"]}, {}), "has 'a b', which must be a name"),
        (lambda: IntrospectionMonitor({}, {}, max_names=0), "max_names=0 must be at least 1"),
        (lambda: PythonMonitor(max_names=0), "max_names=0 must be at least 1"),
        (lambda: PythonMonitor(["math"]), r"modules=\['math'\] must be a tuple of names"),
        (lambda: PythonMonitor("math"), "modules='math' must be a tuple of names"),
        (lambda: JointMonitor(()), r"monitors=\(\) must have at least one"),
        (lambda: Automaton.words([""]), "has an empty method: leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
