"""Tokenizers inside GGUF files: how text is cut and merged, special tokens, and what is refused."""

import itertools
import random

import pytest

import dlm
from dlm.hf.gguf import installed_smollm2
from dlm.hf.gguf_file import GGUFFile, open_gguf
from dlm.hf.gguf_tokenizer import PRE_TOKENIZERS, load_gguf_tokenizer
from dlm.tokenizer import byte_tokenizer
from tests.lib.gguf_files import BYTES, TOKENIZER


def read(metadata, **changes):
    """The tokenizer of these keys; changes are behind "tokenizer.ggml.", None leaves one out."""
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    given = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    return load_gguf_tokenizer(GGUFFile("model.gguf", given, {}))


def framed(tokenizer, text):
    """Ids with what the tokenizer puts around a text."""
    return tokenizer.backend.encode(text).ids


# ---- Byte-level BPE ---------------------------------------------------------------------------


def test_pieces_and_special_tokens():
    tokenizer = read(TOKENIZER)
    ids = tokenizer.encode("ab cab\n<|end|> ab")
    a, b, c, newline, space = (BYTES.index(x) for x in "abcĊĠ")
    assert ids == [258, space, c, 258, newline, 256, 259]
    assert (a, b) == (BYTES.index("a"), BYTES.index("b"))
    assert tokenizer.decode(ids) == "ab cab\n ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "ab cab\n<|end|> ab"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (
        256, 256, 257,
    )  # fmt: skip
    assert tokenizer.bos_token_id is None and tokenizer.chat_template is None
    assert tokenizer.decode(tokenizer.encode("Größe 日本 🙂")) == "Größe 日本 🙂"


