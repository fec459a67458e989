"""Files changed at random, and what may come of it: a result, or one sentence."""

import copy
import json
import random
import signal

import pytest

from tests.lib.tiers import more

# Some in every run, ten thousand in the long one.
AT_RANDOM = pytest.mark.parametrize("num", [50, *more(10_000)])

# What stands where something else should.
VALUES = [
    *(None, True, False, 0, 1, -1, 3, 5, 2**31, 10**30, 10**400, 0.5, -0.5, 1e300, 1e-300),
    *(float("nan"), float("inf"), "", "x", "auto", "silu", "é", "\ud800", "\x00", "{{ x }}"),
    *([], [1], [None], ["x"], [[1]], [{}], {}, {"a": 1}, {"type": 3}, {"content": "x"}, {"5": "x"}),
]
_MOST_S = 20


def changed(rng: random.Random, value, values=VALUES, keys=()):
    """A copy of a JSON value with up to three changes, anywhere in it.

    Args:
      rng: chooses.
      value: an object.
      values: what entries may become, besides other entries.
      keys: what else entries may be called.
    """
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        place = rng.choice(list(_containers(value)))
        names = list(place) if isinstance(place, dict) else list(range(len(place)))
        what = rng.random()
        if isinstance(place, dict) and (what < 0.2 or not names):
            place[rng.choice([*keys, *map(str, names), "x"])] = copy.deepcopy(rng.choice(values))
        elif not names:
            place.append(copy.deepcopy(rng.choice(values)))
        elif what < 0.4:
            del place[rng.choice(names)]
        elif what < 0.5:
            place[rng.choice(names)] = copy.deepcopy(place[rng.choice(names)])
        else:
            place[rng.choice(names)] = copy.deepcopy(rng.choice(values))
    return value


def _containers(value):
    if isinstance(value, (dict, list)):
        yield value
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _containers(entry)


def damaged(rng: random.Random, data: bytes, within: int | None = None) -> bytes:
    """Bytes cut off, left out, repeated, or others, among the first `within`; None: among all."""
    end = min(within or len(data), len(data))
    at, num = rng.randrange(end), rng.choice([1, 1, 2, 4, 8, 40])
    what = rng.random()
    if what < 0.15:
        return data[:at]
    if what < 0.3:
        return data[:at] + data[at + num :]
    if what < 0.4:
        return data[:at] + data[max(0, at - num) : at] + data[at:]
    other = rng.choice([rng.randbytes(num), b"\xff" * num, b"\x00" * num, data[:num], b"9" * num])
    return data[:at] + other + data[at + len(other) :]


def to_json(value) -> bytes:
    """As files have it; half characters are escaped."""
    return json.dumps(value).encode()


def outcome(read, *args, errors=(ValueError, FileNotFoundError)):
    """What is read, or None after one sentence."""
    try:
        return read(*args)
    except errors as error:
        said = str(error)
        assert 10 < len(said) < 1000 and "\n" not in said.strip(), said
        return None


def try_all(num: int, test) -> None:
    """Calls a test with `num` sources of chance; a failure names the seed, also of what hangs."""
    before = signal.signal(signal.SIGALRM, _stop)
    try:
        for seed in range(num):
            signal.alarm(_MOST_S)
            try:
                test(random.Random(seed))
            except BaseException as error:  # a library's panic is no Exception
                error.add_note(f"seed {seed}")
                raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _stop(number, frame):
    raise AssertionError(f"still busy after {_MOST_S} s")
