"""Language models as they are used: logits of the references, tokenizers that fit."""

import dataclasses
import doctest
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm
import dlm.lm
from decode.core.requests import encode
from decode.generate import generate
from dlm import vocab
from dlm.hf.weights import load_params
from dlm.models.decoder import forward
from dlm.params import param_shardings
from dlm.sharding import make_mesh
from dlm.tokenizer import word_tokenizer
from dlm.window import Window
from tests.lib.paths import GOLDEN, ROOT

NAMES = ("llada_small", "dream_small")
needs_mesh = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 (fake) devices")


def words(num_words=94):
    """Of which end-of-text and MASK come last: 94 words end in the ids of the small models."""
    return word_tokenizer([f"w{i} " for i in range(num_words)])


def reversed_specials(num_words=94):
    """A tokenizer with the ids of the small models: MASK 94, end-of-text 95."""
    tokenizer = words(num_words)
    return dataclasses.replace(
        tokenizer, mask_token_id=num_words, eos_token_id=num_words + 1, pad_token_id=num_words + 1
    )


def all_logits(lm, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def run(params, tokens):
        out = forward(params, lm.cfg, Window(tokens, positions))
        return vocab.logits(vocab.head(params), out.hidden)

    return run(lm.params, tokens)


def test_docstring_example(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert doctest.testmod(dlm.lm).failed == 0


def test_exports():
    assert dlm.load is dlm.lm.load
    assert dlm.save is dlm.lm.save
    assert dlm.LanguageModel is dlm.lm.LanguageModel
    assert isinstance(dlm.PRESETS["tiny"], dlm.ModelConfig)


def test_tokens_of_a_draft_model_are_those_of_the_target():
    lm = lambda tokenizer: dlm.LanguageModel({}, dlm.PRESETS["tiny"], tokenizer)
    abc, abd = lm(word_tokenizer("abc")), lm(word_tokenizer("abd"))
    dlm.check_same_tokens(abc, abc)
    dlm.check_same_tokens(abc, lm(None))
    with pytest.raises(
        ValueError, match=r"1 tokens of the draft .* 2, which is 'c' and 'd': draft"
    ):
        dlm.check_same_tokens(abc, abd)
    more = word_tokenizer("abc")
    more.backend.add_tokens(["padding"])  # of one of them alone
    dlm.check_same_tokens(lm(more), abc)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_the_reference(name):
    """Bidirectional; Dream's are the raw output, before its sampler shifts them."""
    golden = np.load(GOLDEN / name / "logits.npz")
    lm = dlm.load(GOLDEN / name)
    assert (lm.tokenizer, lm.mesh) == (None, None)
    got = all_logits(lm, jnp.asarray(golden["tokens"]))
    np.testing.assert_allclose(got, golden["logits"], rtol=0, atol=1e-4)


@needs_mesh
@pytest.mark.parametrize("name", NAMES)
def test_logits_on_a_mesh(name):
    golden = np.load(GOLDEN / name / "logits.npz")
    mesh = make_mesh(data=1, fsdp=2, tensor=2)
    lm = dlm.load(GOLDEN / name, mesh=mesh)
    assert lm.mesh is mesh
    shardings = param_shardings(lm.cfg, mesh)
    assert jax.tree.all(jax.tree.map(lambda p, s: p.sharding == s, lm.params, shardings))
    with jax.set_mesh(mesh):
        got = all_logits(lm, jnp.asarray(golden["tokens"][:2]))
    np.testing.assert_allclose(got, golden["logits"][:2], rtol=0, atol=1e-4)


def test_rules_decide_where_parameters_live():
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 (fake) devices")
    replicated = tuple((axis, None) for axis, _ in dlm.lm.RULES)
    lm = dlm.load(GOLDEN / "llada_small", mesh=make_mesh(tensor=4), rules=replicated)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(lm.params))


@pytest.mark.parametrize(
    "argument",
    [dict(mesh=5), dict(mesh="data"), dict(rules=5), dict(rules=("x",)), dict(apart="x")],
)
def test_arguments_of_another_kind(argument):
    (name,) = argument
    with pytest.raises(ValueError, match=f"^{name}=.* must be"):
        dlm.load(GOLDEN / "llada_small", **argument)


def test_dtype():
    golden = np.load(GOLDEN / "llada_small" / "logits.npz")
    lm = dlm.load(GOLDEN / "llada_small", dtype="bfloat16")
    assert lm.cfg.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)} == {"bfloat16"}
    got = np.asarray(all_logits(lm, jnp.asarray(golden["tokens"])))
    # Eight bits of mantissa: a few hundredths of the spread of the logits, most choices the same.
    assert np.abs(got - golden["logits"]).mean() < 0.05 * golden["logits"].std()
    assert (got.argmax(-1) == golden["logits"].argmax(-1)).mean() > 0.9


def test_float64_is_not_float32():
    with pytest.raises(ValueError, match=r"dtype='float64' needs .* JAX_ENABLE_X64=1"):
        dlm.load(GOLDEN / "llada_small", dtype="float64")
    with jax.enable_x64(True):
        lm = dlm.load(GOLDEN / "llada_small", dtype="float64")
        assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)} == {"float64"}


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_with_a_tokenizer(tmp_path, name):
    lm = dlm.load(GOLDEN / name)
    dlm.save(tmp_path / "saved", dataclasses.replace(lm, tokenizer=reversed_specials()))
    again = dlm.load(tmp_path / "saved")
    assert again.cfg == lm.cfg
    assert again.tokenizer.encode("w3 w14 ") == [3, 14]
    assert (again.tokenizer.mask_token_id, again.tokenizer.eos_token_id) == (94, 95)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(lm.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("mask", "mask_id"), [("w7 ", 7), ("<mask>", 94)])
