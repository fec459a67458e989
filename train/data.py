"""From a task to batches: tokenised, padded, shuffled, sharded over processes, resumable.

A batch is a dict of numpy arrays, described in `train.objectives`. Prompts are padded on the left
and completions filled up with EOS on the right, so that in every row the completion starts at the
same index, as it does when decoding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from dlm import tasks
from dlm.sharding import logical_sharding
from dlm.tokenizer import Tokenizer
from train.config import ConfigError, DataConfig

Batch = dict[str, Any]


def encode_example(
    example: tasks.Example, tokenizer: Tokenizer, prompt_len: int, completion_len: int
) -> dict[str, np.ndarray]:
    """One row of a batch.

    Args:
      example: a prompt and a completion, which are encoded each on its own, as a prompt is when
        decoding.
      tokenizer: encodes both.
      prompt_len: P.
      completion_len: G; the completion and one EOS must fit.

    Returns:
      prompt [P], prompt_start [], completion [G] and completion_len [], all int32; see
      `train.objectives`.

    Raises:
      ConfigError: the prompt or the completion is too long.
    """
    try:
        prompt, completion = tokenizer.encode(example.prompt), tokenizer.encode(example.completion)
    except ValueError as error:
        raise ConfigError(f"data.tokenizer does not fit the task: {error}") from error
    if len(prompt) > prompt_len:
        raise ConfigError(
            f"a prompt has {len(prompt)} tokens, more than data.prompt_len={prompt_len}: "
            f"{_shorten(example.prompt)}"
        )
    if len(completion) + 1 > completion_len:
        raise ConfigError(
            f"a completion has {len(completion)} tokens and its end, more than "
            f"data.completion_len={completion_len}: {_shorten(example.completion)}"
        )
    start = prompt_len - len(prompt)
    num_eos = completion_len - len(completion)
    return {
        "prompt": np.array([tokenizer.pad_token_id] * start + prompt, np.int32),
        "prompt_start": np.array(start, np.int32),
        "completion": np.array(completion + [tokenizer.eos_token_id] * num_eos, np.int32),
        "completion_len": np.array(len(completion) + 1, np.int32),
    }


def train_iterator(
    task: tasks.Task, tokenizer: Tokenizer, data: DataConfig
) -> grain.DatasetIterator:
    """Endless batches, each epoch in another order; the iterator's state can be saved.

    Args:
      task: examples.
      tokenizer: encodes them.
      data: lengths, seed, batch size over all processes. Process i of n gets every n-th example,
        from the i-th on.

    Raises:
      ConfigError: the batch size cannot be divided, or there are too few examples. While
        iterating: an example is too long.
    """
    process_index, process_count = jax.process_index(), jax.process_count()
    if data.batch_size % process_count:
        raise ConfigError(
            f"data.batch_size={data.batch_size} must be a multiple of {process_count} processes"
        )
    if len(task) < process_count:
        raise ConfigError(f"data.train has {len(task)} examples for {process_count} processes")

    def encode(index: int) -> dict[str, np.ndarray]:
        row = encode_example(task[index], tokenizer, data.prompt_len, data.completion_len)
        return {**row, "index": np.array(index, np.int32)}

    dataset = (
        grain.MapDataset.range(process_index, len(task), process_count)
        .seed(data.seed)
        .shuffle()
        .repeat()
        .map(encode)
        .batch(data.batch_size // process_count)
    )
    options = grain.ReadOptions(
        num_threads=data.num_threads,
        prefetch_buffer_size=max(data.prefetch, data.num_threads) if data.num_threads else 0,
    )
    return iter(dataset.to_iter_dataset(options))


def valid_batches(
    task: tasks.Task | None,
    tokenizer: Tokenizer,
    data: DataConfig,
    num_batches: int,
) -> list[Batch]:
    """The first `num_batches` whole batches of a task, in its own order.

    Args: as `train_iterator`; without a task there are no batches.

    Raises:
      ConfigError: the task has fewer examples, or one of them is too long.
    """
    if task is None:
        return []
    if len(task) < num_batches * data.batch_size:
        raise ConfigError(
            f"data.valid has {len(task)} examples; train.num_eval_batches={num_batches} of "
            f"data.batch_size={data.batch_size} need {num_batches * data.batch_size}"
        )
    batches = []
    for i in range(num_batches):
        indices = range(i * data.batch_size, (i + 1) * data.batch_size)
        rows = (
            encode_example(task[j], tokenizer, data.prompt_len, data.completion_len)
            for j in indices[jax.process_index() :: jax.process_count()]
        )
        batches.append(_stack(rows))
    return batches


def to_global(batch: Batch, mesh: Mesh) -> Batch:
    """The processes' batches as one batch of global arrays, rows over the mesh's batch axes.

    Raises:
      ConfigError: a process would need rows of another one.
    """
    rows = len(batch["prompt_start"]) * jax.process_count()

    def place(local: np.ndarray) -> jax.Array:
        shape = (rows, *local.shape[1:])
        sharding = logical_sharding(shape, ("batch",) + (None,) * (local.ndim - 1), mesh)
        indices = sharding.addressable_devices_indices_map(shape).values()
        needed = {index[0].indices(rows) for index in indices if index is not None}
        if sum(stop - first for first, stop, _ in needed) != len(local):
            raise ConfigError(
                f"mesh.data * mesh.fsdp = {mesh.shape['data'] * mesh.shape['fsdp']} must be a "
                f"multiple of {jax.process_count()} processes, so that each has its own rows"
            )
        return jax.make_array_from_process_local_data(sharding, local, shape)

    return jax.tree.map(place, batch)


def _stack(rows: Iterable[dict[str, np.ndarray]]) -> Batch:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]}...{text[-17:]}")
