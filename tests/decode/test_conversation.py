"""A dialogue: every answer is that to the whole of it, whatever was kept of the turns before."""

import dataclasses
import itertools

import numpy as np
import pytest

from decode import conversation
from decode.complete import complete
from decode.conversation import Conversation
from decode.diffusion.components import Quota
from decode.generate import generate
from decode.speculative.components import DraftModel, Eagle, PromptLookup, SelfSpeculation
from decode.speculative.controller import Controller
from decode.speculative.pearl import Pearl
from tests.lib.tiers import more, often
from tests.lib.untrained import char_lm

SAID = ("hello there", "more of it!", "a longer one " * 40, "and " * 20, "x")
WITH = {
    "plain": lambda lm: dict(),
    "table": lambda lm: dict(method="token_recycling"),
    "draft": lambda lm: dict(drafter=DraftModel.example(lm.cfg, lm.params)),
    "heads": lambda lm: dict(drafter=Eagle.example(lm.cfg, lm.params)),
    "controlled": lambda lm: dict(
        drafter=PromptLookup(num_drafts=4), controller=Controller(costs=np.ones(3))
    ),
}


@pytest.fixture(scope="module")
def lm():
    return char_lm()


@pytest.fixture(scope="module")
def plain(lm):
    """A dialogue without drafts."""
    return talked(lm)


def talked(lm, said=SAID, **options):
    talk = Conversation(lm, **dict(gen_len=16) | options)
    for text in said:
        talk.ask(text)
    return talk


def from_scratch(lm, turns, **options):
    """The texts of `complete` to the prompts of turns."""
    options = dict(gen_len=16) | options
    return [answer.text for answer in complete(lm, [list(t.prompt) for t in turns], **options)]


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("name", ["draft", *often("plain"), *more("table", "heads", "controlled")])
def test_answers_are_those_to_the_whole_dialogue(lm, plain, name):
    talk = plain if name == "plain" else talked(lm, **WITH[name](lm))
    expected = from_scratch(lm, talk.turns) if talk is plain else [t.text for t in plain.turns]
    assert [turn.text for turn in talk.turns] == expected
    assert [turn.prompt for turn in talk.turns] == [turn.prompt for turn in plain.turns]
    lag = 1 + {"draft": 0, "heads": talk.method.drafter.depth + 1}.get(name, 0)
    for before, turn in itertools.pairwise(talk.turns):
        shared = len(before.prompt) + len(before.completion.canvas)
        assert shared - 1 - lag <= turn.num_kept < shared < len(turn.prompt)
    # Another bucket of lengths is another program, another turn is not.
    lengths = [len(turn.prompt) for turn in talk.turns]
    assert lengths[1] < 480 and 512 < lengths[2] < lengths[4] < 992
    assert [bool(turn.num_programs) for turn in talk.turns] == [True, False, True, True, False]


@pytest.mark.exhaustive(every=4)
def test_drawn_answers_belong_to_their_turns(lm):
    options = dict(temperature=0.8, seed=5)
    talk = talked(lm, SAID[:3], method="token_recycling", **options)
    assert [turn.text for turn in talk.turns] == from_scratch(lm, talk.turns, **options)
    assert len({turn.text for turn in talked(lm, SAID[:1] * 2, **options).turns}) == 2


