"""Tokenizers: lossless, longest match, files, chat templates."""

import dataclasses
import datetime
import doctest
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

import dlm.tokenizer
from dlm import chat
from dlm.hf.tokenizer import has_tokenizer, load_tokenizer
from dlm.tokenizer import byte_tokenizer, frame, word_tokenizer

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
    assert tokenizer.decode(np.array([72, 105])) == "Hi"


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[72, 105]], TypeError, "ids must be the token ids of one text, integers"),
        (["72"], TypeError, "ids must be the token ids of one text, integers"),
        ([72.0], TypeError, "ids must be the token ids of one text, integers"),
        (72, TypeError, "ids must be the token ids of one text, integers"),
        ([-1], ValueError, "1 token ids cannot be decoded"),
        ([2**40], ValueError, "1 token ids cannot be decoded"),
    ],
)
def test_what_is_no_token_id(ids, error, message):
    with pytest.raises(error, match=message):
        byte_tokenizer().decode(ids)


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


def test_an_end_must_be_known(tmp_path):
    with pytest.raises(ValueError, match="must name an eos_token; config"):
        load_tokenizer(_published(tmp_path))
    for name, ends, eos in (
        ("config.json", 4, 4),
        ("config.json", [9, 1], 1),  # 9 is no token here
        ("generation_config.json", [1, 4], 1),
    ):
        path = _published(tmp_path / f"{name}-{eos}")
        (path / name).write_text(json.dumps({"eos_token_id": ends}))
        assert load_tokenizer(path).eos_token_id == eos
        assert load_tokenizer(path).pad_token_id == eos


# What declares "<|im_end|>", which tokenizer.json does not know: files, and whether it is special.
_IM_END = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False}
DECLARED = {
    "an end": ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, True),
    "an end with flags": (
        {"tokenizer_config.json": {"eos_token": {"__type": "AddedToken", **_IM_END}}},
        True,
    ),
    "added, special": (
        {"tokenizer_config.json": {"added_tokens_decoder": {"259": {**_IM_END, "special": True}}}},
        True,
    ),
    "added, as text": (
        {"tokenizer_config.json": {"added_tokens_decoder": {"259": {**_IM_END, "special": False}}}},
        False,
    ),
    "additional": ({"tokenizer_config.json": {"additional_special_tokens": ["<|im_end|>"]}}, True),
    "additional with flags": (
        {"tokenizer_config.json": {"additional_special_tokens": [_IM_END]}},
        True,
    ),
    "extra": ({"tokenizer_config.json": {"extra_special_tokens": ["<|im_end|>"]}}, True),
    "extra by name": (
        {"tokenizer_config.json": {"extra_special_tokens": {"im_token": "<|im_end|>"}}},
        True,
    ),
    "a name of its own": ({"tokenizer_config.json": {"image_token": "<|im_end|>"}}, True),
    "special_tokens_map.json": ({"special_tokens_map.json": {"pad_token": _IM_END}}, True),
    "map, additional": (
        {"special_tokens_map.json": {"additional_special_tokens": ["<|im_end|>"]}},
        True,
    ),
    "added_tokens.json": ({"added_tokens.json": {"<|im_end|>": 259}}, False),
    "added_tokens.json, special": (
        {"added_tokens.json": {"<|im_end|>": 259}, "tokenizer_config.json": {"cls_token": _IM_END}},
        True,
    ),
}


