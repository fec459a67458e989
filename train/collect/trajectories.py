"""A model's own answers and how it came to them: what distillation and filters learn from.

    python -m train.collect.trajectories --config=configs/collect_trajectories.py:waiting_line \\
        --out=runs/waiting_line/trajectories

Decodes the prompts of a task with any method of `decode/diffusion/points.py` and writes, per
example,

    index       which example of the task
    prompt      [n] int32. Token ids
    completion  [G] int32. The answer; behind its first EOS everything is EOS
    step_map    [G] int32. The round that decided each position; -1: none did
    confidence  [G] float32 in [0, 1]. When it was decided
    log_prob    [G] float32. Of the token, when it was decided
    score       float32 in [0, 1]. Of the task's scorer
    num_forwards  int32

and with `oracle`, which decodes a second time, knowing the answer (`decode.diffusion.recorded`),
the rounds that Learn2PD's filter learns from, C positions of the open block each:

    rounds/confidence  [S, C] float32 in [0, 1]. Of all proposals, decided positions included
    rounds/is_right    [S, C] bool. Whether the proposal is the answer's token
    rounds/undecided   [S, C] bool. Positions of the block not decided yet

as a TensorFlow data set in ArrayRecord format (`tfds.builder_from_directory(out)`), without
TensorFlow; and for people results.jsonl, a line per example in their order: index, text, score,
num_forwards. Every shard is written whole or not at all: a rerun goes on where shards are missing,
with any number of processes. Processes of a cluster write shards in turn, each on its own devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import app, flags, logging
from array_record.python import array_record_module
from jax.experimental import multihost_utils
from ml_collections import config_dict, config_flags

from decode import generate
from decode.core.results import Completion
from decode.core.texts import Asked, Loop, Pace
from decode.diffusion.loop import DiffusionMethod, DiffusionState, init_state
from decode.diffusion.points import named, override
from decode.diffusion.recorded import GreedyOracle, Record, Recorded
from decode.diffusion.state import ComponentStates
from dlm import lm as lm_lib
from dlm import tasks
from dlm.lm import LanguageModel, fingerprint
from dlm.sharding import make_mesh
from train.collect.config import TrajectoryConfig
from train.collect.records import SETTINGS, open_records
from train.config import ConfigError, build, from_fields
from train.host import join_cluster, set_up_process
from train.workdir import check_same, hold, open_folder, write_json

_NAME = "trajectories"
_RESULTS = "results.jsonl"


def run(config: config_dict.ConfigDict | TrajectoryConfig, out: str | os.PathLike[str]) -> float:
    """Decodes and writes what is missing in `out`.

    Args:
      config: fields of `TrajectoryConfig`.
      out: the folder of the data set, made if needed.

    Returns:
      Tokens per second of this call, compilation excluded: those up to and with EOS, over the time
      that decoding took. 0 if there was nothing left to do.

    Raises:
      ConfigError: the settings make no sense, or `out` has trajectories of other settings, or
        another process is in it.
    """
    settings = (
        config if isinstance(config, TrajectoryConfig) else from_fields(TrajectoryConfig, config)
    )
    folder = open_folder(out)
    with hold(folder) if jax.process_index() == 0 else contextlib.nullcontext():
        return _run(settings, folder)


def _run(settings: TrajectoryConfig, folder: pathlib.Path) -> float:
    """As `run`, in a folder of one's own."""
    mesh = None
    if settings.tensor > 1:
        mesh = make_mesh(tensor=settings.tensor, devices=jax.local_devices())
    task = build(settings.task, "task")
    try:
        model = lm_lib.load(settings.checkpoint, dtype=settings.dtype or None, mesh=mesh)
        if model.tokenizer is None:
            raise ValueError("it has no tokenizer to read the task's prompts with")
    except (OSError, ValueError) as error:
        raise ConfigError(f"checkpoint={settings.checkpoint!r}: {error}") from error
    num = settings.num_examples or len(task)
    if not 0 < num <= len(task):
        raise ConfigError(f"num_examples={num} must be in 1 to {len(task)}, the task's examples")
    try:
        method = override(named(settings.method, settings.block_len), settings.changes)
        method.validate(model.cfg)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from error
    _claim(folder, settings, {"model": fingerprint(model), "confidence": method.confidence.name})

    size = settings.examples_per_shard
    num_shards = -(-num // size)
    features = _features(settings)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=_NAME,
        split="train",
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    paths = [
        pathlib.Path(template.sharded_filepath(shard_index=i, num_shards=num_shards))
        for i in range(num_shards)
    ]
    ours = range(jax.process_index(), num_shards, jax.process_count())
    tokens = seconds = 0.0
    with tqdm.tqdm(
        total=sum(min(size, num - i * size) for i in ours),
        initial=sum(min(size, num - i * size) for i in ours if paths[i].exists()),
        desc="trajectories",
        unit="example",
        disable=None if jax.process_index() == 0 else True,
        dynamic_ncols=True,
    ) as bar:
        decoder = _Decoder(model, task, method, settings)
        for i in ours:
            if paths[i].exists():
                continue
            partial = paths[i].with_name(paths[i].name + ".partial")
            writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
            for record in decoder.decode(range(i * size, min((i + 1) * size, num)), bar):
                writer.write(features.serialize_example(record))
            tokens, seconds = decoder.tokens, decoder.seconds
            if seconds:
                bar.set_postfix({"tokens/s": f"{tokens / seconds:,.0f}"})
            writer.close()
            partial.replace(paths[i])
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("trajectories")
    if jax.process_index() == 0:
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=[min(size, num - i * size) for i in range(num_shards)],
            num_bytes=sum(path.stat().st_size for path in paths),
            filename_template=template,
        )
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=features,
            split_infos=[split],
            filename_template=template.template,
            description=f"Trajectories of {settings.checkpoint}, see {SETTINGS}",
            check_data=False,
        )
        _write_results(folder, model)
    return tokens / seconds if seconds else 0.0


