"""Trains Learn2PD's filter on rounds of decoding: minutes on a CPU.

    python -m train.learn2pd --config=configs/filter_learn2pd.py:waiting_line --workdir=runs/filter

Reference: Bao et al., "Learning to Parallel", arXiv:2509.25188, Sec. 3.2 and the public code. The
data are the rounds that `train.collect.trajectories` records with `oracle`: the confidences of a
block and which proposals were right. The loss is the binary cross-entropy of sigmoid(o) with them,
averaged over all C outputs and all rounds, decided positions included; AdamW on the full batch.

What a model proposes at decided positions does not matter for decoding. A large one repeats the
token that is there, nearly always right. A small one that was trained on masked positions only may
propose anything there: such labels teach the filter nothing and can be left out of the loss
(`decided_weight`). What is reported ("false_positives", "recall") counts undecided positions only,
at the acceptance threshold given. The filter with the lowest validation loss is kept.

Writes into the workdir: filter/ (for `dlm.heads.learn2pd.load_filter`), metrics.jsonl,
acceptance.png and acceptance.json (the share of right proposals accepted against the share of wrong
ones among those accepted, by threshold, beside the plain confidence threshold's). A rerun goes on
where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import app, flags, logging
from flax import serialization
from matplotlib.figure import Figure
from ml_collections import config_dict, config_flags

from dlm.heads.learn2pd import Filter, init_filter, save_filter
from train.collect.records import open_records, read_settings
from train.config import ConfigError, LogConfig, from_fields
from train.metrics import MetricWriter
from train.workdir import check_not_beyond, check_same, check_writable, write_json

TAUS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """How a filter is trained.

    Attributes:
      trajectories: folder of `train.collect.trajectories`, made with `oracle`.
      num_steps: AdamW steps on the full batch.
      learning_rate: constant.
      weight_decay: decoupled, on all parameters.
      eval_every: steps between validations, and between checkpoints.
      decided_weight: of decided positions in the loss; undecided ones weigh 1 (published: 1).
      tau: at which false positives are counted.
      seed: of the initial weights.
    """

    trajectories: str
    num_steps: int = 40_000
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    eval_every: int = 1_000
    decided_weight: float = 1.0
    tau: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "eval_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be at least 1")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ConfigError(
                f"learning_rate={self.learning_rate} must be positive and "
                f"weight_decay={self.weight_decay} at least 0"
            )
        if not 0 <= self.decided_weight <= 1:
            raise ConfigError(f"decided_weight={self.decided_weight} must be in [0, 1]")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"tau={self.tau} must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Rounds of one split, N of them.

    Attributes:
      confidence: [N, C] float32.
      is_right: [N, C] bool.
      undecided: [N, C] bool.
    """

    confidence: np.ndarray
    is_right: np.ndarray
    undecided: np.ndarray

    def weight(self, decided_weight: float) -> np.ndarray:
        """Of each output in the loss: [N, C] float32."""
        return np.where(self.undecided, 1, decided_weight).astype(np.float32)


def filter_loss(
    filter: Filter, confidence: jax.Array, is_right: jax.Array, weight: jax.Array
) -> jax.Array:
    """Mean binary cross-entropy over [N, C] outputs, weighted [N, C]; scalar float32."""
    o = filter.logits(confidence)
    losses = optax.sigmoid_binary_cross_entropy(o, is_right.astype(o.dtype))
    return (losses * weight).sum() / weight.sum()


def read_rounds(path: str | os.PathLike[str]) -> dict[str, Rounds]:
    """Rounds of all examples: 80 % to "train", 10 % each to "valid" and "test", by example.

    Raises:
      ConfigError: there are none.
    """
    try:
        records = open_records(path)
    except FileNotFoundError as error:
        raise ConfigError(f"trajectories: {error}") from error
    split: dict[str, list[Any]] = {"train": [], "valid": [], "test": []}
    for i in range(len(records)):
        record = records[i]
        if "rounds" not in record:
            raise ConfigError(f"trajectories={str(path)!r} has no rounds: collect with oracle=True")
        split[{8: "valid", 9: "test"}.get(i % 10, "train")].append(record["rounds"])
    if not all(split.values()):
        raise ConfigError(f"trajectories={str(path)!r} has {len(records)} examples, fewer than 10")
    return {
        name: Rounds(
            confidence=np.concatenate([r["confidence"] for r in rounds]),
            is_right=np.concatenate([r["is_right"] for r in rounds]),
            undecided=np.concatenate([r["undecided"] for r in rounds]),
        )
        for name, rounds in split.items()
    }


