"""What decoding gives back, for all loops: completions, and where texts stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.explored import Explored
from decode.core.requests import real_number, whole_number
from dlm.lm import LanguageModel
from dlm.tokenizer import Tokenizer

STOP_ROUNDS = 16  # after so many rounds, texts are searched for stop strings
HALF = "\N{REPLACEMENT CHARACTER}"  # how tokens that are no whole character are decoded
CLEANED = 5  # characters behind a space that may take it out: "do n ' t" becomes "don't"


class TopTokens(struct.PyTreeNode):
    """The n most probable tokens at each completion position, best first, when it was written.

    Of one row the arrays have no batch axis. Where nothing was written: token -1.

    Attributes:
      tokens: [B, G, n] int32.
      log_probs: [B, G, n] float32. Without a temperature; of `complete` the model's own, of
        `generate` behind what is allowed, bias and filters: -inf where less than n tokens are left.
    """

    tokens: jax.Array
    log_probs: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, int, int]) -> TopTokens:
        """Nothing is written yet. [B, G, n]."""
        return cls(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))

    def of_row(self, b: int, length: int) -> TopTokens:
        """The first `length` positions of one row."""
        return TopTokens(self.tokens[b, :length], self.log_probs[b, :length])

    def put(
        self, rows: jax.Array, index: jax.Array, tokens: jax.Array, log_probs: jax.Array
    ) -> TopTokens:
        """With [B, W, n] written at positions index [B, W] of rows [B, 1]; G: nowhere."""
        return TopTokens(
            self.tokens.at[rows, index].set(tokens, mode="drop"),
            self.log_probs.at[rows, index].set(log_probs.astype(jnp.float32), mode="drop"),
        )


def check_top_logprobs(num: int, vocab_size: int) -> None:
    """Raises ValueError unless so many most probable tokens can be named."""
    if not 0 <= num <= vocab_size:
        raise ValueError(f"top_logprobs={num} must be in [0, vocab_size={vocab_size}]")


@dataclasses.dataclass(frozen=True)
class Completion:
    """One decoded answer.

    Arrays have one entry per canvas position: `gen_len`, or fewer if the stopper cut the canvas
    (`Eotp`). -1 in `step_map` marks positions left undecided because the row was done before, -2
    tokens that stood in the prompt behind a gap: where gaps are filled, arrays begin at the first,
    while `text` and `tokens` are the whole text.

    Attributes:
      text: the completion as text, up to what ended it; None without a tokenizer.
      tokens: [n] int32. Token ids up to and excluding the first end-of-text or stop token.
      num_forwards: forwards of the model made for this request (NFE). Stop strings are looked for
        every `STOP_ROUNDS` rounds of a batch, so those behind one count too, and may be more or
        fewer beside other requests.
      tokens_per_forward: n / num_forwards: end-of-text padding does not count as work done.
      finish_reason: "eos" if the model ended the text, or a token of `stop_ids` did; "stop" if a
        stop string did; "length" if the canvas did; "stuck" if a search found no text that is
        allowed: what there is is where it could not go on.
      canvas: [gen_len] int32. All completion positions.
      step_map: [gen_len] int32. The 0-based step at which each was decided.
      confidence: [gen_len] float32 in [0, 1]. Confidence at that step.
      log_prob: [gen_len] float32. Log-probability of the token at that step.
      draft_forwards: forwards of a draft model made for this request.
      others: further samples of the same request, where more than one was asked for.
      acceptance_histogram: [J + 1] int32. Of `decode.complete`: how many forwards accepted 0, 1, ..
        J drafts; None elsewhere.
      top: [gen_len, n] the n most probable tokens at each position, if asked for.
      score: what a search has made of the text, such as its length-normalised log-probability; None
        elsewhere.
      counts: what was counted beside all this, by name: see `counts` of a search strategy, and
        `decode.constraints.hosted.counted`.
      explored: what a search on the host has looked at; None elsewhere.
      rounds_by_width: forwards by how many nodes of a draft tree a controller had them judge; 0:
        nobody was asked for drafts. None without a controller.
    """

    text: str | None
    tokens: np.ndarray
    num_forwards: int
    tokens_per_forward: float
    finish_reason: str
    canvas: np.ndarray
    step_map: np.ndarray
    confidence: np.ndarray
    log_prob: np.ndarray
    draft_forwards: int = 0
    others: tuple[Completion, ...] = ()
    acceptance_histogram: np.ndarray | None = None
    top: TopTokens | None = None
    rounds_by_width: dict[int, int] | None = None
    score: float | None = None
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    explored: Explored | None = None

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per forward of the target that were accepted, the one behind the drafts included.

        Not cut at the end of the text. nan without forwards, or where nothing is drafted.
        """
        if self.acceptance_histogram is None or not self.acceptance_histogram.sum():
            return float("nan")
        lengths = np.arange(1, len(self.acceptance_histogram) + 1)
        return float((self.acceptance_histogram * lengths).sum() / self.acceptance_histogram.sum())