def test_a_model_gets_a_mask(tmp_path, mask, mask_id):
    """A token that it has, or one for a row that none uses; files say the same, texts stay."""
    lm = dlm.load(GOLDEN / "llama_target", tokenizer=words(92))
    made = dlm.lm.with_mask(lm, mask)
    assert made.params is lm.params
    assert made.cfg == dataclasses.replace(lm.cfg, mask_token_id=mask_id)
    assert lm.tokenizer.mask_token_id == 93 and lm.tokenizer.vocab_size == 94
    dlm.save(tmp_path / "saved", made)
    again = dlm.load(tmp_path / "saved")
    assert again.cfg.mask_token_id == again.tokenizer.mask_token_id == mask_id
    assert again.cfg.shifted_logits
    for tokenizer in (made.tokenizer, again.tokenizer):
        assert tokenizer.encode(f"w3 {mask}w14 ") == [3, mask_id, 14]
        assert tokenizer.decode([3, mask_id, 14]) == "w3 w14 "
    in_place = dlm.lm.with_mask(lm, mask, shifted_logits=False, block_len=4)
    assert in_place.cfg.writes_in_place and not made.cfg.writes_in_place


def test_masks_that_cannot_be_are_refused():
    lm = dlm.load(GOLDEN / "llama_target", tokenizer=words(94))  # of 96 rows none is left
    with pytest.raises(ValueError, match=r"mask_token='<mask>' is no token .*\|mdm_mask\|"):
        dlm.lm.with_mask(lm, "<mask>")
    with pytest.raises(ValueError, match="pad_token_id=52 must differ from mask_token_id"):
        dlm.lm.with_mask(lm, "w52 ")
    with pytest.raises(ValueError, match="needs a model with a tokenizer"):
        dlm.lm.with_mask(dataclasses.replace(lm, tokenizer=None), "w7 ")


def _with_tokenizer(path, tokenizer, **changes):
    path.mkdir()
    config = json.loads((GOLDEN / "llada_small/config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "llada_small/model.safetensors", path)
    tokenizer.save(path)
    return path


def test_tokens_beyond_the_embedding_are_said_and_refused(tmp_path, caplog):
    """Such as the padding token of a fine-tune that did not widen its model."""
    tokenizer = dataclasses.replace(words(95), mask_token_id=94, pad_token_id=96)
    lm = dlm.load(_with_tokenizer(tmp_path / "model", tokenizer, eos_token_id=93))
    assert caplog.messages == [
        "The tokenizer has 1 tokens that are no rows of the embedding, vocab_size=96, such as "
        "'<|mdm_mask|>': prompts with them are refused."
    ]
    assert (lm.cfg.eos_ids, lm.cfg.pad_token_id) == ((95, 93), 95)
    assert encode(lm, "w3 <|mdm_mask|>") == [3, 96]
    with pytest.raises(ValueError, match=r"contains token 96, which must be in \[0, vocab_size=96"):
        generate(lm, "w3 <|mdm_mask|>", gen_len=4)


def test_another_mask_token_is_said(tmp_path, caplog):
    lm = dlm.load(_with_tokenizer(tmp_path / "model", words()))
    assert caplog.messages == [
        "The tokenizer's mask_token_id=95 is not the model's 94, which is taken."
    ]
    assert (lm.cfg.mask_token_id, lm.cfg.eos_ids) == (94, (95,))  # its end is the model's MASK


def test_another_end_is_an_end_too(tmp_path, caplog):
    tokenizer = dataclasses.replace(reversed_specials(), eos_token_id=3, pad_token_id=3)
    lm = dlm.load(_with_tokenizer(tmp_path / "model", tokenizer))
    assert lm.cfg.eos_ids == (3, 95) and not caplog.messages


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", None),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": 3}'),
    ],
)
def test_weights_load_without_a_tokenizer_that_can_be_read(tmp_path, caplog, file, text):
    path = _with_tokenizer(tmp_path / "model", reversed_specials())
    (path / file).unlink() if text is None else (path / file).write_text(text)
    lm = dlm.load(path)
    assert lm.tokenizer is None and lm.cfg == dlm.load(GOLDEN / "llada_small").cfg
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"Loading {path} without tokenizer, for token ids alone: ")
    with pytest.raises(ValueError, match="the checkpoint has no tokenizer"):
        generate(lm, "w3 ", gen_len=4)
    caplog.clear()
    assert dlm.load(path, tokenizer=None).tokenizer is None and not caplog.messages
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"mask_token_id": None}))
    with pytest.raises(ValueError, match=r"nor the tokenizer does, which cannot be read: .*tok"):
        dlm.load(path)


def test_a_tokenizer_of_ones_own(tmp_path):
    path = _with_tokenizer(tmp_path / "model", words())
    assert dlm.load(path, tokenizer=None).tokenizer is None
    mine = reversed_specials()
    assert dlm.load(path, tokenizer=mine).tokenizer is mine
    with pytest.raises(ValueError, match="tokenizer='x' must be a Tokenizer, 'own' or None"):
        dlm.load(path, tokenizer="x")


def test_missing_parts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a directory: download the model"):
        dlm.load(tmp_path / "nowhere")
    path = _with_tokenizer(tmp_path / "model", reversed_specials())
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        dlm.load(path)


def test_repr_is_short_and_models_are_not_compared_by_value():
    lm = dlm.load(GOLDEN / "llada_small")
    assert "params" not in repr(lm)
    assert lm == lm
    assert lm != dataclasses.replace(lm, params=load_params(GOLDEN / "llada_small", lm.cfg))
