"""From a task to batches: tokenised, padded, shuffled, sharded over processes, resumable.

A batch is a dict of numpy arrays, described in `train.objectives`. Prompts are padded on the left
and completions filled up with EOS on the right, so that in every row the completion starts at the
same index, as it does when decoding. With `data.buckets` the rows of a batch have like lengths, and
with `data.packing` texts are cut into rows without any padding: see `train.data.rows`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from dlm import tasks
from dlm.sharding import logical_sharding
from dlm.tokenizer import Tokenizer
from train.config import ConfigError, DataConfig
from train.data.encode import encode_example, encode_text, mask_text
from train.data.rows import Bucketed, Packed, Row, Whole, bucket_sizes, rows_of, stack

Batch = dict[str, Any]

# How many texts are encoded at once to see whether they fit.
_AT_ONCE = 1024


def train_iterator(
    task: tasks.Task, tokenizer: Tokenizer, data: DataConfig, num_shards: int = 1
) -> grain.DatasetIterator:
    """Endless batches, each epoch in another order; the iterator's state can be saved.

    Args:
      task: examples.
      tokenizer: encodes them.
      data: lengths, seed, batch size over all processes. Batches do not depend on how many
        processes there are, each of which makes its own rows of them. Two exceptions: with buckets
        the rows of a batch are rounded to what processes and shards divide, and with packing each
        process has every n-th text, and packs its rows of those.
      num_shards: that the rows of a batch are to be divided into.

    Raises:
      ConfigError: the batch size cannot be divided, there are too few examples, or one is too long
        (where the task has them `loaded`). While iterating: an example is too long or cannot be
        read.
    """
    process = process_index, process_count = jax.process_index(), jax.process_count()
    if not data.batch_size:
        return Whole(_whole(task, tokenizer, data, num_shards, "data.train"))
    if data.batch_size % process_count:
        raise ConfigError(
            f"data.batch_size={data.batch_size} must be a multiple of {process_count} processes"
        )
    if data.batch_size % num_shards:
        raise ConfigError(
            f"data.batch_size={data.batch_size} must be a multiple of mesh.data * mesh.fsdp = "
            f"{num_shards}, so that every device has as many rows"
        )
    if data.packing and len(task) < process_count:
        raise ConfigError(f"data.train has {len(task)} examples for {process_count} processes")
    encode = _encoder(task, tokenizer, data)
    used = _that_fit(task, tokenizer, data, encode)
    local_batch_size = data.batch_size // process_count
    # With packing every process has texts of its own; else all know the order of all examples.
    texts = used[process_index::process_count] if data.packing else used
    order = grain.MapDataset.source(texts)
    order = order.seed(data.seed).shuffle().repeat()
    rows = order.map(encode)
    if not data.buckets and not data.packing:
        options = grain.ReadOptions(
            num_threads=data.num_threads,
            prefetch_buffer_size=max(data.prefetch, data.num_threads) if data.num_threads else 0,
        )
        if process_count > 1:
            first = rows_of(data.batch_size, process).start

            def example(i: int) -> int:
                """Which one is the i-th row of this process."""
                batch, row = divmod(i, local_batch_size)
                place: int = order[batch * data.batch_size + first + row]
                return place

            num_batches = len(order) // data.batch_size
            rows = grain.MapDataset.range(num_batches * local_batch_size).map(example).map(encode)
        # An endless stream has no remainder, but keeping one overflows in grain for batches of 1.
        batches = rows.batch(local_batch_size, drop_remainder=True)
        return iter(batches.to_iter_dataset(options))
    # One thread makes batches, and the others, if any, encode rows for it.
    num_readers = max(data.num_threads - 1, 0)
    options = grain.ReadOptions(
        num_threads=num_readers,
        prefetch_buffer_size=max(local_batch_size, num_readers) if num_readers else 0,
    )
    iterator = iter(rows.to_iter_dataset(options))
    made: grain.DatasetIterator
    if data.packing:
        made = Packed(
            iterator,
            encode,
            local_batch_size,
            data.completion_len,
            keep_apart=data.keep_apart,
        )
    else:
        made = Bucketed(iterator, encode, _bucket_sizes(data, num_shards), process)
    return grain.experimental.ThreadPrefetchDatasetIterator(
        made, data.prefetch if data.num_threads else 0
    )


def valid_batches(
    task: tasks.Task | None,
    tokenizer: Tokenizer,
    data: DataConfig,
    num_batches: int,
    num_shards: int = 1,
) -> list[Batch]:
    """The first `num_batches` whole batches of a task, in its own order.

    With buckets these are the ones that are full first.

    Args: as `train_iterator`; without a task there are no batches.

    Raises:
      ConfigError: the task has fewer examples, or one of them is too long or cannot be read.
    """
    if task is None:
        return []
    encode = _encoder(task, tokenizer, data)
    process = jax.process_index(), jax.process_count()
    if not data.batch_size:
        if num_batches != 1:
            raise ConfigError(
                f"train.num_eval_batches={num_batches} must be 1 with data.batch_size=0, for which "
                "all rows are one batch"
            )
        return [_whole(task, tokenizer, data, num_shards, "data.valid")]
    used: Sequence[int] = range(len(task))
    if data.too_long == "leave_out":
        used = _that_fit(task, tokenizer, data, encode)
    if not data.buckets and not data.packing:
        if len(used) < num_batches * data.batch_size:
            raise ConfigError(
                f"data.valid has {len(used)} examples; train.num_eval_batches={num_batches} of "
                f"data.batch_size={data.batch_size} need {num_batches * data.batch_size}"
            )
        mine = rows_of(data.batch_size, process)
        starts = range(0, num_batches * data.batch_size, data.batch_size)
        return [
            stack(encode(index) for index in used[start : start + data.batch_size][mine])
            for start in starts
        ]
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    rows = iter(grain.MapDataset.source(used).map(encode).to_iter_dataset(options))
    found: grain.DatasetIterator
    if data.packing:
        found = Packed(rows, encode, data.batch_size, data.completion_len, process, data.keep_apart)
    else:
        found = Bucketed(rows, encode, _bucket_sizes(data, num_shards), process)
    batches = list(itertools.islice(found, num_batches))
    if len(batches) < num_batches:
        raise ConfigError(
            f"data.valid has {len(used)} examples, enough for {len(batches)} whole batches; "
            f"train.num_eval_batches={num_batches} are needed"
        )
    return batches


def to_global(batch: Batch, mesh: Mesh) -> Batch:
    """The processes' batches as one batch of global arrays, rows over the mesh's batch axes.

    Raises:
      ConfigError: a process would need rows of another one.
    """
    num_processes = jax.process_count()
    rows = len(next(iter(batch.values()))) * num_processes

    def sharding_of(local: np.ndarray) -> NamedSharding:
        axes = ("batch",) + (None,) * (local.ndim - 1)
        return logical_sharding((rows, *local.shape[1:]), axes, mesh)

    shardings = jax.tree.map(sharding_of, batch)
    if num_processes == 1:  # one call for all arrays takes a training loop half the time
        return jax.device_put(batch, shardings)

    def place(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
        shape = (rows, *local.shape[1:])
        indices = sharding.addressable_devices_indices_map(shape).values()
        needed = {index[0].indices(rows) for index in indices if index is not None}
        if sum(stop - first for first, stop, _ in needed) != len(local):
            raise ConfigError(
                f"mesh.data * mesh.fsdp = {mesh.shape['data'] * mesh.shape['fsdp']} must be a "
                f"multiple of {num_processes} processes, so that each has its own rows"
            )
        return jax.make_array_from_process_local_data(sharding, local, shape)

    return jax.tree.map(place, batch, shardings)


def _whole(
    task: tasks.Task, tokenizer: Tokenizer, data: DataConfig, num_shards: int, where: str
) -> Batch:
    """All rows of a task, of which each process has its own."""
    process = jax.process_index(), jax.process_count()
    encode = _encoder(task, tokenizer, data)
    used = _that_fit(task, tokenizer, data, encode)
    if len(used) % math.lcm(num_shards, process[1]):
        raise ConfigError(
            f"{where} has {len(used)} rows, all of them in a batch with data.batch_size=0: they "
            f"must be a multiple of mesh.data * mesh.fsdp = {num_shards} and of the number of "
            f"processes, {process[1]}"
        )
    return stack(encode(index) for index in used[rows_of(len(used), process)])


def _encoder(task: tasks.Task, tokenizer: Tokenizer, data: DataConfig) -> Callable[[int], Row]:
    """From an example's index to its row; errors name the record that the example is from."""

    def encode(index: int) -> Row:
        try:
            example = task[index]
        except ValueError as error:  # a record that does not fit; it is named already
            raise ConfigError(str(error)) from error
        try:
            if data.packing:
                row = encode_text(example, tokenizer, data.plain)
            else:
                lengths = data.prompt_len, data.completion_len
                cut = data.too_long == "cut"
                row = encode_example(example, tokenizer, *lengths, cut, data.plain)
        except ConfigError as error:
            raise ConfigError(f"{task.where(index)}: {error}") from error
        return {**row, "index": np.array(index, np.int32)}

    return encode