CUTS = {  # as the tokenizers that models publish cut this text
    "gpt-2": "I|'|LL| pay|'ve| 1234|.|5|!!|  \n\n| camelCase|\n",
    "smollm": "I|'|LL| pay|'ve| |1|2|3|4|.|5|!!|  \n\n| camelCase|\n",
    "starcoder": "I|'|LL| pay|'ve| |1|2|3|4|.|5|!!|  \n\n| camelCase|\n",
    "qwen2": "I|'LL| pay|'ve| |1|2|3|4|.|5|!!|  \n\n| camelCase|\n",
    "llama-bpe": "I|'LL| pay|'ve| |123|4|.|5|!!|  \n\n| camelCase|\n",
    "tekken": "I|'LL| pay|'ve| |1|2|3|4|.|5|!!|  \n\n| camel|Case|\n",
}
CUTS |= dict.fromkeys(["llama3", "llama-v3", "smaug-bpe"], CUTS["llama-bpe"])


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_text_is_cut(name):
    backend = read(TOKENIZER, pre=name).backend
    text = CUTS[name].replace("|", "")
    pieces = [text[a:b] for _, (a, b) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert "|".join(pieces) == CUTS[name]


def test_only_qwen2_normalises():
    decomposed = "e\u0301"
    assert read(TOKENIZER, pre="qwen2").encode(decomposed) == read(TOKENIZER).encode("é")
    for name in set(PRE_TOKENIZERS) - {"qwen2"}:
        assert len(read(TOKENIZER, pre=name).encode(decomposed)) == 3


def test_pieces_that_are_tokens():
    """Llama 3 takes a piece that is a token whole, also where no merge makes it."""
    tokens = [*TOKENIZER["tokenizer.ggml.tokens"], "xyz"]
    more = {"tokens": tokens, "token_type": [*TOKENIZER["tokenizer.ggml.token_type"], 1]}
    assert read(TOKENIZER, pre="llama-bpe", **more).encode("xyz") == [260]
    assert len(read(TOKENIZER, pre="qwen2", **more).encode("xyz")) == 3


def test_what_is_put_around_a_text():
    assert framed(read(TOKENIZER), "ab") == [258]
    bos = {"bos_token_id": 257, "mask_token_id": None}
    assert framed(read(TOKENIZER, **bos), "ab") == [258]  # GPT-2 does not, unless it is told
    assert framed(read(TOKENIZER, **bos, add_bos_token=True), "ab") == [257, 258]
    assert framed(read(TOKENIZER, **bos, pre="llama-bpe"), "ab") == [257, 258]
    assert framed(read(TOKENIZER, **bos, pre="llama-bpe", add_bos_token=False), "ab") == [258]
    assert framed(read(TOKENIZER, pre="llama-bpe"), "ab") == [258]  # there is none
    assert framed(read(TOKENIZER, add_eos_token=True), "ab") == [258, 256]
    assert read(TOKENIZER, **bos, add_bos_token=True).encode("ab") == [258]


def test_kinds_of_tokens():
    """Control tokens are special, a user's are text, and what only fills up is not there."""
    tokens = [*TOKENIZER["tokenizer.ggml.tokens"], "<think>", "[PAD261]"]
    types = [*TOKENIZER["tokenizer.ggml.token_type"], 4, 5]
    tokenizer = read(TOKENIZER, tokens=tokens, token_type=types)
    assert tokenizer.encode("<think>ab") == [260, 258]
    assert tokenizer.decode([256, 260, 258, 261]) == "<think>ab"
    assert tokenizer.vocab_size == 261


def test_chat_templates():
    one = read({**TOKENIZER, "tokenizer.chat_template": "{{ unk_token }}!"}, unknown_token_id=5)
    assert one.chat_template == "{{ unk_token }}!"
    assert one.apply_chat_template([{"role": "user", "content": "x"}]) == f"{BYTES[5]}!"
    named = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    assert read({**TOKENIZER, **named}).chat_template == {"default": "a", "tool_use": "b"}
    with pytest.raises(ValueError, match="chat template 'default' is 1, not text"):
        read({**TOKENIZER, "tokenizer.chat_template": 1})


def test_a_whole_tokenizer_comes_first():
    whole = byte_tokenizer().backend.to_str()
    keys = {"tokenizer.huggingface.json": whole, "tokenizer.chat_template": "{{ bos_token }}"}
    tokenizer = read({**TOKENIZER, **keys}, pre="mystery")
    assert tokenizer.encode("Hi") == [72, 105]
    assert tokenizer.chat_template == "{{ bos_token }}"
    with pytest.raises(ValueError, match=r"broken tokenizer.huggingface.json"):
        read({**TOKENIZER, "tokenizer.huggingface.json": "{"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "model='bert' is not supported; only 'gpt2' and 'llama'"),
        ({"model": None}, "model=None is not supported"),
        ({"pre": "mystery"}, "pre='mystery' is not known; only 'gpt-2', 'llama-bpe'"),
        ({"pre": None}, "pre=None is not known"),
        ({"tokens": None}, "tokenizer.ggml.tokens must be given"),
        ({"tokens": [1] * 260}, "tokenizer.ggml.tokens must be a list of str"),
        ({"token_type": [1] * 259}, "token_type must be a list of 260 numbers"),
        ({"tokens": [*TOKENIZER["tokenizer.ggml.tokens"][:-1], "ab"]}, "1 of .* are there twice"),
        ({"merges": None}, "merges must be a list of pairs"),
        ({"merges": ["a b", "ab"]}, "merges must be a list of pairs"),
        ({"add_bos_token": 1}, "add_bos_token must be bool"),
        ({"merges": ["a c"]}, "broken tokenizer.ggml.merges"),
        ({"add_space_prefix": True}, "add_space_prefix must be false"),
        ({"add_bos_token": True}, "add_bos_token needs bos_token_id beside it"),
        ({"add_sep_token": True}, "add_sep_token is not known"),
        ({"mystery": 1}, "tokenizer.ggml.mystery is not known for tokenizers of kind 'gpt2'"),
        ({"eos_token_id": None}, "tokenizer.ggml.eos_token_id must be given"),
    ],
)
def test_tokenizers_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"model.gguf.*{message}"):
        read(TOKENIZER, **changes)


