"""From a task to batches: `encode` makes a row of an example, `rows` packs and sorts rows into
buckets, `batches` shuffles, shards and resumes.
"""

from train.data.batches import Batch, to_global, train_iterator, valid_batches
from train.data.encode import encode_example, encode_text

__all__ = [
    "Batch",
    "encode_example",
    "encode_text",
    "to_global",
    "train_iterator",
    "valid_batches",
]