def _that_fit(
    task: tasks.Task, tokenizer: Tokenizer, data: DataConfig, encode: Callable[[int], Row]
) -> Sequence[int]:
    """The examples that are used: all, or those that are short enough.

    A task that has its examples in memory is searched for one that would end a run which has long
    begun; of another one this is done only to leave examples out.

    Raises:
      ConfigError: an example is too long and is to be refused, or none is short enough.
    """
    everything = range(len(task))
    if data.packing:  # no text is too long
        _check_loaded(task, tokenizer, data, encode)
        return everything
    encode_cut = _encoder(task, tokenizer, dataclasses.replace(data, too_long="cut"))
    _check_loaded(task, tokenizer, data, encode_cut)
    if data.too_long == "cut" or (data.too_long == "refuse" and not task.loaded):
        return everything
    wrong = []
    for start in range(0, len(task), _AT_ONCE):
        chunk = everything[start : start + _AT_ONCE]
        try:
            lengths = _num_tokens([task[index] for index in chunk], tokenizer, data.plain)
        except Exception:  # neither tasks nor the tokenizers library raise anything narrower
            for index in chunk:
                encode_cut(index)  # says which example it is, and what is wrong
            raise
        for index, (prompt, completion) in zip(chunk, lengths, strict=True):
            if prompt > data.prompt_len or completion > data.completion_len:
                try:
                    encode(index)
                except ConfigError:
                    wrong.append(index)
    if not wrong:
        return everything
    if data.too_long == "refuse":
        try:
            encode(wrong[0])
        except ConfigError as error:
            count = f"; examples that do not fit: {len(wrong)}" if len(wrong) > 1 else ""
            raise ConfigError(f"{error}{count}") from error
    if len(wrong) == len(task):
        raise ConfigError(
            f"all {len(task)} examples are longer than data.prompt_len={data.prompt_len} and "
            f"data.completion_len={data.completion_len}: data.too_long='leave_out' leaves none"
        )
    logging.info("Leaving out %d of %d examples that are too long.", len(wrong), len(task))
    return sorted(set(everything) - set(wrong))