class _Decoder:
    """Decodes examples shard by shard, and keeps the time."""

    def __init__(
        self,
        lm: LanguageModel,
        task: tasks.Task,
        method: DiffusionMethod,
        settings: TrajectoryConfig,
    ) -> None:
        self._lm, self._task, self._method, self._settings = lm, task, method, settings
        self.tokens = self.seconds = 0.0

    def decode(self, indices: Sequence[int], bar: tqdm.tqdm[Any]) -> Iterator[dict[str, Any]]:
        """Records of some examples, in their order; the bar moves on as they are decoded."""
        lm, settings = self._lm, self._settings
        assert lm.tokenizer is not None
        examples = [self._task[i] for i in indices]
        prompts = [lm.tokenizer.encode(example.prompt, whole=True) for example in examples]
        for i, prompt in zip(indices, prompts, strict=True):
            if len(prompt) > settings.prompt_len:
                raise ConfigError(
                    f"the prompt of example {i} has {len(prompt)} tokens, more than "
                    f"prompt_len={settings.prompt_len}"
                )
        num = len(prompts)
        lengths, seeds = [settings.gen_len] * num, [settings.seed + i for i in indices]
        asked = Asked(lm, prompts, lengths, seeds)
        completions: dict[int, Completion] = {}
        for b, completion in self._run(asked, generate.LOOP, self._method):
            completions[b] = completion
            bar.update()
        rounds: list[dict[str, np.ndarray] | None] = [None] * num
        answers = np.full(
            (settings.examples_per_shard, settings.gen_len), lm.cfg.eos_token_id, np.int32
        )
        for b, completion in completions.items():
            answers[b, : len(completion.tokens)] = completion.tokens
        if settings.oracle:
            known = knowing(self._method, jnp.asarray(answers))
            asked = dataclasses.replace(asked, beside={"number": range(num)})
            for b, recorded in self._run(asked, RECORDING, known):
                assert isinstance(recorded, Recording)
                rounds[b] = _rounds(recorded.record, answers[b], settings.block_len)
        for b, i in enumerate(indices):
            self.tokens += min(len(completions[b].tokens) + 1, settings.gen_len)
            yield self._record(i, examples[b], prompts[b], completions[b], answers[b], rounds[b])

    def _run(
        self, asked: Asked, loop: Loop, method: DiffusionMethod
    ) -> Iterator[tuple[int, Completion]]:
        pace, rows = Pace(), self._settings.batch_size
        asked.warm_up(loop, method, rows)
        yield from asked.as_finished(loop, method, rows, pace=pace)
        self.seconds += pace.seconds

    def _record(
        self,
        index: int,
        example: tasks.Example,
        prompt: Sequence[int],
        completion: Completion,
        answer: np.ndarray,
        rounds: Mapping[str, np.ndarray] | None,
    ) -> dict[str, Any]:
        G = self._settings.gen_len

        def padded(x: np.ndarray, fill: float) -> np.ndarray:
            return np.pad(x, (0, G - len(x)), constant_values=fill)

        record = {
            "index": index,
            "prompt": np.asarray(prompt, np.int32),
            "completion": answer,
            "step_map": padded(completion.step_map, -1),
            "confidence": padded(completion.confidence, 0),
            "log_prob": padded(completion.log_prob, 0),
            "score": self._task.score(example, completion.text or "")["score"],
            "num_forwards": completion.num_forwards,
        }
        return record if rounds is None else record | {"rounds": dict(rounds)}


