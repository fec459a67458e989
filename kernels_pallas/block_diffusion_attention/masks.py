"""Who sees whom in [noisy ; clean], two copies of L tokens."""

from __future__ import annotations

from typing import Any

import numpy as np


def block_diffusion_mask(L: int, block_len: int) -> np.ndarray:
    """[2L, 2L] bool: which positions of [noisy ; clean] each of them attends to."""
    return block_diffusion_allowed(np.arange(2 * L)[:, None], np.arange(2 * L)[None], L, block_len)


def block_diffusion_allowed(query: Any, key: Any, L: int, block_len: int) -> Any:
    """The mask as a function of positions in [noisy ; clean]."""
    query_is_clean, key_is_clean = query >= L, key >= L
    query_block = (query - L * query_is_clean) // block_len
    key_block = (key - L * key_is_clean) // block_len
    same, earlier = key_block == query_block, key_block < query_block
    noisy = ~query_is_clean & ((~key_is_clean & same) | (key_is_clean & earlier))
    return noisy | (query_is_clean & key_is_clean & (same | earlier))
