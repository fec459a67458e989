"""Language models as they are used: logits of the references, tokenizers that fit."""

import dataclasses
import doctest
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm
import dlm.lm
from dlm import vocab
from dlm.hf.weights import load_params
from dlm.models.decoder import forward
from dlm.params import param_shardings
from dlm.sharding import make_mesh
from dlm.tokenizer import byte_tokenizer, word_tokenizer
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


def test_dtype():
    golden = np.load(GOLDEN / "llada_small" / "logits.npz")
    lm = dlm.load(GOLDEN / "llada_small", dtype="bfloat16")
    assert lm.cfg.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)} == {"bfloat16"}
    got = np.asarray(all_logits(lm, jnp.asarray(golden["tokens"])))
    # Eight bits of mantissa: a few hundredths of the spread of the logits, most choices the same.
    assert np.abs(got - golden["logits"]).mean() < 0.05 * golden["logits"].std()
    assert (got.argmax(-1) == golden["logits"].argmax(-1)).mean() > 0.9


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


def _with_tokenizer(path, tokenizer):
    path.mkdir()
    shutil.copy(GOLDEN / "llada_small/config.json", path)
    tokenizer.save(path)
    return path  # without weights: the tokenizer is looked at first


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (byte_tokenizer(), "its vocab_size=259 must be at most the model's 96"),
        (words(), "its mask_token_id=95 must be the model's 94"),
        (
            dataclasses.replace(reversed_specials(), eos_token_id=3),
            "its eos_token_id=3 must be the model's 95",
        ),
    ],
)
def test_wrong_tokenizer(tmp_path, tokenizer, message):
    with pytest.raises(ValueError, match=f"wrong tokenizer: {message}"):
        dlm.load(_with_tokenizer(tmp_path / "model", tokenizer))
    lm = dlm.load(GOLDEN / "llada_small")
    with pytest.raises(ValueError, match=f"wrong tokenizer: {message}"):
        dataclasses.replace(lm, tokenizer=tokenizer)


def test_a_tokenizer_that_cannot_be_read_is_an_error(tmp_path):
    path = _with_tokenizer(tmp_path / "model", reversed_specials())
    (path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither tokenizer.json nor vocab.json"):
        dlm.load(path)


def test_missing_parts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a directory: download the model"):
        dlm.load(tmp_path / "nowhere")
    path = _with_tokenizer(tmp_path / "model", reversed_specials())
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        dlm.load(path)


def test_repr_is_short_and_models_are_not_compared_by_value():
    lm = dlm.load(GOLDEN / "llada_small")
    assert "params" not in repr(lm)
    assert lm == lm
    assert lm != dataclasses.replace(lm, params=load_params(GOLDEN / "llada_small", lm.cfg))