def knowing(method: DiffusionMethod, answers: jax.Array | np.ndarray) -> DiffusionMethod:
    """The second decoding: it keeps exactly what is right, and records every round.

    Args:
      method: of the first one.
      answers: [N, G] int32. What that one wrote.
    """
    recorded = Recorded(num_rounds=answers.shape[1] * 2, base=method.confidence)
    return method.replace(confidence=recorded, reviser=GreedyOracle(answers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording(Completion):
    """What the second decoding of an example gives.

    Attributes:
      record: its rounds, without a batch axis.
    """

    record: Record


def _prepare_knowing(
    lm: LanguageModel, method: DiffusionMethod, prompts: Any, *, number: Sequence[int],
    batch_size: int, **asked: Any,
) -> DiffusionState:  # fmt: skip
    """The state before the first round of examples whose answers have these numbers."""
    state = init_state(lm.cfg, method, prompts, batch_size=batch_size, **asked)
    answer = np.zeros(batch_size, np.int32)
    answer[: len(number)] = number
    reviser = state.components.reviser.replace(answer=jnp.array(answer))
    return state.replace(components=state.components.replace(reviser=reviser))


def _collect_rounds(
    state: DiffusionState, lm: LanguageModel, method: DiffusionMethod, num: int,
    stops: Sequence[str],
) -> list[Completion]:  # fmt: skip
    records, counts = jax.device_get((state.components.confidence, state.row_step))
    found: list[Completion] = []
    for b, completion in enumerate(generate.collect(state, lm, method, num, stops)):
        fields = {f.name: getattr(completion, f.name) for f in dataclasses.fields(completion)}
        rounds = slice(int(counts[b]))
        record = Record(*(x[b, rounds] for x in jax.tree.leaves(records)))
        found.append(Recording(**fields, record=record))
    return found


def _without_caches(state: DiffusionState) -> DiffusionState:
    others = dict.fromkeys(ComponentStates.__dataclass_fields__)
    kept = ComponentStates(**others | {"confidence": state.components.confidence})
    return state.replace(cache=None, drafts=None, components=kept)


RECORDING = dataclasses.replace(
    generate.LOOP, prepare=_prepare_knowing, reported=_without_caches, collect=_collect_rounds
)


def _rounds(record: Record, answer: np.ndarray, block_len: int) -> dict[str, np.ndarray]:
    """What the filter learns from, of the second decoding of an example."""
    C = min(block_len, len(answer))
    record = record.replace(
        confidence=record.confidence[:, :C],
        proposal=record.proposal[:, :C],
        undecided=record.undecided[:, :C],
    )
    place = record.block_start[:, None] + np.arange(record.proposal.shape[1])
    exists = place < len(answer)
    right = answer[np.minimum(place, len(answer) - 1)]
    return {
        "confidence": np.asarray(record.confidence),
        "is_right": np.asarray((record.proposal == right) & exists),
        "undecided": np.asarray(record.undecided),
    }


def _features(settings: TrajectoryConfig) -> tfds.features.FeaturesDict:
    def vector(dtype: type[np.generic]) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=(settings.gen_len,), dtype=dtype)

    features = {
        "index": tfds.features.Scalar(np.int32),
        "prompt": tfds.features.Tensor(shape=(None,), dtype=np.int32),
        "completion": vector(np.int32),
        "step_map": vector(np.int32),
        "confidence": vector(np.float32),
        "log_prob": vector(np.float32),
        "score": tfds.features.Scalar(np.float32),
        "num_forwards": tfds.features.Scalar(np.int32),
    }
    if settings.oracle:
        C = min(settings.block_len, settings.gen_len)
        features["rounds"] = tfds.features.FeaturesDict(
            {
                name: tfds.features.Tensor(shape=(None, C), dtype=dtype)
                for name, dtype in (
                    ("confidence", np.float32),
                    ("is_right", np.bool_),
                    ("undecided", np.bool_),
                )
            }
        )
    return tfds.features.FeaturesDict(features)


def _claim(folder: pathlib.Path, settings: TrajectoryConfig, made_with: dict[str, str]) -> None:
    """Writes the settings into a new folder, or checks that a used one has the same."""
    now = json.loads(json.dumps({**dataclasses.asdict(settings), **made_with}))
    path = folder / SETTINGS
    if path.exists():
        check_same(path, now, "trajectories", _MAY_CHANGE)
    elif jax.process_index() == 0:
        write_json(path, now)


_MAY_CHANGE = ("checkpoint", "batch_size", "tensor")  # where and how fast, not what


def _write_results(folder: pathlib.Path, lm: LanguageModel) -> None:
    """results.jsonl, from finished shards; whole or not at all."""
    assert lm.tokenizer is not None
    partial = folder / f"{_RESULTS}.partial"
    with partial.open("w", encoding="utf-8") as file:
        for record in open_records(folder):
            tokens = record["completion"].tolist()
            ends = (i for i, token in enumerate(tokens) if token in lm.cfg.eos_ids)
            tokens = tokens[: next(ends, None)]
            line = {
                "index": int(record["index"]),
                "text": lm.tokenizer.decode(tokens),
                "score": float(record["score"]),
                "num_forwards": int(record["num_forwards"]),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    partial.replace(folder / _RESULTS)


# ---- The command -------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}; fields are set by --config.field=…")
    join_cluster()
    set_up_process()
    try:
        tokens_per_s = run(flags.FLAGS.config, flags.FLAGS.out)
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{flags.FLAGS.out} is complete; {tokens_per_s:,.0f} tokens/s in this call.")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="A file of configs/.", lock_config=True)
    flags.DEFINE_string("out", None, "Folder of the data set; the same one goes on.")
    flags.mark_flags_as_required(["config", "out"])
    app.run(main)
