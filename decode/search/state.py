"""What the search loop carries from round to round.

Letters: B prompts, K hypotheses, n candidates, G completion positions, S slots, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import struct

from dlm.cache import KVCache


class SearchState(struct.PyTreeNode):
    """Everything the loop carries, and everything that is reported afterwards.

    Attributes:
      score: [B, K] float32. Of the hypotheses.
      candidates: [B, K, n] int32. Read next.
      tokens: [B, K, S] int32. Prompts and completions from slot 0.
      log_prob: [B, K, G] float32. Of completions, token by token, by the target itself.
      occurred: [B, K, V] bool. Tokens that came up; None unless anybody asks.
      length: [B] int32. Of all hypotheses of a prompt.
      num_cached: [B] int32. Tokens that the cache covers.
      num_moves: [B] int32. Hypotheses whose keys and values were copied to another row.
      num_forwards: [B] int32. Of a prompt's hypotheses together, that of its prompt aside.
      prompt_len: [B] int32. Lengths before the first token.
      end: [B] int32. Largest lengths.
      strategy: its state.
      constraint: [B, K, n, ...]. Its states behind the candidates; None without one.
      cache: of K B rows, or of B where hypotheses share them, see `decode.search.move.by_row`.
      key: [B, 2] uint32. One random stream per prompt.
      has_stopped: [B] bool.
      num_steps: scalar int32. Rounds of the loop, for the whole batch.
    """

    rows_are_by_device: ClassVar[bool] = True  # for `decode.core.refill`

    score: jax.Array
    candidates: jax.Array
    tokens: jax.Array
    log_prob: jax.Array
    occurred: jax.Array | None
    length: jax.Array
    num_cached: jax.Array
    num_moves: jax.Array
    num_forwards: jax.Array
    prompt_len: jax.Array
    end: jax.Array
    strategy: Any
    constraint: Any
    cache: KVCache
    key: jax.Array
    has_stopped: jax.Array
    num_steps: jax.Array

    def first(self, num: int) -> SearchState:
        """As if there were only the first `num` hypotheses; the cache is as it is."""
        of = lambda x: x[:, :num]  # noqa: E731
        return self.replace(
            score=of(self.score),
            candidates=of(self.candidates),
            tokens=of(self.tokens),
            log_prob=of(self.log_prob),
            occurred=None if self.occurred is None else of(self.occurred),
            constraint=jax.tree.map(of, self.constraint),
        )