@pytest.mark.parametrize(("files", "is_special"), DECLARED.values(), ids=list(DECLARED))
def test_what_only_a_config_declares_is_a_token(tmp_path, files, is_special):
    byte_tokenizer().save(tmp_path)
    eos = {"eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(eos))
    for name, said in files.items():
        said = eos | said if name == "tokenizer_config.json" else said
        (tmp_path / name).write_text(json.dumps(said))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<|im_end|>b") == [97, 259, 98] and tokenizer.vocab_size == 260
    assert tokenizer.decode([97, 259, 98]) == ("ab" if is_special else "a<|im_end|>b")
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("a<|im_end|>b") == [97, 259, 98]


def test_older_files_are_read_only_without_newer_ones(tmp_path):
    path = _published(tmp_path, eos_token="<s>")
    (path / "special_tokens_map.json").write_text('{"eos_token": "</s>", "pad_token": null}')
    assert load_tokenizer(path).eos_token_id == 4
    _published(tmp_path, eos_token="<s>", added_tokens_decoder={})
    assert load_tokenizer(path).eos_token_id == 3


def test_tokens_that_the_vocabulary_has_keep_their_ids(tmp_path):
    tokenizer = load_tokenizer(_published(tmp_path, eos_token="</s>", sep_token="ab"))
    assert tokenizer.encode("aabb") == [0, 2, 1]  # a token of its own now
    assert tokenizer.decode([0, 2, 1]) == "ab" and tokenizer.vocab_size == 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": 3}, "eos_token has 3, which is not a token"),
        ({"eos_token": {"text": "</s>"}}, "eos_token has .*, which is not a token"),
        ({"eos_token": ""}, "eos_token has '', which is not a token"),
        ({"eos_token": {"content": "x", "lstrip": 1}}, "which is not a token"),
        ({"additional_special_tokens": "x"}, "additional_special_tokens='x' must be a list of"),
        ({"additional_special_tokens": [7]}, "additional_special_tokens has 7, which is not a to"),
        ({"added_tokens_decoder": ["x"]}, "added_tokens_decoder must map token ids to tokens"),
        ({"added_tokens_decoder": {"x": "y"}}, "added_tokens_decoder must map token ids to tok"),
        ({"added_tokens_decoder": {"99": "y"}}, "'y' must have id 99, but .* give it"),
        ({"add_bos_token": "yes"}, "add_bos_token='yes' must be true or false"),
        ({"clean_up_tokenization_spaces": 1}, "clean_up_tokenization_spaces=1 must be true or"),
        ({"split_special_tokens": True}, "split_special_tokens=True is not supported"),
        ({"chat_template": 3}, "chat_template must be text, or a list of"),
        ({"chat_template": [{"name": "x"}]}, "chat_template must be text, or a list of"),
    ],
)
def test_broken_configs(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(_published(tmp_path, **{"eos_token": "</s>"} | config))


# ---- What is put around a text ----------------------------------------------------------------


def test_a_whole_text_gets_what_the_tokenizer_adds(tmp_path):
    tokenizer = load_tokenizer(_published(tmp_path, bos_token="<s>", eos_token="</s>"))
    assert tokenizer.encode("ab") == [2]
    assert tokenizer.encode("ab", whole=True) == [3, 2] and tokenizer.encode("", whole=True) == [3]
    assert tokenizer.encode("<s>ab", whole=True) == [3, 2]  # it has one
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("ab", whole=True) == [3, 2]


def test_a_text_that_goes_on_has_nothing_behind_it():
    """Whatever the tokenizer puts around whole ones."""
    tokenizer = word_tokenizer(["a", "b"])
    end = tokenizer.backend.id_to_token(tokenizer.eos_token_id), tokenizer.eos_token_id
    assert tokenizer.encode_begin("ab") == [0, 1]
    mask = tokenizer.mask_token_id  # as good as another
    for begin in (None, (tokenizer.backend.id_to_token(mask), mask)):
        framed = dataclasses.replace(tokenizer, bos_token_id=begin and begin[1])
        framed.backend.post_processor = frame(begin, end)
        before = [] if begin is None else [mask]
        assert framed.encode("ab", whole=True) == [*before, 0, 1, end[1]]
        assert framed.encode_begin("ab") == [*before, 0, 1]
        assert framed.encode_begin("") == before
        assert framed.encode_begin(f"a{end[0]}") == [*before, 0, end[1]]  # it was written
        assert framed.encode_begin(chat.Rendered("ab")) == [0, 1]


def test_a_rendered_text_is_whole(tmp_path):
    tokenizer = _with_template(tmp_path, "{{ bos_token }}{{ messages[0].content }}")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}])
    assert tokenizer.encode(prompt, whole=True) == [3, 2]
    tokenizer = _with_template(tmp_path, "{{ messages[0].content }}")  # none at all
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}])
    assert tokenizer.encode(prompt + "a", whole=True) == [2, 0]
    assert tokenizer.encode(str(prompt), whole=True) == [3, 2]


def test_special_tokens_in_what_users_write_can_be_text():
    tokenizer = byte_tokenizer()
    text = "a<|endoftext|>"
    assert tokenizer.encode(text, plain=True) == list(text.encode())
    assert tokenizer.encode(text) == [97, 256]  # no trace is left
    for plain in (True, False):
        assert tokenizer.num_tokens([text, "a"], plain=plain) == [14 if plain else 2, 1]
    with pytest.raises(ValueError, match=r"is not covered by the vocabulary"):
        word_tokenizer(_PIECES).encode("1 <|endoftext|>", plain=True)


@pytest.mark.parametrize(("flag", "says"), [("bos", False), ("eos", True)])
def test_a_flag_that_tokenizer_json_does_not_follow_is_said(tmp_path, caplog, flag, says):
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    load_tokenizer(_published(tmp_path, **config, add_bos_token=True, add_eos_token=False))
    assert not caplog.messages
    load_tokenizer(_published(tmp_path, **config, **{f"add_{flag}_token": says}))
    assert f"add_{flag}_token={says} is not what tokenizer.json does" in caplog.text