def _check_loaded(
    task: tasks.Task, tokenizer: Tokenizer, data: DataConfig, encode: Callable[[int], Row]
) -> None:
    """Encodes the examples in memory that may be refused for something else than their length."""
    mask = None if data.plain else mask_text(tokenizer)
    for index, example in enumerate(task.loaded):
        if isinstance(example, tasks.Example):
            has_mask = mask is not None and (mask in example.prompt or mask in example.completion)
            if has_mask or (data.packing and example.prompt):
                encode(index)


def _num_tokens(
    examples: Sequence[Any], tokenizer: Tokenizer, plain: bool
) -> list[tuple[int, int]]:
    """At most how many tokens the prompt has, and the completion with its EOS, of some examples."""
    if isinstance(examples[0], tasks.Encoded):
        return [(len(example.prompt), len(example.completion)) for example in examples]
    # Prompts may have a begin token already.
    prompts = tokenizer.num_tokens([x.prompt for x in examples], whole=True, plain=plain)
    completions = tokenizer.num_tokens([x.completion for x in examples], plain=plain)
    return [(p, c + 1) for p, c in zip(prompts, completions, strict=True)]


def _bucket_sizes(data: DataConfig, num_shards: int) -> dict[tuple[int, int], int]:
    largest = (data.prompt_len, data.completion_len)
    multiple = math.lcm(num_shards, jax.process_count())
    return bucket_sizes(data.buckets, largest, data.batch_size, multiple)
