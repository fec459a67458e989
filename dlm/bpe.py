"""A byte-level BPE tokenizer learned from texts, for models that begin from nothing.

Reference: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units",
arXiv:1508.07909, on bytes and within words as GPT-2 cuts them, so that it covers any text.
"""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dlm.tokenizer import EOS, MASK, Tokenizer

NUM_BYTES = 256
NUM_SPECIAL = 2  # end-of-text and MASK


def learn_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """The bytes, the merges that the texts ask for, end-of-text (= pad) and MASK, in this order.

    The same texts give the same tokens, in every process of a run.

    Example:
      >>> tokenizer = learn_bpe(["a dog and a dog"], 262)
      >>> tokenizer.decode(tokenizer.encode("a dög"))
      'a dög'

    Args:
      texts: what is learned from.
      vocab_size: most tokens, at least 258; fewer where the texts have no more pairs to merge.

    Raises:
      ValueError: there is no room for the bytes and the special tokens.
    """
    if vocab_size < NUM_BYTES + NUM_SPECIAL:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {NUM_BYTES + NUM_SPECIAL}: the bytes, "
            "end-of-text and MASK"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([EOS, MASK])
    eos = backend.get_vocab_size() - NUM_SPECIAL
    return Tokenizer(backend, eos, eos, mask_token_id=eos + 1)