@pytest.mark.parametrize(
    ("config", "ids", "said"),
    [
        ({}, [2], ""),
        ({"add_bos_token": False, "add_eos_token": False, "bos_token": "<s>"}, [2], ""),
        ({"add_bos_token": True, "bos_token": "<s>"}, [5, 2], ""),
        ({"add_eos_token": True}, [2, 4], ""),
        ({"add_prefix_space": True}, [3, 2], ""),
        ({"add_prefix_space": False}, [2], ""),
        ({"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>"}, [5, 2, 4], ""),
        ({"add_bos_token": True}, [2], "add_bos_token=True is not what can be done without bos_to"),
    ],
)
def test_flags_count_where_there_is_no_tokenizer_json(tmp_path, caplog, config, ids, said):
    """As transformers 5.24 encodes "ab" with these files, Qwen2's."""
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "Ġ": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"} | config
    ids_of = {"4": {"content": "<|endoftext|>"}, "5": {"content": "<s>"}}
    config |= {"added_tokens_decoder": ids_of if "bos_token" in config else {}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab", whole=True) == ids
    assert said in caplog.text if said else not caplog.text
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("ab", whole=True) == ids


def test_a_space_before_a_text_is_for_tokenizer_json_to_say(tmp_path, caplog):
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    for flag, is_said in ((False, False), (None, False), (True, True)):
        load_tokenizer(_published(tmp_path, **config, add_prefix_space=flag))
        assert ("add_prefix_space=True is not what tokenizer.json" in caplog.text) == is_said


_CLEANS = "clean_up_tokenization_spaces"
_CLEANS_BPE = f"{_CLEANS}_for_bpe_even_though_it_will_corrupt_output"


@pytest.mark.parametrize(
    ("model", "config", "cleans_up"),
    [
        (models.WordLevel, {_CLEANS: True}, True),
        (models.WordLevel, {_CLEANS: False}, False),
        (models.WordLevel, {}, False),
        (models.WordLevel, {_CLEANS_BPE: True}, False),
        (models.BPE, {_CLEANS: True}, False),
        (models.BPE, {_CLEANS_BPE: True}, False),
        (models.BPE, {_CLEANS: True, _CLEANS_BPE: True}, True),
    ],
)
def test_spaces_before_punctuation(tmp_path, model, config, cleans_up):
    """As transformers 5.24 decodes with these files, also when they are written again."""
    pieces = ["it", "'", "s", "here", ".", "do", "n't", "n", "t", "a", "?", "we", "'re", " ", ","]
    vocab = {piece: i for i, piece in enumerate([*pieces, "</s>"])}
    backend = tokenizers.Tokenizer(model(vocab, **({"merges": []} if model is models.BPE else {})))
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "</s>", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    load_tokenizer(tmp_path).save(tmp_path / "saved")
    for tokenizer in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "saved")):
        for words, whole, cleaned in [
            ("it ' s here .", "it ' s here .", "it's here."),
            ("do n't a ?", "do n't a ?", "don't a?"),
            ("do n ' t a ,", "do n ' t a ,", "don't a,"),
            ("we 're", "we 're", "we're"),
        ]:
            ids = [vocab[word] for word in words.split()]
            assert tokenizer.decode(ids) == (cleaned if cleans_up else whole)
        spaces = [vocab["a"], vocab[" "], vocab["."]]
        assert tokenizer.decode(spaces) == ("a  ." if cleans_up else "a   .")


def test_text_that_is_no_unicode():
    with pytest.raises(ValueError, match=r"cannot be encoded"):
        byte_tokenizer().encode("a\ud800")


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


def test_chat_template_sources(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    tokenizer = _with_template(tmp_path, named)
    assert tokenizer.apply_chat_template([]) == "D"
    assert tokenizer.apply_chat_template([], tools=[{}]) == "T"
    assert tokenizer.apply_chat_template([], template="tool_use") == "T"
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == tokenizer.chat_template
    with pytest.raises(
        ValueError, match=r"template='rag' must be one of .*: 'default', 'tool_use'"
    ):
        tokenizer.apply_chat_template([], template="rag")
    (tmp_path / "chat_template.jinja").write_text("J")
    tokenizer = _with_template(tmp_path, named)
    assert tokenizer.apply_chat_template([], tools=[{}]) == "J"  # files count alone
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert _with_template(tmp_path, named).apply_chat_template([], template="rag") == "R"
    only = _with_template(tmp_path / "one", [{"name": "rag", "template": "R"}])
    with pytest.raises(ValueError, match=r"template='default' must be one of .*: 'rag'"):
        only.apply_chat_template([])


def test_chat_template_variables(tmp_path):
    template = "{{ unk_token }}{{ image_token }}{{ enable_thinking }}{{ tools | length }}"
    path = _published(tmp_path, eos_token="</s>", unk_token="<s>", image_token="<|mdm_mask|>")
    (path / "chat_template.jinja").write_text(template)
    rendered = load_tokenizer(path).apply_chat_template([], tools=[{}, {}], enable_thinking=False)
    assert rendered == "<s><|mdm_mask|>False2"
    (path / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    now = datetime.datetime(1999, 1, 1)
    assert load_tokenizer(path).apply_chat_template([], now=now) == "1999"


def test_chat_template_errors(tmp_path):
    tokenizer = _with_template(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="the chat template cannot write these messages: roles"):
        tokenizer.apply_chat_template([{}])
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="a chat template is not UTF-8"):
        load_tokenizer(tmp_path)


def test_no_chat_template():
    with pytest.raises(ValueError, match="this tokenizer has no chat template"):
        byte_tokenizer().apply_chat_template(_MESSAGES)
