"""Searches whose queue or tree the host keeps, while the device writes on from texts of it.

What they share: how texts are gone on with, and what is kept of a search for who looks at it.

Letters: W texts, k continuations of each, R = W k rows, S slots, G positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.requests import check_stop_ids, lay_out, piece_len, whole_number
from decode.core.results import Completion, to_text
from decode.core.sampling import Sampling
from decode.core.streams import fold_in
from decode.search.move import under_all
from decode.speculative.loop import SpeculativeMethod, SpeculativeState, decode, prefill
from decode.speculative.state import first_state
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.lm import LanguageModel
from dlm.params import Params


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What was written behind a text.

    Attributes:
      tokens: [n] int32. The token that ended it included.
      log_prob: [n] float32. Of the model itself.
      key: [2] uint32. The random stream it was drawn from.
      has_ended: whether its last token ends a text.
      top_tokens: [n, m] int32. The most probable tokens at each position, best first.
      top_log_probs: [n, m] float32. Of these.
    """

    tokens: np.ndarray
    log_prob: np.ndarray
    key: np.ndarray
    has_ended: bool
    top_tokens: np.ndarray
    top_log_probs: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planner:
    """A search on the host: a method for `decode.complete`, which answers one prompt at a time.

    Attributes:
      sampling: how tokens are drawn.
      stop_ids: tokens that end a text, besides the model's end-of-text.
    """

    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)

    @property
    def num_results(self) -> int:
        """Most completions of a prompt that it can give."""
        return 1

    @property
    def draws(self) -> bool:
        """Whether `sampling` is used."""
        return True

    def with_choices(
        self, sampling: Mapping[str, Any] | None, stop_ids: tuple[int, ...] | None
    ) -> Self:
        """With what was asked for beside it, fields of `sampling` and stop tokens.

        Raises:
          ValueError: it makes no sense.
        """
        self._check_kinds()
        changes: dict[str, Any] = {}
        if sampling is not None:
            changes["sampling"] = self.sampling.replace(**sampling)
        if stop_ids is not None:
            changes["stop_ids"] = stop_ids
        return self.replace(**changes)

    def validate(self, lm: LanguageModel) -> None:
        """Raises ValueError, in one sentence, on what makes no sense for a model."""
        self._check_kinds()
        self.sampling.validate(lm.cfg)
        if self.draws and self.sampling.temperature is None:
            raise ValueError(f"temperature must be positive: {type(self).__name__} draws")
        check_stop_ids(self.stop_ids, lm.cfg)

    def _check_kinds(self) -> None:
        """Raises ValueError if a choice is of another kind than its field's."""
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling={self.sampling!r} must be of class Sampling")

    def answer(
        self, lm: LanguageModel, prompt: Sequence[int], gen_len: int, seed: int
    ) -> list[Completion]:
        """Completions of a prompt, the best first."""
        raise NotImplementedError


BEHIND = 32  # tokens per forward of what stands behind a prompt, of which there are few


