"""From a task to batches: `encode` makes a row of an example, `rows` packs and sorts rows into
buckets, `batches` shuffles, shards and resumes, `facts` says what a task's examples are.
"""

from train.data.batches import Batch, to_global, train_iterator, valid_batches
from train.data.encode import encode_example, encode_text
from train.data.facts import describe

__all__ = [
    "Batch",
    "describe",
    "encode_example",
    "encode_text",
    "to_global",
    "train_iterator",
    "valid_batches",
]
