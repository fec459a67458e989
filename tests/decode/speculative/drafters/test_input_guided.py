"""Copies of the input, against the loop of the card in plain Python and the public one's traces."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import Sampling
from decode.speculative.contracts import Context
from decode.speculative.drafters.input_guided import InputGuided
from tests.lib.paths import SHARED
from tests.lib.tiers import more

GOLDEN = SHARED / "goldens" / "iad" / "iad.json"


@functools.partial(jax.jit, static_argnames="eos_ids")
def propose(drafter, tokens, length, prompt_len, state, eos_ids=()):
    B = len(length)
    context = Context(
        params={}, tokens=tokens, length=length, key=jnp.zeros((B, 2), jnp.uint32),
        sampling=Sampling(None), active=jnp.ones(B, bool), cache=None, prompt_len=prompt_len,
    )  # fmt: skip
    made = drafter.propose(types.SimpleNamespace(eos_ids=eos_ids), context, state)
    return made.tree.tokens, made.tree.is_valid, made.grade, made.state


def decode(drafter, cases):
    """Texts of targets that go by the last two tokens of theirs, and what was drafted per call.

    A case has a `source`, `next_token` [V][V], `eos` and `max_len`, and perhaps a whole `prompt`.
    """
    prompts = [case.get("prompt", case["source"]) for case in cases]
    out, calls = [[] for _ in cases], [[] for _ in cases]
    S = max(len(p) + case["max_len"] for p, case in zip(prompts, cases, strict=True))
    S += drafter.num_drafts + 1
    state = drafter.init(None, len(cases), S)
    is_done = lambda b: out[b][-1:] == [cases[b]["eos"]] or len(out[b]) >= cases[b]["max_len"]
    while not all(map(is_done, range(len(cases)))):
        tokens = np.zeros((len(cases), S), np.int32)
        for b, prompt in enumerate(prompts):
            tokens[b, : len(prompt) + len(out[b])] = prompt + out[b]
        lengths = [len(p) + len(text) for p, text in zip(prompts, out, strict=True)]
        drafts, is_valid, grade, state = propose(
            drafter, tokens, np.array(lengths), np.array([len(p) for p in prompts]), state
        )
        drafts, num = np.asarray(drafts)[:, 1:], np.asarray(is_valid).sum(axis=1) - 1
        for b in filter(lambda b: not is_done(b), range(len(cases))):
            calls[b].append((int(num[b]), len(out[b]) + 1, int(grade[b])))
            for draft in [*drafts[b, : num[b]], -1]:
                chosen = following(cases[b], out[b])
                out[b].append(chosen)
                if chosen != draft:
                    break
            out[b] = out[b][: cases[b]["max_len"]]
    return out, calls


def following(case, out):
    a, b = [case["eos"], case["eos"], *out][-2:]
    return int(case["next_token"][a][b])


def by_hand(case):
    """The published loop, whose drafts reach to the end of the source; BOS is the first token."""
    source, eos = case["source"], case["eos"]

    def reentry(out):
        for n in (1, 2, 3):
            suffix = out[-n:]
            ends = [i + n for i in range(len(source) - n + 1) if source[i : i + n] == suffix]
            if len(out) < n or not ends:
                return None
            if len(ends) == 1:
                return ends[0]
        return None

    out, calls = [eos], []
    while (len(out) == 1 or out[-1] != eos) and len(out) < case["max_len"] + 1:
        p = 0 if len(out) == 1 else reentry(out)
        drafts = source[p:] if p is not None else []
        calls.append((len(drafts), len(out)))
        for draft in [*drafts, None]:
            out.append(following(case, out[1:]))
            if out[-1] != draft:
                break
    return out[1 : case["max_len"] + 1], calls


def make_case(rng, edits):
    """A source of few tokens, and a target that copies it but for some pairs of tokens."""
    V, n = int(rng.integers(4, 30)), int(rng.integers(1, 25))
    source = rng.integers(3, max(V, 4), n).tolist()
    table = rng.integers(3, max(V, 4), (30, 30))
    text = [2, 2, *source, 2]
    for a, b, c in zip(text, text[1:], text[2:], strict=False):
        table[a, b] = c if rng.random() >= edits else table[a, b]
    return {"source": source, "next_token": table, "eos": 2, "max_len": 40}


@pytest.mark.parametrize("seed", [0, *more(*range(1, 20))])
def test_texts_and_calls_are_those_of_the_card(seed):
    rng = np.random.default_rng(seed)
    cases = [make_case(rng, edits) for edits in (0, 0.05, 0.1, 0.2, 0.5) * 8]
    out, calls = decode(InputGuided(num_drafts=25), cases)
    drafted = 0
    for case, text, made in zip(cases, out, calls, strict=True):
        expected, expected_calls = by_hand(case)
        assert text == expected and [call[:2] for call in made] == expected_calls
        drafted += sum(call[0] > 0 for call in made[1:])
    assert drafted > 10  # found again


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the shared traces are not here")
def test_golden_iad():
    cases = json.loads(GOLDEN.read_text())["cases"]
    out, calls = decode(InputGuided(num_drafts=30), cases)
    for case, text, made in zip(cases, out, calls, strict=True):
        kept = text[:-1] if text[-1] == case["eos"] else text
        assert kept == case["output"] and len(made) == case["calls"]
        assert [call[0] for call in made] == case["call_drafted"]
        assert [call[1] for call in made] == case["call_committed_before"]


def test_a_copy_of_distinct_tokens_costs_one_call_or_as_many_as_drafts_demand():
    """Longer sources than drafts are gone on with, also where no n-gram says where."""
    source = [3, 4, 5] * 7
    table = np.full((30, 30), 2)
    table[2, 2], table[2, 3], table[3, 4], table[4, 5], table[5, 3] = 3, 4, 5, 3, 4
    case = {"source": source, "next_token": table, "eos": 2, "max_len": 21}
    for num_drafts, expected in ((21, 1), (20, 1), (9, 3), (6, 3), (1, 11)):
        out, ((*calls,),) = decode(InputGuided(num_drafts=num_drafts), [case])
        assert out == [source] and len(calls) == expected, num_drafts
        assert all(grade == 3 for _, _, grade in calls)


def test_the_source_stands_between_the_last_marks():
    """What else the prompt says is not copied; without marks there is no source."""
    source, rng = [5, 6, 7, 8], np.random.default_rng(0)
    table = rng.integers(10, 20, (30, 30))
    for a, b, c in ((2, 2, 5), (2, 5, 6), (5, 6, 7), (6, 7, 8), (7, 8, 2)):
        table[a, b] = c
    case = {"source": source, "next_token": table, "eos": 2, "max_len": 6}
    marked = [9, 21, 22, 5, 5, 23, 9, 21, 22, *source, 23, 1]
    drafter = InputGuided(opening=(21, 22), closing=(23,), num_drafts=8)
    prompts = [marked, source, [21, 22, *source], [23, 21, 22, 5]]
    out, calls = decode(drafter, [case | {"prompt": prompt} for prompt in prompts])
    assert out == [[*source, 2]] * 4
    assert [[call[0] for call in made] for made in calls] == [[4], [0] * 5, [0] * 5, [0] * 5]
    out, calls = decode(InputGuided(opening=(21, 22), num_drafts=8), [case | {"prompt": marked}])
    assert calls[0][0] == (6, 1, 3) and out[0] == [*source, 2]


def test_no_draft_reaches_an_end_of_the_text():
    """Which a source has where it is a dialogue; nothing is written behind it."""
    prompt = np.array([[17, 1, 3, 20, 2, 18, 0, 0], [17, 20, 1, 3, 2, 18, 0, 0]])
    drafter, six = InputGuided((17,), (18,), num_drafts=4), np.array([6, 6])
    for eos_ids, valid in (((), [4, 4]), ((20,), [2, 0]), ((9, 3), [1, 2])):
        drafts, is_valid, _, _ = propose(
            drafter, prompt, six, six, drafter.init(None, 2, 8), eos_ids=eos_ids
        )
        assert (np.asarray(is_valid).sum(axis=1) - 1).tolist() == valid
        assert drafts[:, 1:3].tolist() == [[1, 3], [20, 1]]


def test_marks_that_are_no_tokens_are_refused(toy_cfg):
    with pytest.raises(ValueError, match=r"closing has -1, not in \[0, vocab_size="):
        InputGuided(closing=(-1,)).validate(toy_cfg)
    with pytest.raises(ValueError, match="must be a whole number"):
        InputGuided(opening=(1.5,)).validate(toy_cfg)
