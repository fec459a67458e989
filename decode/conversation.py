"""A dialogue with a model, turn after turn, each answer in pieces as it is written.

    from decode.conversation import Conversation

    talk = Conversation(lm, system="Answer in one sentence.", method="prompt_lookup")
    for piece in talk.say("What is a token?"):
        print(piece.text, end="", flush=True)
    print(talk.ask("And a draft?").text, talk.turns[-1].num_kept)

An answer is that of `complete` or `generate` to the whole dialogue as the chat template writes it:
`talk.turns[-1].prompt` are its token ids. Autoregressive models keep their key/value cache between
turns: of what the template writes now, the tokens that the cache has already seen are not read
again. How many these are is found by comparing, as templates may change earlier turns. Diffusion
models see all of a dialogue in every forward and keep nothing between turns.

Caches have few sizes (512, 1024, ... slots), and so have prompts of diffusion models (128, 192,
256, ... positions), so that most turns compile nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import numpy as np

from decode import complete, generate
from decode.core.requests import encode, read_requests, round_rows, whole_number
from decode.core.results import Completion, read_stops
from decode.core.streaming import Piece, Writing, check_tokenizer, pieces
from decode.core.texts import MethodOptions, check_known, inside
from decode.diffusion.method import DiffusionMethod
from decode.either import is_diffusion
from decode.speculative import answers
from decode.speculative.contracts import Drafter
from decode.speculative.controller import Controller
from decode.speculative.costs import with_costs
from decode.speculative.loop import SpeculativeMethod, SpeculativeState, init_state, prefill
from decode.speculative.renewal import enlarge, renew
from decode.speculative.state import num_rows
from dlm.compilation import Compiling
from dlm.lm import LanguageModel

# The fewest slots of a cache, of which those that nobody has written are hardly read; and the
# shortest length of a prompt before a canvas, whose positions are computed, needed or not.
SLOTS, CANVAS = 512, 128
TURN_CHUNK, CHUNK = 32, 256  # tokens read per forward: of a few, and of many


class Choices(MethodOptions, total=False):
    """The keyword arguments of a `Conversation` that say how to decode."""

    method: str | SpeculativeMethod | DiffusionMethod | None
    drafter: Drafter | None
    controller: Controller | None
    block_len: int | None


@dataclasses.dataclass(frozen=True)
class Turn:
    """What an answer took.

    Attributes:
      prompt: token ids of the dialogue before the answer, as the template writes it.
      text: the answer, as far as it was written.
      completion: None if it was interrupted.
      num_kept: tokens of the prompt that were in the cache and not read again.
      num_dropped: messages that were dropped before it, as the context was full.
      read_s: seconds of reading the rest of the prompt; 0 of diffusion models.
      write_s: seconds of writing, and whatever was done with the pieces meanwhile.
      compile_s: seconds of compiling, or of reading programs from disk, which are in neither.
      num_programs: how many these were.
    """

    prompt: tuple[int, ...]
    text: str
    completion: Completion | None
    num_kept: int
    num_dropped: int
    read_s: float
    write_s: float
    compile_s: float
    num_programs: int


@dataclasses.dataclass
class _Held:
    """What is kept between turns: a state, and the token ids of its text."""

    state: SpeculativeState
    tokens: list[int]


class Conversation:
    """A dialogue with one model.

    Attributes:
      messages: what was said, as chat templates take it: `[{"role": "user", "content": "Hi"}]`. An
        answer that was interrupted counts as far as it came.
      turns: what each answer took.
      gen_len: most tokens of an answer.
      seed: of the first answer; answer i has seed + i.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        system: str | None = None,
        gen_len: int = 256,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        drop_oldest: bool = False,
        template: Mapping[str, Any] | None = None,
        **choices: Unpack[Choices],
    ) -> None:
        """An empty dialogue.

        Without a chat template, what is said and answered is one text, which goes on.

        Args:
          lm: from `dlm.load`, with a tokenizer.
          system: what the template's system message says; None: no such message.
          gen_len: most tokens of an answer, end-of-text included.
          stop: strings that end an answer; it is cut before the first that is whole.
          seed: see above.
          drop_oldest: whether the oldest messages, the system's aside, are dropped where the
            context is full; else that is an error.
          template: what the chat template reads besides, such as {"enable_thinking": False}.
          choices: as of `decode.complete` or `decode.generate`. A diffusion model, or the name of a
            method for one, is decoded by the latter.

        Raises:
          TypeError: `system` is no text, or there is no such option.
          ValueError: on options that make no sense, in one sentence.
        """
        check_known("Conversation", choices, Choices)
        self.lm = lm
        self.gen_len, self.seed = whole_number("gen_len", gen_len), whole_number("seed", seed)
        if not isinstance(template, Mapping | None) or "messages" in (template or {}):
            raise ValueError(
                f"template={template!r} must map names that the chat template reads, messages aside"
            )
        self.messages: list[dict[str, str]] = []
        self.turns: list[Turn] = []
        self._tokenizer = check_tokenizer(lm)
        self._stops, self._template = read_stops(lm, stop), dict(template or {})
        self._drops_oldest = drop_oldest
        self._held: _Held | None = None
        self._bucket = 0  # the prompt length of the state that is held
        self._is_writing = False
        self._change = 0  # goes up whenever something is said, answered or taken back
        method = choices.get("method")
        name = method if isinstance(method, str) else None
        self.is_diffusion = is_diffusion(lm, method, choices.get("drafter"))
        others = ("drafter", "controller") if self.is_diffusion else ("block_len",)
        if wrong := [x for x in others if choices.get(x) is not None]:
            kinds = ["autoregressive", "diffusion"]
            kind, other = kinds if not self.is_diffusion else kinds[::-1]
            raise ValueError(f"{wrong[0]} is for {other} models, and this one decodes as {kind}")
        asked: Any = choices
        if self.is_diffusion:
            self.method: Any = generate.choose(lm, gen_len, asked)
        else:
            self.method = complete.choose(lm, asked)
            if type(self.method) is not SpeculativeMethod:
                raise ValueError(
                    f"method={name or type(method).__name__} must be a SpeculativeMethod or a "
                    "DiffusionMethod: of others no cache is kept from turn to turn"
                )
        self.system = system

    @property
    def system(self) -> str | None:
        """The system message. Another one may be set between answers; what was said stays."""
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        if not isinstance(text, str | None):
            raise TypeError(f"system={text!r} must be a str, or None")
        if text is not None and self._tokenizer.chat_template is None:
            raise ValueError(
                "the checkpoint has no chat template, so there is no place for a system prompt: "
                "say it in the first message"
            )
        self._begin_change()
        said = [message for message in self.messages if message["role"] != "system"]
        self.messages = ([] if text is None else [{"role": "system", "content": text}]) + said

    def reset(self) -> None:
        """Begins anew: nothing but the system message was said.

        Raises:
          ValueError: an answer is being written.
        """
        self._begin_change()
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.turns = []

    def ask(self, text: str) -> Completion:
        """The answer to what the user says. Errors are those of `say`."""
        for piece in self.say(text):
            if piece.completion is not None:
                return piece.completion
        raise AssertionError("the last piece has the completion")

    def say(self, text: str) -> Iterator[Piece]:
        """The answer to what the user says, piece by piece.

        Whoever closes the iterator, or is interrupted (Ctrl-C), has said and heard what there is.

        Raises:
          TypeError: `text` is no string.
          ValueError: the chat template refuses the messages, the context is full, or another answer
            is being written.
        """
        if not isinstance(text, str):
            raise TypeError(f"text={text!r} must be a str")
        self._check_idle()
        messages = [*self.messages, {"role": "user", "content": text}]
        messages, tokens = self._fit(messages)
        read_requests(
            self.lm.cfg, [tokens], [self.gen_len], [self.seed], None, None, None,
            may_be_empty=(generate if self.is_diffusion else answers).LOOP.may_be_empty(
                self.lm.cfg
            ),
        )  # fmt: skip
        return inside(self.lm, self._answer(messages, tokens, self._change))

    def _check_idle(self) -> None:
        if self._is_writing:
            raise ValueError("an answer is being written: take its pieces to the end or close it")

    def _begin_change(self) -> None:
        """What was said before and has no answer yet gets none."""
        self._check_idle()
        self._change += 1

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a dialogue, up to where the answer begins."""
        if self._tokenizer.chat_template is None:
            return encode(self.lm, "".join(message["content"] for message in messages))
        return encode(self.lm, self._tokenizer.apply_chat_template(messages, **self._template))

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The messages that there is room for, and their token ids."""
        most = self.lm.cfg.max_seq_len - self.gen_len
        while len(tokens := self.encode(messages)) > most:
            first = int(messages[0]["role"] == "system")
            users = [i for i, m in enumerate(messages) if i > first and m["role"] == "user"]
            if not (users and self._drops_oldest):
                hint = "use drop_oldest, " if users else ""
                raise ValueError(
                    f"the context is full: the dialogue has {len(tokens)} tokens, which with "
                    f"gen_len={self.gen_len} is more than the model's "
                    f"max_seq_len={self.lm.cfg.max_seq_len}; {hint}reset it, or ask for shorter "
                    "answers"
                )
            messages = messages[:first] + messages[users[0] :]
        return messages, tokens

    def _answer(
        self, messages: list[dict[str, str]], tokens: list[int], change: int
    ) -> Iterator[Piece]:
        """As `say`, if nothing has changed since."""
        if self._is_writing or self._change != change:
            raise ValueError("the dialogue went on since this was said: say it again")
        self._begin_change()
        number = len(self.turns)
        num_dropped = 1 + len(self.messages) - len(messages)
        self._is_writing = True
        writing: Writing | None = None
        completion, num_kept, read_s = None, 0, 0.0
        try:
            with Compiling() as compiling:
                if self.is_diffusion:
                    method, loop = self.method, generate.LOOP
                    state = loop.prepare(self.lm, method, [tokens], **self._asked(tokens, number))
                else:
                    loop = answers.LOOP
                    method, state = self._begin(tokens, number)
                    num_kept = int(state.num_read[0])
                    before, start = compiling.seconds, time.perf_counter()
                    state = prefill(self.lm.params, self.lm.cfg, method, state)
                    jax.block_until_ready(state.cache)
                    read_s = time.perf_counter() - start - (compiling.seconds - before)
                writing = Writing(state)
                before, start = compiling.seconds, time.perf_counter()
                for piece in pieces(self.lm, loop, method, writing, self._stops):
                    completion = piece.completion
                    yield piece
        finally:
            self._is_writing = False
            if writing is not None:
                write_s = time.perf_counter() - start - (compiling.seconds - before)
                self._remember(writing.state)
                self.messages = [*messages, {"role": "assistant", "content": writing.text}]
                self.turns.append(
                    Turn(
                        tuple(tokens), writing.text, completion, num_kept, num_dropped, read_s,
                        write_s, compiling.seconds, compiling.num,
                    )
                )  # fmt: skip

    def _asked(self, tokens: list[int], number: int) -> dict[str, Any]:
        """The request of a turn, in one of few shapes."""
        if self.is_diffusion:
            buckets = (CANVAS * n // 2 << k for k in itertools.count() for n in (2, 3))
        else:
            others = self.gen_len + num_rows(self.lm.cfg, self.method)
            buckets = ((SLOTS << k) - others for k in itertools.count())
        P = next(n for n in buckets if n >= len(tokens))
        return dict(
            gen_len=[self.gen_len],
            seeds=[self.seed + number],
            prompt_len=min(P, self.lm.cfg.max_seq_len - self.gen_len),
            canvas_len=self.gen_len,
            batch_size=round_rows(1, None),
        )

    def _begin(self, tokens: list[int], number: int) -> tuple[SpeculativeMethod, SpeculativeState]:
        """The method, which knows its costs, and the state of a turn, of which some may be read."""
        lm, asked, num_kept = self.lm, self._asked(tokens, number), 0
        held, self._held = self._held, None  # its arrays are given away
        if held is None or held.state.step_map.shape[1] != self.gen_len:
            held, self._bucket = None, 0
        bucket, self._bucket = self._bucket, max(self._bucket, asked["prompt_len"])
        asked["prompt_len"] = self._bucket
        start = lambda method: init_state(lm.cfg, method, [tokens], **asked)  # noqa: E731
        method = with_costs(lm.params, lm.cfg, self.method, start)
        state = start(method) if held is None or bucket != self._bucket else held.state
        if held is not None:
            same = (a == b for a, b in zip(held.tokens, tokens, strict=False))
            num_kept = sum(itertools.takewhile(bool, same))
            if state is not held.state:
                state = enlarge(state, held.state)
        chunk = TURN_CHUNK if len(tokens) - num_kept <= 4 * TURN_CHUNK else CHUNK
        state = renew(
            lm.cfg, method, state, [tokens],
            num_kept=num_kept, gen_len=[self.gen_len], seeds=asked["seeds"], chunk=chunk,
        )  # fmt: skip
        return method, state

    def _remember(self, state: Any) -> None:
        """Keeps the cache of a text, unless an interruption has cost it."""
        if self.is_diffusion or any(x.is_deleted() for x in jax.tree.leaves(state)):
            return
        written = np.asarray(state.tokens)[0, : int(state.length[0])]
        self._held = _Held(state, written.tolist())
