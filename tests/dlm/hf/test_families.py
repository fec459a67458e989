"""Every family against the published code: logits, greedy text, both layouts of config.json."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import dlm
from decode.complete import complete
from dlm import vocab
from dlm.hf.files import read_config
from dlm.models import decoder
from dlm.window import Window
from tests.lib.paths import SHARED

CAUSAL = SHARED / "goldens" / "causal"
pytestmark = pytest.mark.skipif(not CAUSAL.exists(), reason="the golden data are not there")

CASES = sorted(path.name for path in CAUSAL.iterdir()) if CAUSAL.exists() else []
# Of a kind each; the others in turn.
DECODED = ("gemma2_a", "gpt2_a", "mistral_w8", "phi3_longrope", "qwen3_moe_step2", "smollm3_list")


@jax.jit
def _logits(head, hidden):
    return vocab.logits(head, hidden)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Its folder, its model and its tensors."""
    folder = CAUSAL / request.param
    return folder, dlm.load(folder), np.load(folder / "io.npz")


def test_logits_are_the_published_ones(case):
    _, lm, golden = case
    forward = jax.jit(decoder.forward, static_argnames=("cfg",))
    for i in (0, 1):
        if f"tokens_{i}" not in golden:
            continue
        tokens = jnp.asarray(golden[f"tokens_{i}"].astype(np.int32))
        window = Window.at(tokens, jnp.zeros(len(tokens), jnp.int32), is_causal=True)
        got = _logits(vocab.head(lm.params), forward(lm.params, lm.cfg, window).hidden)
        np.testing.assert_allclose(got, golden[f"logits_{i}"], atol=1e-4)


def test_either_layout_of_the_configuration_is_read(case, tmp_path):
    folder, lm, _ = case
    shutil.copy(folder / "config_v5.json", tmp_path / "config.json")
    assert read_config(tmp_path) == lm.cfg


def test_what_is_saved_is_what_was_published(case, tmp_path):
    folder, lm, _ = case
    dlm.save(tmp_path / "saved", lm)
    published, saved = (
        safetensors.numpy.load_file(path / "model.safetensors")
        for path in (folder, tmp_path / "saved")
    )
    assert published.keys() == saved.keys()
    for name, tensor in published.items():
        assert tensor.dtype == saved[name].dtype
        np.testing.assert_array_equal(tensor, saved[name], err_msg=name)
    raw = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert raw["model_type"] == json.loads((folder / "config.json").read_text())["model_type"]
    assert read_config(tmp_path / "saved") == lm.cfg


@pytest.mark.parametrize(
    "name",
    [
        name if name in DECODED else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in CASES
    ],
)
def test_greedy_text_is_the_published_one(name):
    lm, golden = dlm.load(CAUSAL / name), np.load(CAUSAL / name / "io.npz")
    prompts = [list(map(int, prompt)) for prompt in golden["prompt"]]
    texts = complete(lm, prompts, gen_len=golden["greedy"].shape[1])
    for text, expected in zip(texts, golden["greedy"].tolist(), strict=True):
        end = expected.index(lm.cfg.eos_token_id) if lm.cfg.eos_token_id in expected else None
        assert list(text.tokens) == expected[:end]
