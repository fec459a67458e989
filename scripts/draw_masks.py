"""Draws what a window attends to, from the kernels' own masks: docs/window_masks.png.

python -m scripts.draw_masks --out=docs/window_masks.png
"""

from __future__ import annotations

import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from decode.speculative.tree import from_paths
from kernels_pallas.block_diffusion_attention import block_diffusion_mask
from kernels_pallas.window_attention import allowed_positions, pack_mask

_OUT = flags.DEFINE_string("out", "docs/window_masks.png", "where the picture goes")

TREE = from_paths([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1]])
EMPTY, CACHE, WINDOW = "#f4f4f4", "#7aa6d8", "#e59866"


def main(_: list[str]) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.6), height_ratios=(2, 3))
    dual = allowed_positions(
        (1, 4), 20, "full", cache_ranges=jnp.array([[[2, 8], [12, 20]]]), window_range=None
    )
    _draw(axes[0, 0], np.asarray(dual[0]), 20, "Dual cache: one block, two ranges of slots")
    for x, text in ((0.5, "padding"), (4.5, "prefix"), (9.5, "old block"), (15.5, "masked suffix")):
        axes[0, 0].text(x, -0.8, text, fontsize=8, ha="center")

    drafts = TREE.tree(jnp.zeros((1, TREE.num_nodes), jnp.int32))
    words = pack_mask(drafts.ancestors(TREE.depth))
    tree = allowed_positions(
        words.shape[:2], 10, words, cache_ranges=jnp.array([[[2, 10]]]), window_range=None
    )
    _draw(axes[0, 1], np.asarray(tree[0]), 10, "Draft tree: the prefix, and ancestors as bits")
    for node, word in enumerate(words[0, :, 0]):
        axes[0, 1].text(18.2, node, f"{int(word):08b}", fontsize=8, va="center", family="monospace")

    causal = allowed_positions(
        (1, 6), 10, "causal", cache_ranges=jnp.array([[[1, 10]]]), window_range=None
    )
    _draw(axes[1, 0], np.asarray(causal[0]), 10, "Prefill in chunks: causal")
    training = block_diffusion_mask(12, 4)
    axes[1, 1].imshow(training, cmap=ListedColormap([EMPTY, WINDOW]))
    _grid(axes[1, 1], training.shape, "Block-diffusion training: [noisy ; clean], blocks of 4")
    axes[1, 1].axhline(11.5, color="k")
    axes[1, 1].axvline(11.5, color="k")
    figure.tight_layout()
    figure.savefig(_OUT.value, dpi=110)


def _draw(axis: Axes, allowed: np.ndarray, num_slots: int, title: str) -> None:
    """allowed [T, S + T]: cache slots left of the line, the window's own positions right of it."""
    colour = np.where(allowed, 1, 0)
    colour[:, num_slots:] *= 2
    palette = ListedColormap([EMPTY, CACHE, WINDOW])
    axis.imshow(colour, cmap=palette, vmin=0, vmax=2, aspect="equal")
    axis.axvline(num_slots - 0.5, color="k")
    _grid(axis, allowed.shape, title)
    axis.set_xlabel("cache slots | window")
    axis.set_ylabel("query")


def _grid(axis: Axes, shape: tuple[int, ...], title: str) -> None:
    axis.set_xticks(np.arange(-0.5, shape[1]), [""] * (shape[1] + 1))
    axis.set_yticks(np.arange(-0.5, shape[0]), [""] * (shape[0] + 1))
    axis.tick_params(length=0)
    axis.grid(color="white", linewidth=1)
    axis.set_title(title, fontsize=10, pad=16)


if __name__ == "__main__":
    app.run(main)
