import numpy as np
import pytest

from dlm.tokenizer import byte_tokenizer
from scripts.token_frequencies.count import frequencies


def test_shares_of_tokens_by_hand():
    tokenizer = byte_tokenizer()
    a, b, never = (tokenizer.encode(text)[0] for text in "abc")
    shares = frequencies(tokenizer, ["aab", "a"], tokenizer.vocab_size)
    assert shares.dtype == np.float32 and shares.shape == (tokenizer.vocab_size,)
    np.testing.assert_allclose(shares[[a, b, never]], [3 / 4, 1 / 4, 1 / 4])
    with pytest.raises(ValueError, match="no tokens"):
        frequencies(tokenizer, [], 8)
