"""What evaluation harnesses ask of a language model: texts to go on with, answers to judge.

    answerer = Answerer(lm=dlm.load("path/to/checkpoint"), method="klass", gen_len=256)
    answerer.generate([("Question: 1+1?\\nAnswer:", {"until": ["\\n"]})])

Requests and answers are those of lm-evaluation-harness (`decode.evaluation.lm_eval`), which is not
needed here. Diffusion models write by `decode.generate` and judge by the Monte Carlo bound of
`decode.likelihood`; autoregressive ones write by `decode.complete` and judge exactly. Each request
has a random stream of its own, and its answer depends on nothing else that is asked.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from decode import complete, generate
from decode.causal_likelihood import causal_log_likelihood
from decode.core.requests import encode, whole_number
from decode.diffusion.loop import DiffusionMethod
from decode.either import is_diffusion
from decode.evaluation.record import Answer, Record
from decode.evaluation.requests import Ids, read_settings, rolling_windows
from decode.files import describe
from decode.likelihood import answer_slots, encode_pair, greedy_match, log_likelihood, prompt_slots
from decode.speculative.loop import SpeculativeMethod
from dlm.compilation import Compiling
from dlm.lm import LanguageModel, fingerprint
from dlm.tokenizer import Tokenizer

# What requests or other fields say.
SAID_ELSEWHERE = {"method", "guidance", "temperature", "top_logprobs"}
_CHUNK = 64  # pairs, at least, that are judged before they are written down


@dataclasses.dataclass(kw_only=True)
class Answerer:
    """A language model, and how it is asked.

    Attributes:
      lm: from `dlm.load`, with a tokenizer.
      method: a name of `decode.diffusion.points` or `decode.speculative.points`, or a method; it
        decides between the two loops. None: the model's own loop with its defaults.
      options: more keyword arguments of `generate` or `complete` on which answers depend, such as
        `cache` and `block_len`.
      gen_len: most tokens of an answer; 0: what each request says, and 256 where it says nothing.
      guidance: of diffusion models, when they write and when they judge.
      num_samples: masked copies per judged answer, see `decode.likelihood`.
      antithetic: whether these come in pairs.
      checks_greedy: whether a diffusion model says if its greedy text is the judged answer, which
        takes a forward per token; else False is said.
      batch_size: rows at once. Of diffusion models it changes what is judged, within its errors.
      seed: another one, other random streams.
      record: a file of what was answered, with which a run goes on; None: there is none.
      num_cut: prompts so far that were too long, and lost their beginning.
      num_begun: requests so far without anything to go on from, which got a begin token.
      compile_s: seconds of compiling so far.
    """

    lm: LanguageModel
    method: str | DiffusionMethod | SpeculativeMethod | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gen_len: int = 0
    guidance: float | None = None
    num_samples: int = 128
    antithetic: bool = False
    checks_greedy: bool = False
    batch_size: int = 32
    seed: int = 0
    record: str | os.PathLike[str] | None = None
    num_cut: int = dataclasses.field(default=0, init=False)
    num_begun: int = dataclasses.field(default=0, init=False)
    compile_s: float = dataclasses.field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.lm.tokenizer is None:
            raise ValueError("tasks are text, and the checkpoint has no tokenizer to read it with")
        if whole_number("gen_len", self.gen_len) < 0:
            raise ValueError(f"gen_len={self.gen_len} must be at least 0")
        loop, name = (generate, "generate") if self.is_diffusion else (complete, "complete")
        known = loop.Choices.__optional_keys__ - SAID_ELSEWHERE
        if unknown := sorted(self.options.keys() - known):
            value = self.options[unknown[0]]
            raise ValueError(
                f"options has {unknown[0]}={value!r}, which is no choice of decode.{name}, or said "
                "elsewhere: leave it out"
            )
        for name in ("guidance", "antithetic", "checks_greedy"):
            if (value := getattr(self, name)) and not self.is_diffusion:
                raise ValueError(f"{name}={value} must be left out: only diffusion models take it")
        self._record = Record(self.record)
        self._written: list[str] = []  # keys
        self._model = {"model": fingerprint(self.lm), "dtype": self.lm.cfg.dtype}

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.lm.tokenizer is not None
        return self.lm.tokenizer

    @property
    def is_diffusion(self) -> bool:
        """Which loop it is."""
        return is_diffusion(self.lm, self.method, self.options.get("drafter"))

    def generate(
        self, requests: Sequence[tuple[str, Mapping[str, Any]]], *, progress: bool = False
    ) -> list[str]:
        """Texts that go on from contexts, each cut before the first of its stop strings.

        Args:
          requests: (context, settings). Settings are those of `decode.evaluation.requests`.
          progress: whether to show a bar.

        Raises:
          ValueError: a request makes no sense or has other settings, or what `decode.generate` or
            `decode.complete` raise.
        """
        hashes = self._hashes("generate_until", requests)
        keys = self._keys(hashes, self._how_written)
        groups: dict[str, list[tuple[int, list[int], int]]] = collections.defaultdict(list)
        for i, (context, settings) in enumerate(requests):
            if keys[i] not in self._record.found:
                options, length = read_settings(settings, self.gen_len)
                prompt = self._begin(encode(self.lm, context), not self._may_be_empty)
                prompt = self._fit(prompt, self.lm.cfg.max_seq_len - length, length)
                groups[json.dumps(options, sort_keys=True)].append((i, prompt, length))
        decode: Any = generate.as_finished if self.is_diffusion else complete.as_finished
        own = {"method": self.method, **self.options}
        if self.is_diffusion:
            own["guidance"] = self.guidance
        with self._record.adding() as add, Compiling() as compiling:
            last = time.perf_counter()
            for said, members in groups.items():
                found = decode(
                    self.lm, [prompt for _, prompt, _ in members],
                    gen_len=[length for _, _, length in members],
                    seed=[int(hashes[i][:16], 16) for i, _, _ in members],
                    batch_size=self.batch_size, progress=progress, **own, **json.loads(said),
                )  # fmt: skip
                for n, completion in found:
                    now = time.perf_counter()
                    answer = {
                        "request": "generate_until",
                        "text": completion.text,
                        "tokens": completion.tokens.tolist(),
                        "num_forwards": completion.num_forwards,
                        "finish_reason": completion.finish_reason,
                        "seconds": now - last,  # since the answer before: they add up
                    }
                    add(keys[members[n][0]], answer)
                    last = now
        self.compile_s += compiling.seconds
        self._record.put_in_order(keys)
        self._written += keys
        return [self._record.found[key]["text"] for key in keys]

    def score(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations given contexts, and whether greedy text is the same.

        White space at the end of a context belongs to the continuation. Without a context, what an
        autoregressive model goes on from is its begin token, or its end-of-text.

        Raises:
          ValueError: a continuation is empty or too long.
        """
        if self.is_diffusion and not self.checks_greedy:
            logging.log_first_n(
                logging.WARNING, "Whether greedy texts are the same is not looked at, and reported "
                "as no: tasks that count it need checks_greedy.", 1,
            )  # fmt: skip
        hashes = self._hashes("loglikelihood", requests)
        keys = self._keys(hashes, self._how_judged)
        todo = [i for i in range(len(requests)) if keys[i] not in self._record.found]
        pairs = [self._pair(i, *requests[i]) for i in todo]
        order = sorted(range(len(todo)), key=lambda n: _shape(pairs[n]))
        size = max(_CHUNK, 4 * self.batch_size)
        with self._record.adding() as add:
            for first in range(0, len(order), size):
                some = order[first : first + size]
                seeds = [int(hashes[todo[n]][:8], 16) for n in some]
                judged = self._judge([pairs[n] for n in some], seeds)
                for n, answer in zip(some, judged, strict=True):
                    add(keys[todo[n]], {"request": "loglikelihood"} | answer)
        self._record.put_in_order(keys)
        found = [self._record.found[key] for key in keys]
        return [(answer["log_prob"], answer["is_greedy"]) for answer in found]

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihoods of whole texts, which may be longer than the model's window.

        Autoregressive models read disjoint windows, the first behind a begin token or end-of-text,
        each other one behind the token before it, the last behind as many as there is room for.
        Of diffusion models it is the sum of the bounds of the windows, each by itself.
        """
        hashes = self._hashes("loglikelihood_rolling", [(text,) for text in texts])
        keys = self._keys(hashes, self._how_judged)
        with self._record.adding() as add:
            for i, text in enumerate(texts):
                if keys[i] in self._record.found:
                    continue
                windows = list(self._windows(text))
                first = int(hashes[i][:8], 16)
                seeds = [(first + n) % 2**32 for n in range(len(windows))]
                judged = self._judge(windows, seeds, checks_greedy=False)
                total = math.fsum(answer["log_prob"] for answer in judged)
                num = sum(answer["num_tokens"] for answer in judged)
                answer = {"request": "loglikelihood_rolling", "log_prob": total, "num_tokens": num}
                add(keys[i], answer)
        self._record.put_in_order(keys)
        return [self._record.found[key]["log_prob"] for key in keys]

    def about(self) -> dict[str, Any]:
        """What was done, and how: for tables. `seconds` are those of writing, compiling included.

        `tokens` are counted up to the end of a text, or the stop string that ended it.
        """
        written = [self._record.found[key] for key in self._written]
        return {
            **self._model,
            **self._how_written,
            **self._how_judged,
            "seed": self.seed,
            "answers": len(written),
            "tokens": sum(len(answer["tokens"]) for answer in written),
            "forwards": sum(answer["num_forwards"] for answer in written),
            "seconds": math.fsum(answer["seconds"] for answer in written),
            "compile_s": self.compile_s,
            "prompts_cut": self.num_cut,
            "begin_tokens_added": self.num_begun,
        }

    @property
    def _how_written(self) -> dict[str, Any]:
        """What written answers depend on, beside the model."""
        method = self.method if isinstance(self.method, str | None) else describe(self.method)
        options = {name: describe(value) for name, value in sorted(self.options.items())}
        loop = "decode.generate" if self.is_diffusion else "decode.complete"
        return {"loop": loop, "method": method, "gen_len": self.gen_len,
                "guidance": self.guidance, **options}  # fmt: skip

    @property
    def _how_judged(self) -> dict[str, Any]:
        """What judged answers depend on, beside the model."""
        if not self.is_diffusion:
            return {"likelihood": "exact"}
        return {"likelihood": "bound", "num_samples": self.num_samples, "guidance": self.guidance,
                "antithetic": self.antithetic, "checks_greedy": self.checks_greedy,
                "batch_size": self.batch_size}  # fmt: skip

    def _hashes(self, kind: str, requests: Sequence[Sequence[Any]]) -> list[str]:
        """A hash per request, which picks its random stream; the same request twice has two."""
        seen: collections.Counter[str] = collections.Counter()
        hashes = []
        for request in requests:
            asked = json.dumps([kind, self.seed, *request], sort_keys=True)
            hashes.append(_hash(f"{seen[asked]} {asked}"))
            seen[asked] += 1
        return hashes

    def _keys(self, hashes: list[str], how: Mapping[str, Any]) -> list[str]:
        """Where the record has the answers."""
        settings = json.dumps({**self._model, **how}, sort_keys=True)
        return [_hash(f"{settings} {one}")[:32] for one in hashes]

    @property
    def _may_be_empty(self) -> bool:
        return self.is_diffusion and generate.LOOP.may_be_empty(self.lm.cfg)

    @property
    def _begin_token(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.lm.cfg.eos_token_id if begin is None else begin

    def _begin(self, prompt: list[int], is_needed: bool) -> list[int]:
        """With a begin token, if there is no other and there must be one."""
        if prompt or not is_needed:
            return prompt
        if not self.num_begun:
            logging.warning(
                "Requests without context go on from token %d, as there must be one.",
                self._begin_token,
            )
        self.num_begun += 1
        return [self._begin_token]

    def _fit(self, prompt: list[int], room: int, length: int) -> list[int]:
        """The end of a prompt, as much as there is room for."""
        if room < 1:
            raise ValueError(
                f"an answer of {length} tokens leaves no room for a prompt in max_seq_len="
                f"{self.lm.cfg.max_seq_len}: ask for a shorter one"
            )
        if len(prompt) <= room:
            return prompt
        if not self.num_cut:
            logging.warning("Prompts of more than %d tokens lose their beginning.", room)
        self.num_cut += 1
        return prompt[len(prompt) - room :]

    def _pair(self, i: int, context: str, continuation: str) -> Ids:
        """Token ids of a context and a continuation that fit into the model."""
        prompt, answer = encode_pair(self.lm, i, (context, continuation))
        if not prompt and not self._may_be_empty and answer[:1] == [self._begin_token]:
            return answer[:1], answer[1:]
        prompt = self._begin(prompt, not self._may_be_empty)
        room = self.lm.cfg.max_seq_len - len(answer) + (not self.is_diffusion)
        return self._fit(prompt, room, len(answer)) if prompt else prompt, answer

    def _windows(self, text: str) -> Iterator[Ids]:
        """What of a text is judged behind what."""
        size = self.lm.cfg.max_seq_len
        tokens = self.tokenizer.encode(text)
        if not self.is_diffusion:
            yield from rolling_windows(tokens, self._begin_token, size)
            return
        prompt = [] if self._may_be_empty else [self._begin_token]
        step = size - len(prompt)
        yield from ((prompt, tokens[n : n + step]) for n in range(0, len(tokens), step))

    def _judge(
        self, pairs: list[Ids], seeds: list[int], checks_greedy: bool | None = None
    ) -> list[Answer]:
        """Log-likelihoods of answers given prompts."""
        if not self.is_diffusion:
            exact = causal_log_likelihood(self.lm, pairs, batch_size=self.batch_size)
            return [dataclasses.asdict(one) for one in exact]
        bounds = log_likelihood(
            self.lm, pairs, num_samples=self.num_samples, batch_size=self.batch_size,
            guidance=self.guidance or 0.0, antithetic=self.antithetic, seed=seeds,
        )  # fmt: skip
        is_greedy = [False] * len(pairs)
        if self.checks_greedy if checks_greedy is None else checks_greedy:
            is_greedy = greedy_match(
                self.lm, pairs, batch_size=self.batch_size, guidance=self.guidance or 0.0
            )
        judged = []
        for one, greedy in zip(bounds, is_greedy, strict=True):
            error = None if math.isnan(one.standard_error) else one.standard_error
            judged.append(dataclasses.asdict(one) | {"standard_error": error, "is_greedy": greedy})
        return judged


def _shape(pair: Ids) -> tuple[int, int]:
    """Pairs of one shape are judged together, long ones first."""
    return -prompt_slots(len(pair[0]) + len(pair[1])), answer_slots(len(pair[1]))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
