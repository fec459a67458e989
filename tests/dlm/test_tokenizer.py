"""Tokenizers: lossless, longest match, files, chat templates."""

import doctest
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

import dlm.tokenizer
from dlm.tokenizer import byte_tokenizer, has_tokenizer, load_tokenizer, word_tokenizer

_PIECES = ["copy ", "1 ", "2 ", "12 ", "Is it (so)? ", "a|b*", "\n", "é", "#-~ ", "日本"]

# Any but surrogates. (`st.characters` takes seconds to set up.)
_CHARACTERS = st.one_of(
    st.integers(0, 127), st.integers(0, 0xD7FF), st.integers(0xE000, 0x10FFFF)
).map(chr)


def test_docstring_example():
    assert doctest.testmod(dlm.tokenizer).failed == 0


# ---- Bytes ------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(text=st.lists(_CHARACTERS).map("".join))
def test_byte_ids_are_the_bytes_and_come_back(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_byte_tokenizer_recognises_special_tokens():
    tokenizer = byte_tokenizer()
    text = "a<|startoftext|>b<|mdm_mask|> <|endoftext|>"
    ids = tokenizer.encode(text)
    assert ids == [97, 257, 98, 258, 32, 256]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == "ab "
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id) == (259, 256, 256)
    assert (tokenizer.bos_token_id, tokenizer.mask_token_id) == (257, 258)


def test_invalid_bytes_and_unknown_ids():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode([72, 255, 105, 0xC3]) == "H\ufffdi\ufffd"
    assert tokenizer.decode([72, 5000, 105]) == "Hi"  # rows of a model beyond the tokenizer


def test_encode_wants_a_string():
    with pytest.raises(TypeError, match=r"text=\[1\] must be a str, not a list"):
        byte_tokenizer().encode([1])


# ---- Words ------------------------------------------------------------------------------------


def _longest_match(pieces, text):
    """The ids, or the first position that is not covered."""
    ids, at = [], 0
    while at < len(text):
        fits = [piece for piece in pieces if text.startswith(piece, at)]
        if not fits:
            return at
        ids.append(pieces.index(max(fits, key=len)))
        at += len(max(fits, key=len))
    return ids


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.text(r"ab.*\([ é-", min_size=1, max_size=4), min_size=1, unique=True),
    data=st.data(),
)
def test_words_are_cut_by_leftmost_longest_match(pieces, data):
    text = "".join(data.draw(st.lists(st.sampled_from([*pieces, "a"]), max_size=8)))
    tokenizer, expected = word_tokenizer(pieces), _longest_match(pieces, text)
    if isinstance(expected, int):
        with pytest.raises(ValueError) as error:
            tokenizer.encode(text)
        assert f"text[{expected}:]=" in str(error.value)
    else:
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == text


def test_word_tokenizer_ids_and_special_tokens():
    tokenizer = word_tokenizer(_PIECES)
    text = "copy 12 1 <|mdm_mask|><|endoftext|>Is it (so)? a|b*\n"
    ids = tokenizer.encode(text)
    assert ids == [0, 3, 1, 11, 10, 4, 5, 6]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == "copy 12 1 Is it (so)? a|b*\n"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (10, 10, 11)
    assert (tokenizer.vocab_size, tokenizer.bos_token_id) == (12, None)
    assert tokenizer.encode("") == []


def test_uncovered_text_is_named():
    tokenizer = word_tokenizer(_PIECES)
    with pytest.raises(ValueError, match=r"text\[17:\]='7 1 '.* after '1 <\|mdm_mask\|>12 '"):
        tokenizer.encode("1 <|mdm_mask|>12 7 1 ")


@pytest.mark.parametrize("pieces", [[], ["a", ""], ["a", "b", "a"], ["a", "b<|mdm_mask|>"]])
def test_word_tokenizer_refuses_bad_pieces(pieces):
    with pytest.raises(ValueError, match="at least one, all different, non-empty"):
        word_tokenizer(pieces)


# ---- Files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: word_tokenizer(_PIECES)])
def test_save_and_load(tmp_path, make):
    tokenizer = make()
    assert not has_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "new")
    again = load_tokenizer(tmp_path / "new")
    assert has_tokenizer(tmp_path / "new")
    for name in ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id", "mask_token_id"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    text = "".join(_PIECES) + "<|mdm_mask|>copy "
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text), False) == text


def test_a_loaded_word_tokenizer_still_refuses_uncovered_text(tmp_path):
    word_tokenizer(_PIECES).save(tmp_path)
    with pytest.raises(ValueError, match=r"text\[5:\]='x'"):
        load_tokenizer(tmp_path).encode("copy x")


