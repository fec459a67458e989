"""Who sees whom in [noisy ; clean]: n noisy copies of L tokens, and a clean one behind them."""

from __future__ import annotations

from typing import Any

import numpy as np


def block_diffusion_mask(
    L: int, block_len: int, context_len: int | None = None, num_noisy: int = 1
) -> np.ndarray:
    """[T, T] bool: which positions of [noisy ; clean] each of them attends to, T = (n + 1) L.

    Args:
      L: tokens.
      block_len: positions per block.
      context_len: positions per block of the clean copy; None: as many.
      num_noisy: n.
    """
    at = np.arange((num_noisy + 1) * L)
    return block_diffusion_allowed(
        at[:, None], at[None], L, block_len, context_len or block_len, num_noisy
    )


def block_diffusion_allowed(
    query: Any, key: Any, L: int, block_len: int, context_len: int, num_noisy: int
) -> Any:
    """The mask as a function of positions in [noisy ; clean]."""
    query_is_clean, key_is_clean = query // L == num_noisy, key // L == num_noisy
    same_copy, query, key = query // L == key // L, query % L, key % L
    same, earlier = key // block_len == query // block_len, key // block_len < query // block_len
    noisy = ~query_is_clean & ((same_copy & same) | (key_is_clean & earlier))
    clean = query_is_clean & key_is_clean & (key // context_len <= query // context_len)
    return noisy | clean