def test_templates_may_change_what_was_said(lm):
    """This one shows of earlier answers their first three letters."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content[:3] if m.role == 'assistant' else "
        "m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = dataclasses.replace(lm.tokenizer, chat_template=template)
    short = dataclasses.replace(lm, tokenizer=tokenizer)
    talk = talked(short, SAID[:3])
    assert [turn.text for turn in talk.turns] == from_scratch(lm, talk.turns)
    for before, turn in itertools.pairwise(talk.turns):
        assert turn.num_kept == len(before.prompt) + 3


@pytest.mark.exhaustive(every=4)
def test_an_answer_may_be_given_up(lm):
    talk = Conversation(lm, gen_len=16, method="token_recycling")
    answer = talk.say("hello there")
    shown = next(answer).text + next(answer).text
    for change in (lambda: talk.say("more"), talk.reset, lambda: setattr(talk, "system", "b")):
        with pytest.raises(ValueError, match="an answer is being written"):
            change()
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": shown}
    assert talk.turns[0].completion is None and talk.turns[0].text == shown
    assert talk.ask("more").text == from_scratch(lm, talk.turns[1:])[0]
    assert talk.turns[1].num_kept >= len(talk.turns[0].prompt)
    for change in (lambda: talk.ask("and this"), talk.reset, lambda: setattr(talk, "system", "b")):
        late = talk.say("and more")
        change()
        with pytest.raises(ValueError, match="the dialogue went on"):
            next(late)
    assert talk.messages == [{"role": "system", "content": "b"}]


def test_an_interrupted_forward_costs_the_cache(lm, monkeypatch):
    """The state was given away, and what it became is not known."""
    talk, calls = Conversation(lm, gen_len=16), []

    def decode(*args):
        calls.append(complete_loop.decode(*args))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return calls[-1]

    complete_loop = conversation.answers.LOOP
    with monkeypatch.context() as patch:
        patch.setattr(
            conversation.answers, "LOOP", dataclasses.replace(complete_loop, decode=decode)
        )
        with pytest.raises(KeyboardInterrupt):
            talk.ask("hello there")
    assert len(talk.messages) == 2 and len(talk.messages[-1]["content"]) == 2
    assert talk.ask("more").text == from_scratch(lm, talk.turns[1:])[0]
    assert talk.turns[1].num_kept == 0
    assert talk.ask("more").text == from_scratch(lm, talk.turns[2:])[0]
    assert talk.turns[2].num_kept > 0


@pytest.mark.exhaustive(every=4)
def test_a_context_that_is_full(lm):
    small = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, max_seq_len=128))
    talk = talked(small, SAID[:2], system="be nice")
    before = list(talk.messages)
    with pytest.raises(
        ValueError, match=r"dialogue has \d+ tokens, .*max_seq_len=128; use drop_ol"
    ):
        talk.say("a longer one " * 4)
    assert talk.messages == before
    talk = talked(small, (*SAID[:2], "a longer one " * 4), system="be nice", drop_oldest=True)
    assert [turn.num_dropped for turn in talk.turns] == [0, 0, 4]
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
    assert [turn.text for turn in talk.turns] == from_scratch(small, talk.turns)
    with pytest.raises(ValueError, match=r"max_seq_len=128; reset it"):
        talk.say("x" * 120)


@pytest.mark.exhaustive(every=4)
def test_beginning_anew(lm):
    talk = talked(lm, SAID[:2], system="be nice")
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "be nice"}] and not talk.turns
    talk.system = "be short"
    assert talk.ask("hello there").text == from_scratch(lm, talk.turns)[0]
    assert 0 < talk.turns[0].num_kept < 20 and talk.turns[0].num_programs == 0
    talk.gen_len = 8  # other shapes
    assert talk.ask("more").text == from_scratch(lm, talk.turns[1:], gen_len=8)[0]


def test_without_a_template_a_text_goes_on(lm):
    bare = dataclasses.replace(lm, tokenizer=dataclasses.replace(lm.tokenizer, chat_template=None))
    talk = talked(bare, ("once", " and "))
    text = "once" + talk.turns[0].text + " and "
    assert list(talk.turns[1].prompt) == lm.tokenizer.encode(text)
    with pytest.raises(ValueError, match="no place for a system prompt"):
        Conversation(bare, system="be nice")


@pytest.mark.exhaustive(every=4)
def test_diffusion_models_talk_too(lm):
    asked = dict(method="klass", block_len=8)
    talk = Conversation(lm, gen_len=16, **asked)
    pieces = list(talk.say("hello there"))
    assert any(piece.ahead for piece in pieces)
    talk.ask("more")
    whole = generate(lm, [list(turn.prompt) for turn in talk.turns], gen_len=16, **asked)
    assert [turn.text for turn in talk.turns] == [answer.text for answer in whole]
    assert [turn.num_kept for turn in talk.turns] == [0, 0]
    assert talk.turns[1].num_programs == 0


@pytest.mark.exhaustive(every=4)
def test_models_of_blocks_talk_from_left_to_right_where_they_draft(lm):
    """A published one, which is decoded by diffusion otherwise."""
    cfg = dataclasses.replace(lm.cfg, never_causal=True, shifted_logits=False, block_len=4)
    blocks = dataclasses.replace(lm, cfg=cfg)
    assert Conversation(blocks, method="klass", block_len=4, gen_len=8).is_diffusion
    talk = talked(blocks, SAID[:2], drafter=SelfSpeculation(4))
    assert [turn.text for turn in talk.turns] == from_scratch(blocks, talk.turns)


def test_what_makes_no_sense_is_refused(lm):
    with pytest.raises(ValueError, match="drafter is for autoregressive models"):
        Conversation(lm, method="klass", drafter=PromptLookup())
    with pytest.raises(ValueError, match="block_len is for diffusion models"):
        Conversation(lm, block_len=8)
    with pytest.raises(ValueError, match="method=beam_4 must be a SpeculativeMethod or"):
        Conversation(lm, method="beam_4")
    pearl = Pearl(DraftModel.example(lm.cfg, lm.params))
    with pytest.raises(ValueError, match="method=Pearl must be a SpeculativeMethod or"):
        Conversation(lm, method=pearl)
    with pytest.raises(ValueError, match="no method 'prompt_lookupp'; close: prompt_lookup"):
        Conversation(lm, method="prompt_lookupp")
    with pytest.raises(ValueError, match="no tokenizer that could be read"):
        Conversation(dataclasses.replace(lm, tokenizer=None))
    for options, error, message in (
        (dict(temprature=1.0), TypeError, "argument 'temprature'. Did you mean 'temperature'?"),
        (dict(rule=Quota(2)), TypeError, r"Conversation\(\) got an unexpected .* argument 'rule'"),
        (dict(gen_len="x"), ValueError, "gen_len='x' must be a whole number"),
        (dict(seed=1.5), ValueError, "seed=1.5 must be a whole number"),
        (dict(template="nothink"), ValueError, "template='nothink' must map names that the chat"),
        (dict(template={"messages": []}), ValueError, "template={'messages': ..} must map names"),
        (dict(system=5), TypeError, "system=5 must be a str, or None"),
    ):
        with pytest.raises(error, match=message):
            Conversation(lm, **options)
    with pytest.raises(TypeError, match="text=None must be a str"):
        Conversation(lm).say(None)