def read_stops(lm: LanguageModel, stop: str | Sequence[str]) -> list[str]:
    """Stop strings as a list.

    Raises:
      ValueError: one is empty, or there is no tokenizer to find them with.
    """
    if not isinstance(stop, (str, Sequence)):
        raise ValueError(f"stop={stop!r} must be a string or a list of strings; (): none")
    stops = [stop] if isinstance(stop, str) else list(stop)
    if wrong := [x for x in stops if not isinstance(x, str)]:
        raise ValueError(f"stop has {wrong[0]!r}, which is no string: token ids go into stop_ids")
    if stops and lm.tokenizer is None:
        raise ValueError("stop has strings but the checkpoint has no tokenizer: use stop_ids")
    if not all(stops):
        raise ValueError("stop has an empty string, which is found everywhere: remove it")
    return stops


def read_bias(lm: LanguageModel, logit_bias: Mapping[int, float] | None) -> jax.Array | None:
    """Token id -> bias as [V] float32; None: none.

    Raises:
      ValueError: it is no mapping, there is no such token, or a bias is neither finite nor -inf,
        with which a token is never written.
    """
    if logit_bias is None:
        return None
    if not isinstance(logit_bias, Mapping):
        raise ValueError(f"logit_bias={logit_bias!r} must map token ids to numbers")
    if not logit_bias:
        return None
    bias = np.zeros(lm.cfg.vocab_size, np.float32)
    for token, value in logit_bias.items():
        whole_number("a token of logit_bias", token)
        if not real_number(f"logit_bias of token {token}", value) < np.inf:
            raise ValueError(f"logit_bias of token {token}={value} must be finite, or -inf")
        if not 0 <= token < lm.cfg.vocab_size:
            raise ValueError(
                f"logit_bias has token {token}, not in [0, vocab_size={lm.cfg.vocab_size})"
            )
        bias[token] = value
    return jnp.asarray(bias)


def cut(text: str, stops: Sequence[str]) -> int:
    """Where the stop string begins that is the first to be whole; the text's length without any.

    Of several that end together it is the longest. So it does not matter how much of the text was
    there when it was looked for.
    """
    found = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, default=(0, len(text)))[1]


def settled(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of tokens, special ones included, as far as no token behind them changes it."""
    text = tokenizer.decode(tokens, skip_special_tokens=False).rstrip(HALF)
    return text[:-CLEANED] if tokenizer.cleans_up else text


def to_text(
    tokenizer: Tokenizer | None, tokens: np.ndarray, stops: Sequence[str]
) -> tuple[str | None, int, bool]:
    """Token ids as text, cut as `cut` says; of how many tokens that is; whether it was cut.

    Stop strings are looked for where special tokens are text too, which they are not in what is
    given back. Tokens that stay hold all that is left.
    """
    if tokenizer is None:
        return None, len(tokens), False
    ids = tokens.tolist()
    text = tokenizer.decode(ids, skip_special_tokens=False)
    place = cut(text, stops)
    if place == len(text):
        return tokenizer.decode(ids), len(ids), False

    def length(n: int) -> int:
        return len(tokenizer.decode(ids[:n], skip_special_tokens=False))

    # From the end: half a character may be longer than the whole one.
    n = next(n for n in range(len(ids), -1, -1) if length(n) <= place)
    n += length(n) < place  # the stop begins inside a token
    excess = length(n) - place
    if excess and not tokenizer.decode(ids[n - 1 : n]):  # a special one
        n, excess = n - 1, 0
    left = tokenizer.decode(ids[:n])
    return left[: len(left) - excess], n, True
