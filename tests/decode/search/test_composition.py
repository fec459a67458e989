"""Searches with everything else: streams, adapters, families, meshes, rows that are replaced."""

import dataclasses
import re

import jax
import numpy as np
import pytest

import dlm
from decode.causal_likelihood import causal_log_likelihood
from decode.complete import complete, stream_text
from decode.search.components import METHODS, Beam
from decode.search.loop import SearchMethod, begin, decode
from dlm.lm import LanguageModel
from dlm.lora import Lora
from dlm.params import param_shardings
from dlm.sharding import make_mesh
from dlm.tokenizer import byte_tokenizer
from dlm.trainable import Learned
from tests.lib.kinds import KINDS, model
from tests.lib.paths import SHARED
from tests.lib.search import point
from tests.lib.speculation import random_prompts
from tests.lib.untrained import char_lm

G = 8
CAUSAL = SHARED / "goldens" / "causal"
PUBLISHED = sorted(path.name for path in CAUSAL.glob("*") if path.is_dir())


@pytest.fixture(scope="module")
def toy(toy_cfg, toy_params):
    cfg = dataclasses.replace(toy_cfg, mask_token_id=None)
    return LanguageModel(toy_params, cfg, byte_tokenizer()), random_prompts(cfg, 8)


def texts(answers):
    """All completions of every prompt, and their scores."""
    every = [(answer, *answer.others) for answer in answers]
    return [[x.canvas.tolist() for x in one] for one in every], [x.score for y in every for x in y]


def run(lm, prompts, name, **options):
    method = point(name, lm.cfg) if lm.tokenizer is None else METHODS[name]
    options["num_return"] = method.strategy.num_results
    return texts(complete(lm, prompts, method=method, gen_len=G, **options))


def check_same(one, other):
    assert one[0] == other[0]
    np.testing.assert_allclose(one[1], other[1], atol=1e-4)


# ---- Streams ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    return char_lm()


@pytest.mark.parametrize("name", ["beam_4", "momentum"])
def test_what_may_change_is_marked(lm, name):
    """A strategy with one text streams it; of several the best so far stands ahead."""
    *pieces, last = stream_text(lm, "abcab", method=name, gen_len=G)
    whole = complete(lm, "abcab", method=name, gen_len=G)
    assert last.completion.text == whole.text == "".join(x.text for x in pieces) + last.text
    assert len(pieces) == G - 1
    if METHODS[name].strategy.commits:
        assert all(piece.text and not piece.ahead for piece in pieces)
    else:
        assert all(piece.ahead and not piece.text for piece in pieces)
        assert last.text == whole.text


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["momentum", "contrastive"])
def test_texts_that_are_certain_are_cut_before_stop_strings(lm, name):
    whole = complete(lm, "abcab", method=name, gen_len=40)
    stop = whole.text[3:5]
    cut = complete(lm, "abcab", method=name, gen_len=40, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    assert cut.num_forwards < whole.num_forwards


# ---- Models -------------------------------------------------------------------------------------


def check_read_again(lm, prompts, **options):
    """Scores of all that beams find are those of their texts: what moved, moved rightly."""
    beams = SearchMethod(Beam(num_beams=3, length_penalty=0.0))
    answers = complete(lm, prompts, method=beams, gen_len=G, num_return=3, **options)
    assert max(len(answer.others) for answer in answers) == 2
    each = zip(prompts, answers, strict=True)
    every = [(prompt, found) for prompt, best in each for found in (best, *best.others)]
    own = causal_log_likelihood(lm, [(prompt, found.canvas.tolist()) for prompt, found in every])
    scores = [found.score for _, found in every]
    np.testing.assert_allclose(scores, [one.log_prob for one in own], rtol=1e-4, atol=1e-3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_kind(kind):
    cfg, params = model(kind)
    cfg = dataclasses.replace(cfg, mask_token_id=None, block_len=None)
    params = params | {"unembed": 6 * params["unembed"]} if "unembed" in params else params
    check_read_again(LanguageModel(params, cfg), random_prompts(cfg, 4))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_families(name):
    """Checkpoints of the shared traces: layers, windows and positions as their files say."""
    lm = dlm.load(CAUSAL / name, tokenizer=None)
    check_read_again(lm, [prompt[:5] for prompt in random_prompts(lm.cfg, 2)])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["beam_4", "contrastive"])
def test_a_change_of_low_rank_may_stay_one_or_be_merged(toy, name):
    lm, prompts = toy
    lora = Lora(rank=3, alpha=6.0)
    rng = np.random.default_rng(0)
    delta = jax.tree.map(
        lambda spec: np.float32(0.2 * rng.normal(size=spec.shape)), lora.specs(lm.cfg)
    )
    attached = lora.attach(lm.cfg, Learned(lm.params), delta).target
    merged = jax.jit(lora.merge)(lm.params, delta)
    found = [run(dataclasses.replace(lm, params=x), prompts, name) for x in (attached, merged)]
    check_same(*found)
    assert found[0][0] != run(lm, prompts, name)[0]


# ---- Devices and rows ---------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "axes", [dict(data=8), dict(data=2, tensor=2, sequence=2)], ids=lambda axes: "-".join(axes)
)
def test_sharded_is_unsharded(toy, name, axes):
    lm, prompts = toy
    mesh = make_mesh(**axes)
    params = jax.device_put(lm.params, param_shardings(lm.cfg, mesh))
    split = dataclasses.replace(lm, params=params, mesh=mesh)
    check_same(run(split, prompts, name), run(lm, prompts, name))


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_no_device_asks_another_for_its_cache(toy):
    """Hypotheses of a prompt are on one device, and move there."""
    lm, prompts = toy
    method, mesh = METHODS["beam_4"], make_mesh(data=2)
    with jax.set_mesh(mesh):
        state = begin(lm.params, lm.cfg, method, prompts, gen_len=G)
        text = decode.lower(lm.params, lm.cfg, method, state).compile().as_text()
    *_, slots, width = state.cache.k.shape
    moved = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute)\(", text)
    assert state.cache.k.sharding.spec[1] == "data" and moved
    assert not [shape for shape in moved if f",{slots},{width}]" in shape]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", METHODS)
def test_rows_that_are_replaced_on_a_mesh(toy, name):
    lm, prompts = toy
    mesh = make_mesh(data=2)
    split = dataclasses.replace(lm, params=jax.device_put(lm.params), mesh=mesh)
    check_same(run(split, prompts, name, batch_size=4), run(lm, prompts, name))


# ---- Several answers ----------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_samples_come_in_the_order_of_their_seeds(lm):
    """The first is the one that is drawn alone; they are not sorted."""
    options = dict(gen_len=6, temperature=1.0, seed=5)
    answer = complete(lm, "abc", num_return=3, **options)
    assert len(answer.others) == 2 and answer.text == complete(lm, "abc", **options).text
    assert len({answer.text, *(x.text for x in answer.others)}) == 3
    fewer = complete(lm, "abc", num_return=2, **options)
    assert fewer.others[0].text == answer.others[0].text
