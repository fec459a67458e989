"""No cache: everything is recomputed."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import struct

from decode.diffusion.caches.canvas import CachePolicy, Canvas, forward_canvas, predictions
from dlm.config import ModelConfig
from dlm.params import Params


@struct.dataclass
class NoCache(CachePolicy):
    """Every forward runs over the whole canvas. Exact."""

    short_name: ClassVar[str] = "none"

    def allocate(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> Any:
        return ()

    def judge(
        self, params: Params, cfg: ModelConfig, canvas: Canvas, window_len: int, state: Any
    ) -> tuple[jax.Array, Any, jax.Array]:
        hidden = forward_canvas(params, cfg, canvas, window_len).hidden
        return predictions(hidden, cfg, canvas, window_len), state, canvas.is_active