# ---- SentencePiece ----------------------------------------------------------------------------

PIECES = {
    "▁the": -1.0, "▁a": -2.0, "he": -3.0, "▁t": -4.0, "lo": -5.0, "hel": -6.0, "hello": -7.0,
    "▁hello": -7.5, "ab": -8.0, "ba": -8.5, "aba": -9.0,
    **{letter: -20.0 - i for i, letter in enumerate("▁abehlot")},
}  # fmt: skip
SENTENCE_PIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [
        "<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES, "<|user|>",
    ],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES) + [4],
    "tokenizer.ggml.scores": [0.0] * 259 + list(PIECES.values()) + [0.0],
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip


def merged(text):
    """SentencePiece's rule, by hand: the neighbours of the highest score first, from the left."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [
            (PIECES.get(left + right, -1e9), -i)
            for i, (left, right) in enumerate(itertools.pairwise(symbols))
        ]
        score, at = max(pairs, default=(-1e9, 0))
        if score == -1e9:
            break
        symbols[-at : -at + 2] = ["".join(symbols[-at : -at + 2])]
    tokens = SENTENCE_PIECE["tokenizer.ggml.tokens"]
    spelled = [[s] if s in PIECES else [f"<0x{b:02X}>" for b in s.encode()] for s in symbols]
    return [tokens.index(piece) for pieces in spelled for piece in pieces]


def test_pieces_of_the_highest_score_merge_first():
    tokenizer = read(SENTENCE_PIECE)
    rng = random.Random(0)
    texts = ["hello the hello", "ababa", "xé hello  the", "", *(
        "".join(rng.choices("abehlot é", k=rng.randint(1, 30))) for _ in range(300)
    )]  # fmt: skip
    for text in texts[:3] + texts[4:]:
        assert tokenizer.encode(text) == merged(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == [] and framed(tokenizer, "") == [1]


def test_a_space_is_put_before_what_follows_a_special_token():
    tokenizer = read(SENTENCE_PIECE)
    names = SENTENCE_PIECE["tokenizer.ggml.tokens"]
    ids = tokenizer.encode("the</s>the<|user|>a")
    assert [names[i] for i in ids] == ["▁the", "</s>", "▁the", "<|user|>", "▁a"]
    assert framed(tokenizer, "the") == [1, names.index("▁the")]
    assert framed(read(SENTENCE_PIECE, add_bos_token=False), "the") == [names.index("▁the")]
    plain = read(SENTENCE_PIECE, add_space_prefix=False)
    assert [names[i] for i in plain.encode("the a")] == ["t", "he", "▁a"]
    assert plain.decode(plain.encode(" the")) == " the"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "scores must be a list of"),
        ({"scores": [0.0]}, "scores must be a list of"),
        ({"pre": "llama-bpe"}, "pre and remove_extra_whitespaces must be absent"),
        ({"remove_extra_whitespaces": True}, "pre and remove_extra_whitespaces must be absent"),
        ({"precompiled_charsmap": [1]}, "precompiled_charsmap is not known"),
    ],
)
def test_sentence_pieces_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read(SENTENCE_PIECE, **changes)


# ---- A real one -------------------------------------------------------------------------------


def smollm2():
    try:
        return installed_smollm2()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_encodings_of_smollm2():
    """Ids as readers of this file in other languages check them."""
    tokenizer = load_gguf_tokenizer(open_gguf(smollm2()))
    for text, ids in {
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "\n": [198],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text


@pytest.mark.slow
@pytest.mark.exhaustive
def test_smollm2_answers():
    from decode.complete import complete

    lm = dlm.load(smollm2(), dtype="float32")
    question = {"role": "user", "content": "What is the capital of France?"}
    answer = complete(lm, lm.tokenizer.apply_chat_template([question]), gen_len=16)
    assert (answer.text, answer.finish_reason) == ("The capital of France is Paris.", "eos")