class Writer:
    """Goes on with texts of one prompt: one program for a number of texts and of continuations.

    The prompt is read once, and its keys and values are kept; what stands behind it in a text is
    read each time.

    Attributes:
      num_tokens: written so far.
      num_forwards: of the model, those that read aside, for each text by itself.
    """

    def __init__(
        self, lm: LanguageModel, method: SpeculativeMethod, prompt: Sequence[int], num_slots: int
    ) -> None:
        """Reads the prompt.

        Args:
          lm: who writes.
          method: how.
          prompt: token ids that all texts begin with.
          num_slots: most tokens of a text.
        """
        ids = np.asarray(method.stop_ids, np.int32).reshape(-1)
        self.method = method.replace(stop_ids=ids)  # one argument: delimiters may be thousands
        self.lm = lm
        self.num_tokens = self.num_forwards = 0
        self.ends = {*lm.cfg.eos_ids, *ids.tolist()}
        chunk = piece_len(num_slots)
        self._num_slots = -(-num_slots // chunk) * chunk + 1
        rows = lay_out(lm.cfg, [prompt], [num_slots - len(prompt)], 1, self._num_slots)
        self._prompt = _read(lm.params, lm.cfg, self.method, *rows, chunk)

    def go_on(
        self,
        texts: Sequence[Sequence[int]],
        gen_lens: Sequence[int],
        keys: Sequence[np.ndarray],
        *,
        times: int,
        rows: int,
        G: int,
    ) -> list[list[Continuation]]:
        """`times` continuations of each text: up to a stop id, or its `gen_lens`.

        A text's cache is laid under all of its continuations. The first goes on drawing from the
        text's own stream, so that a text in several pieces is the text in one; others have streams
        of their own.

        Args:
          texts: token ids, which begin with the prompt; at most `rows` of them.
          gen_lens: most tokens of each.
          keys: [2] uint32. A random stream per text.
          times: k.
          rows: W, so many texts at once: of one number there is one program.
          G: most tokens of any continuation, likewise.
        """
        lm, num = self.lm, len(texts)
        tokens, length, end = lay_out(lm.cfg, texts, gen_lens, rows, self._num_slots)
        key = np.zeros((rows, 2), np.uint32)
        key[:num] = keys
        state, streams = _write(
            lm.params, lm.cfg, self.method, self._prompt, tokens, length, end, key, G, times
        )
        fields = (state.tokens, state.length, state.log_prob, state.num_forwards, state.top)
        tokens, after, log_prob, forwards, top = jax.device_get(fields)
        streams = np.asarray(streams)
        found: list[list[Continuation]] = [[] for _ in texts]
        for r in range(times * rows):
            if (b := r % rows) >= num:
                continue
            new = tokens[r, length[b] : after[r]]
            n = len(new)
            found[b].append(
                Continuation(
                    tokens=new,
                    log_prob=log_prob[r, :n],
                    key=streams[r],
                    has_ended=n > 0 and int(new[-1]) in self.ends,
                    top_tokens=np.zeros((n, 0), np.int32) if top is None else top.tokens[r, :n],
                    top_log_probs=np.zeros((n, 0)) if top is None else top.log_probs[r, :n],
                )
            )
            self.num_tokens += n
            self.num_forwards += int(forwards[r])
        return found


class ReadPrompt(struct.PyTreeNode):
    """A prompt that was read.

    Attributes:
      cache: of one row; its last token aside.
      num_read: scalar int32. Tokens in there.
      end: [1] int32. Most tokens of a text, as long as which it was read for.
    """

    cache: KVCache
    num_read: jax.Array
    end: jax.Array


@functools.partial(jax.jit, static_argnames=("cfg", "chunk"))
def _read(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, tokens: jax.Array,
    length: jax.Array, end: jax.Array, chunk: int,
) -> ReadPrompt:  # fmt: skip
    """A prompt [1, S] of so many tokens [1]."""
    key = jnp.zeros((1, 2), jnp.uint32)
    state = first_state(cfg, method, tokens, length, end, key, 1, chunk)
    return ReadPrompt(prefill(params, cfg, method, state).cache, length[0] - 1, end)


@functools.partial(jax.jit, static_argnames=("cfg", "G", "times"))
def _write(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, prompt: ReadPrompt,
    tokens: jax.Array, length: jax.Array, end: jax.Array, key: jax.Array, G: int, times: int,
) -> tuple[SpeculativeState, jax.Array]:  # fmt: skip
    """The finished state of R rows, row j W + i the j-th of text i, and their streams [R, 2]."""
    W, S = tokens.shape
    state = first_state(cfg, method, tokens, length, end, key, G, min(S, BEHIND))
    of_all = lambda x: jnp.broadcast_to(x, (*x.shape[:-4], W, *x.shape[-3:]))  # noqa: E731
    known = prompt.num_read
    if cfg.rope_scaling is not None:  # angles may depend on how long a text gets
        is_same = cfg.rope_scaling.is_same(end, jnp.broadcast_to(prompt.end, W))
        known = jnp.where((is_same | state.has_stopped).all(), known, 0)
    cache = jax.tree.map(of_all, prompt.cache)
    state = state.replace(cache=cache, num_read=jnp.full(W, known))
    state = prefill(params, cfg, method, state)
    cache = under_all(state.cache, times)
    light = state.replace(cache=None, num_steps=None)
    repeat = lambda x: jnp.concatenate([x] * times)  # noqa: E731
    others = [fold_in(fold_in(key, length), j) for j in range(1, times)]
    streams = jnp.concatenate([key, *others])
    state = jax.tree.map(repeat, light).replace(cache=cache, num_steps=state.num_steps, key=streams)
    state = decode(params, cfg, method, state)
    return state.replace(cache=None), streams


def root_key(seed: int) -> np.ndarray:
    """[2] uint32: the stream of a seed, as the loops have it."""
    return np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def completed(
    lm: LanguageModel, tokens: Sequence[int], log_prob: Sequence[float] | np.ndarray,
    ends: set[int], num_forwards: int, score: float,
) -> Completion:  # fmt: skip
    """A completion of some tokens."""
    canvas, lp = np.array(tokens, np.int32), np.array(log_prob, np.float32)
    has_ended = len(canvas) > 0 and int(canvas[-1]) in ends
    kept = canvas[: len(canvas) - has_ended]
    return Completion(
        text=to_text(lm.tokenizer, kept, ())[0],
        tokens=kept,
        num_forwards=num_forwards,
        tokens_per_forward=len(kept) / max(num_forwards, 1),
        finish_reason="eos" if has_ended else "length",
        canvas=canvas,
        step_map=np.arange(len(canvas), dtype=np.int32),
        confidence=np.exp(lp),
        log_prob=lp,
        score=score,
    )


def check_count(name: str, value: int | None, lowest: int = 1) -> None:
    """Raises ValueError unless a number counts and is at least `lowest`; None is not looked at."""
    if value is not None and whole_number(name, value) < lowest:
        raise ValueError(f"{name}={value} must be at least {lowest}")
