"""Diffusion families with experts against the published code."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import dlm
from dlm import vocab
from dlm.blocks.moe import route
from dlm.hf.files import read_config
from dlm.models import decoder
from dlm.params import cast_params, stacks
from dlm.window import Window
from kernels_pallas.window_attention import pack_mask
from tests.lib.paths import SHARED

GOLDENS = SHARED / "goldens"
pytestmark = pytest.mark.skipif(not GOLDENS.exists(), reason="the golden data are not there")

MODELS = (
    *("llada_moe/a", "llada_moe/b_dense_layer_bias_partial"),
    *("llada2/v20_a", "llada2/v20_b_noshared_group1", "llada2/v21_a"),
    "sdar/moe_a",
)
IDS = {"mask_token_id": 93, "eos_token_id": 90}  # where config.json leaves them to the tokenizer


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """Its folder and its model."""
    folder = GOLDENS / request.param
    whole = tmp_path_factory.mktemp("model")
    for file in folder.iterdir():
        (whole / file.name).symlink_to(file)
    (whole / "config.json").unlink()
    raw = IDS | json.loads((folder / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(raw))
    return folder, dlm.load(whole)


@jax.jit
def _logits(head, hidden):
    return vocab.logits(head, hidden)


_forward = jax.jit(decoder.forward, static_argnames=("cfg",))


def logits_of(lm, tokens, mask=None):
    """Of whole texts [B, T], seen as `mask` [T, T] says, or both ways."""
    tokens = jnp.asarray(np.asarray(tokens, np.int32))
    if mask is not None:
        mask = pack_mask(jnp.broadcast_to(mask, (*tokens.shape, tokens.shape[1])))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = _forward(lm.params, lm.cfg, Window(tokens, positions, mask)).hidden
    return np.asarray(_logits(vocab.head(lm.params), hidden))


def block_causal(length, block_len):
    block = jnp.arange(length) // block_len
    return block[:, None] >= block[None]


def test_logits_are_the_published_ones(case):
    folder, lm = case
    if folder.parent.name == "sdar":
        golden = np.load(folder / "greedy_b4_thr05.npz")
        shown = golden["call_tokens"][~golden["call_is_store"]]
        starts = golden["call_start"][~golden["call_is_store"]]
        texts = np.tile(golden["canvas"], (len(shown), 1))
        for text, block, start in zip(texts, shown, starts, strict=True):
            text[start : start + 4] = block  # what stands behind it is not seen
        got = logits_of(lm, texts, block_causal(texts.shape[1], 4))
        for row, start, expected in zip(got, starts, golden["logits"], strict=True):
            np.testing.assert_allclose(row[start : start + 4], expected, atol=1e-4)
        return
    golden = np.load(folder / "forward.npz")
    for name, mask in (
        ("logits", None),
        ("logits_full", None),
        ("logits_block8", block_causal(golden["tokens"].shape[1], 8)),
    ):
        if name in golden:
            got = logits_of(lm, golden["tokens"], mask)
            np.testing.assert_allclose(got, golden[name], atol=1e-4, err_msg=name)


def test_the_router_chooses_and_weighs_as_published(case):
    folder, lm = case
    if folder.parent.name != "llada2":
        pytest.skip("no record of its router")
    golden = np.load(folder / "forward.npz")
    of_first = jax.tree.map(lambda x: x[0], stacks(lm.params, lm.cfg)["experts"]["moe"])
    chosen, weights = route(jnp.asarray(golden["router_hidden"]), of_first, lm.cfg.experts)
    order = np.argsort(chosen, axis=1)
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(chosen), order, 1), golden["router_index"]
    )
    weights = np.take_along_axis(np.asarray(weights), order, 1)
    np.testing.assert_allclose(weights, golden["router_weight"], rtol=1e-5)


def test_what_is_saved_is_what_was_published(case, tmp_path):
    folder, lm = case
    dlm.save(tmp_path / "saved", lm)
    published, saved = (
        safetensors.numpy.load_file(path / "model.safetensors")
        for path in (folder, tmp_path / "saved")
    )
    assert published.keys() == saved.keys()
    for name, tensor in published.items():
        np.testing.assert_array_equal(tensor, saved[name], err_msg=name)
    assert read_config(tmp_path / "saved") == lm.cfg


def test_the_bias_of_a_router_stays_float32(case, tmp_path):
    """It decides between scores that are almost equal."""
    _, lm = case
    if lm.cfg.experts.bias == "none":
        pytest.skip("it has none")
    half = dataclasses.replace(lm.cfg, dtype="bfloat16")
    moe = stacks(lm.params, lm.cfg)["experts"]["moe"]
    cast = cast_params(lm.params, half)
    dlm.save(tmp_path / "half", dataclasses.replace(lm, params=cast, cfg=half))
    again = stacks(dlm.load(tmp_path / "half").params, half)["experts"]["moe"]
    assert again["gate"].dtype == jnp.bfloat16 and again["bias"].dtype == jnp.float32
    np.testing.assert_array_equal(again["bias"], moe["bias"])