def run(config: config_dict.ConfigDict | FilterConfig, workdir: str | os.PathLike[str]) -> Filter:
    """Trains a filter, or goes on with it.

    Args:
      config: fields of `FilterConfig`.
      workdir: the run's folder, made if needed.

    Returns:
      The filter that was saved.

    Raises:
      ConfigError: the settings make no sense, or the folder has a run of other ones.
    """
    settings = config if isinstance(config, FilterConfig) else from_fields(FilterConfig, config)
    folder = pathlib.Path(workdir)
    check_writable(folder)
    rounds = read_rounds(settings.trajectories)
    collected = read_settings(settings.trajectories)
    if (folder / "config.json").exists():
        now = dataclasses.asdict(settings)
        check_same(folder / "config.json", now, "a filter", may_change=("num_steps",))

    C = rounds["train"].confidence.shape[1]
    filter = init_filter(jax.random.key(settings.seed), C, collected["model"])
    tx = optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay)
    state: dict[str, Any] = {
        "step": 0,
        "filter": filter,
        "optimizer": tx.init(filter),
        "best": filter,
        "best_loss": np.float32(np.inf),
    }
    saved = folder / "state.msgpack"
    if saved.exists():
        state = serialization.from_bytes(state, saved.read_bytes())
        check_not_beyond(folder, "num_steps", settings.num_steps, state["step"])
    write_json(folder / "config.json", dataclasses.asdict(settings))

    @jax.jit
    def many_steps(filter: Filter, optimizer: Any, count: jax.Array, data: Any) -> Any:
        def one(_: int, carry: Any) -> Any:
            filter, optimizer, _ = carry
            loss, gradient = jax.value_and_grad(filter_loss)(filter, *data)
            updates, optimizer = tx.update(gradient, optimizer, filter)
            return optax.apply_updates(filter, updates), optimizer, loss

        return jax.lax.fori_loop(0, count, one, (filter, optimizer, jnp.float32(0)))

    train = rounds["train"]
    weight = train.weight(settings.decided_weight)
    data = jax.device_put((train.confidence, train.is_right, weight))
    metrics = MetricWriter(folder, LogConfig(), state["step"], dataclasses.asdict(settings))
    with (
        contextlib.closing(metrics),
        tqdm.tqdm(
            total=settings.num_steps,
            initial=state["step"],
            desc="filter",
            unit="step",
            disable=None,
        ) as bar,
    ):
        while state["step"] < settings.num_steps:
            count = min(settings.eval_every, settings.num_steps - state["step"])
            filter, optimizer, loss = many_steps(
                state["filter"], state["optimizer"], jnp.int32(count), data
            )
            valid = evaluate(filter, rounds["valid"], settings.tau, settings.decided_weight)
            state |= {"filter": filter, "optimizer": optimizer, "step": state["step"] + count}
            if valid["loss"] < state["best_loss"]:
                state |= {"best": filter, "best_loss": np.float32(valid["loss"])}
            values = {"loss": float(loss)} | {f"valid/{k}": v for k, v in valid.items()}
            metrics.write(state["step"], values)
            partial = saved.with_name(saved.name + ".partial")
            partial.write_bytes(serialization.to_bytes(state))
            partial.replace(saved)
            bar.update(count)
            bar.set_postfix({name: f"{value:.4f}" for name, value in valid.items()})
    best: Filter = jax.tree.map(jnp.asarray, state["best"])
    save_filter(folder / "filter", best)
    curves = acceptance(best, rounds["test"])
    (folder / "acceptance.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    _draw(curves, folder / "acceptance.png")
    return best


def evaluate(
    filter: Filter, rounds: Rounds, tau: float, decided_weight: float = 1.0
) -> dict[str, float]:
    """Loss as in training; false positives and recall over undecided positions.

    Returns:
      "loss"; "false_positives", the share of wrong proposals that are accepted; "recall", the share
      of right proposals that are; "wrong_accepted", the share of accepted proposals that are wrong;
      "decided_wrong", the share of decided positions whose proposal is (whatever the filter).
    """
    weight = rounds.weight(decided_weight)
    loss = float(_loss_jitted(filter, rounds.confidence, rounds.is_right, weight))
    keep = np.asarray(jax.nn.sigmoid(filter.logits(jnp.asarray(rounds.confidence)))) > tau
    decided = ~rounds.undecided
    decided_wrong = float((decided & ~rounds.is_right).sum() / max(decided.sum(), 1))
    return {"loss": loss, **_rates(keep, rounds), "decided_wrong": decided_wrong}


_loss_jitted = jax.jit(filter_loss)


def acceptance(filter: Filter, rounds: Rounds) -> dict[str, list[dict[str, float]]]:
    """Rates by threshold: of the filter, and of the confidence itself."""
    judged = {
        "filter": np.asarray(jax.nn.sigmoid(filter.logits(jnp.asarray(rounds.confidence)))),
        "confidence": rounds.confidence,
    }
    return {
        name: [{"tau": tau, **_rates(value > tau, rounds)} for tau in TAUS]
        for name, value in judged.items()
    }


def _rates(keep: np.ndarray, rounds: Rounds) -> dict[str, float]:
    keep = keep & rounds.undecided
    right = rounds.is_right & rounds.undecided
    wrong = ~rounds.is_right & rounds.undecided
    return {
        "false_positives": float((keep & wrong).sum() / max(wrong.sum(), 1)),
        "recall": float((keep & right).sum() / max(right.sum(), 1)),
        "wrong_accepted": float((keep & wrong).sum() / max(keep.sum(), 1)),
    }


def _draw(curves: dict[str, list[dict[str, float]]], path: pathlib.Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        label = "filter" if name == "filter" else "confidence threshold"
        x = [100 * p["wrong_accepted"] for p in points]
        axes.plot(x, [100 * p["recall"] for p in points], "o-", markersize=3, label=label)
    axes.set_xlabel("wrong among accepted proposals (%)")
    axes.set_ylabel("right proposals accepted (%)")
    axes.set_title("Undecided positions of held-out rounds, by threshold")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}; fields are set by --config.field=…")
    try:
        run(flags.FLAGS.config, flags.FLAGS.workdir)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"The filter is in {pathlib.Path(flags.FLAGS.workdir) / 'filter'}.")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="A file of configs/.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the run; the same one goes on.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