def _published(directory, **config):
    """A small tokenizer.json that truncates, pads and adds a begin token, like some published."""
    vocab = {"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4, "<|mdm_mask|>": 7}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>", "<|mdm_mask|>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 3)])
    backend.enable_truncation(2)
    backend.enable_padding(length=9, pad_id=4, pad_token="</s>")
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_published_tokenizer(tmp_path):
    path = _published(tmp_path, bos_token={"content": "<s>"}, eos_token="</s>", pad_token=None)
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("abba</s>") == [2, 1, 0, 4]  # nothing added, cut or padded
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (3, 4, 4)
    assert tokenizer.mask_token_id == 7  # by its name, as in LLaDA's files
    assert tokenizer.vocab_size == 8  # ids 5 and 6 are not used


def test_qwen2_files(tmp_path):
    """Dream publishes vocab.json and merges.txt; its added tokens are in tokenizer_config.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "he", "hel", "Ġw", "ll"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe l\nĠ w\n")
    added = {
        str(260 + i): {
            "content": c,
            "special": True,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for i, c in enumerate(["<|endoftext|>", "<|beginoftext|>", "<|mask|>"])
    }
    config = {
        "tokenizer_class": "DreamTokenizer",
        "added_tokens_decoder": added,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "bos_token": "<|beginoftext|>",
        "mask_token": "<|mask|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (260, 260)
    assert (tokenizer.bos_token_id, tokenizer.mask_token_id, tokenizer.vocab_size) == (
        261,
        262,
        263,
    )
    text = "hello  world's 42\n\n日<|mask|>"
    ids = tokenizer.encode(text)
    spelled = [tokenizer.backend.id_to_token(i) for i in ids]
    assert spelled[:10] == ["he", "ll", "o", "Ġ", "Ġw", "o", "r", "l", "d", "'"]
    assert ids[-1] == 262
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")  # NFC

    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(text) == ids

    config["added_tokens_decoder"] = {"300": added["260"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>' must have id 300, but .* give it 260"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(ValueError, match=r"tokenizer_class='GPT2Tokenizer' has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nq\n")
    with pytest.raises(ValueError, match=r"broken vocab.json or merges.txt"):
        load_tokenizer(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has neither tokenizer.json nor vocab.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_files(tmp_path, name):
    byte_tokenizer().save(tmp_path)
    file = tmp_path / name
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=f"{name} is not"):
        load_tokenizer(tmp_path)


def test_config_that_is_not_an_object(tmp_path):
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, not a list"):
        load_tokenizer(tmp_path)


def test_special_tokens_must_exist(tmp_path):
    with pytest.raises(ValueError, match="must name an eos_token"):
        load_tokenizer(_published(tmp_path))
    with pytest.raises(ValueError, match=r"eos_token='<eos>' is not in the vocabulary"):
        load_tokenizer(_published(tmp_path, eos_token="<eos>"))


# ---- Chat templates ---------------------------------------------------------------------------

_TEMPLATE = (
    "{% for m in messages %}{% set content = '<' + m['role'] + '>' + m['content'] | trim %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
_MESSAGES = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Ho"}]


def _with_template(directory, template):
    return load_tokenizer(
        _published(directory, bos_token="<s>", eos_token="</s>", chat_template=template)
    )


def test_chat_template(tmp_path):
    tokenizer = _with_template(tmp_path, _TEMPLATE)
    prompt = "<s><user>Hi</s><assistant>Ho</s>"
    assert tokenizer.apply_chat_template(_MESSAGES) == prompt + "<assistant>"
    assert tokenizer.apply_chat_template(_MESSAGES, add_generation_prompt=False) == prompt
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == _TEMPLATE


def test_chat_template_helpers(tmp_path):
    template = "  {% for m in messages %}\n{{ m | tojson }}\n{% break %}\n{% endfor %}\nend"
    tokenizer = _with_template(tmp_path, template)
    assert tokenizer.apply_chat_template([{"content": "é'<"}, {}]) == '{"content": "é\'<"}\nend'
    tokenizer = _with_template(tmp_path, "{{ strftime_now('%Y') | length }}")
    assert tokenizer.apply_chat_template([]) == "4"


def test_chat_template_sources(tmp_path):
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    assert _with_template(tmp_path, named).apply_chat_template([]) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert _with_template(tmp_path, named).apply_chat_template([]) == "J"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% if %}",
        "{{ messages.append(1) }}",  # the sandbox is immutable
        "{{ ''.__class__.__mro__ }}{{ messages[0].x.y }}",
    ],
)
def test_chat_template_errors(tmp_path, template):
    with pytest.raises(ValueError, match=r"the chat template cannot write these messages: .+"):
        _with_template(tmp_path, template).apply_chat_template([{}])


def test_no_chat_template():
    with pytest.raises(ValueError, match="this tokenizer has no chat template"):
        byte_tokenizer().apply_chat_template(_MESSAGES)
