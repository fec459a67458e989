"""Models whose layers are of other kinds than Llama's, or of several."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm import vocab
from dlm.cache import compact, init_cache
from dlm.config import ModelConfig, shortest_pattern
from dlm.models import decoder
from dlm.models.decoder import repeats
from dlm.params import abstract_params, param_shardings
from dlm.presets import PRESETS
from dlm.sharding import make_mesh
from dlm.window import BlockDiffusion, Slots, Window
from tests.lib.kinds import EXPERTS, KINDS, model
from tests.lib.tiers import more

forward = jax.jit(decoder.forward, static_argnames=("cfg", "feature_layers", "layers", "remat"))


def random_tokens(cfg, B=2, T=12):
    return jax.random.randint(jax.random.key(2), (B, T), 0, cfg.vocab_size)


def whole(cfg, params, tokens, **options):
    window = Window.at(tokens, jnp.zeros(len(tokens), jnp.int32), is_causal=True)
    return forward(params, cfg, window, **options)


@pytest.mark.parametrize("name", [*list(KINDS)[:2], *more(*list(KINDS)[2:])])
def test_causal_prefill_in_chunks_equals_one_forward(name):
    cfg, params = model(name)
    tokens = random_tokens(cfg)
    expected = whole(cfg, params, tokens).hidden
    cache, outputs, filled = init_cache(cfg, 2, 16), [], 0
    for length in (5, 1, 6):
        start = jnp.full(2, filled)
        window = Window.at(tokens[:, filled : filled + length], start, is_causal=True)
        out = forward(params, cfg, window, Slots.append(cache, start))
        outputs.append(out.hidden)
        cache, filled = out.cache, filled + length
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, atol=3e-5)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("name", ["gemma", *more("experts behind a dense layer")])
def test_left_padding_changes_nothing(name):
    cfg, params = model(name)
    tokens = random_tokens(cfg, B=1)
    alone = whole(cfg, params, tokens).hidden
    padded = jnp.concatenate([jnp.full((1, 5), 7), tokens], axis=1)
    window = Window.left_padded(padded, jnp.array([5]), is_causal=True)
    slots = Slots(init_cache(cfg, 1, 24), write_at=jnp.zeros(1, jnp.int32))
    first = forward(params, cfg, window, slots)
    np.testing.assert_allclose(first.hidden[:, 5:], alone, atol=2e-5)
    # And what goes on behind it, from the cache.
    more = jnp.array([[3]])
    longer = whole(cfg, params, jnp.concatenate([tokens, more], axis=1)).hidden
    slots = Slots(first.cache, jnp.array([[[5, 17]]]))
    last = forward(params, cfg, Window(more, jnp.array([[12]]), is_causal=True), slots)
    np.testing.assert_allclose(last.hidden[:, 0], longer[:, -1], atol=2e-5)


@pytest.mark.exhaustive(every=4)
def test_a_window_ends_where_it_says():
    """One layer: the token W before has no influence, the one behind it has."""
    W = 4
    cfg, params = model("gemma", n_layers=1, sliding_window=W)
    tokens = random_tokens(cfg, B=1)
    before = whole(cfg, params, tokens).hidden
    for distance in (W, W - 1):
        other = tokens.at[0, 11 - distance].add(1)
        after = whole(cfg, params, other).hidden
        assert (after[0, 11] == before[0, 11]).all() == (distance == W)
    both_ways = forward(params, cfg, Window.at(tokens, jnp.zeros(1, jnp.int32))).hidden
    other = forward(params, cfg, Window.at(tokens.at[0, 7].add(1), jnp.zeros(1, jnp.int32))).hidden
    changed = (both_ways != other).any(axis=-1)[0]
    assert changed.tolist() == [4 <= i <= 10 for i in range(12)]


@pytest.mark.exhaustive(every=4)
def test_slots_that_move_take_their_positions_along():
    """A path of a tree is compacted: what it left behind is not seen, what it kept is."""
    cfg, params = model("gemma")
    tokens, start = random_tokens(cfg, B=1, T=9), jnp.full(1, 6)
    first = Window.at(tokens[:, :6], jnp.zeros(1, jnp.int32), is_causal=True)
    cache = forward(
        params, cfg, first, Slots.append(init_cache(cfg, 1, 16), jnp.zeros(1, jnp.int32))
    ).cache
    # Nodes at depths 0, 1, 1, 2, of which the first, third and fourth are the text.
    nodes = jnp.stack([tokens[0, 6], 99 - tokens[0, 7], tokens[0, 7], tokens[0, 8]])[None]
    sees = jnp.array([[[0b0001], [0b0011], [0b0101], [0b1101]]], jnp.uint32)
    tree = Window(nodes, jnp.array([[6, 7, 7, 8]]), sees)
    out = forward(params, cfg, tree, Slots.append(cache, start))
    expected = whole(cfg, params, tokens).hidden
    np.testing.assert_allclose(out.hidden[:, [0, 2, 3]], expected[:, 6:], atol=3e-5)
    kept = jax.jit(compact)(out.cache, start, jnp.array([[0, 2, 3]]))
    assert kept.positions[0, 0, 0, :9, 0].tolist() == list(range(9))
    more = random_tokens(cfg, B=1, T=1)
    then = forward(
        params, cfg, Window.at(more, start + 3, is_causal=True), Slots.below(kept, start + 3)
    )
    longer = whole(cfg, params, jnp.concatenate([tokens, more], axis=1)).hidden
    np.testing.assert_allclose(then.hidden[:, 0], longer[:, -1], atol=3e-5)


def test_without_rotation_order_does_not_matter():
    """One causal layer: the last position sees a set. With rotation it sees a sequence."""
    for pattern, is_same in (("dense global none", True), ("dense global rotary", False)):
        cfg, params = model("growing queries", n_layers=1, pattern=(pattern,), query_growth=None)
        tokens = random_tokens(cfg, B=1)
        shuffled = jnp.concatenate([tokens[:, :11][:, ::-1], tokens[:, 11:]], axis=1)
        one, other = (whole(cfg, params, x).hidden[0, -1] for x in (tokens, shuffled))
        assert np.allclose(one, other, atol=1e-5) == is_same


@pytest.mark.parametrize("name", more("experts behind a dense layer", "gemma"))
def test_remat_changes_no_gradient(name):
    cfg, params = model(name)
    tokens = random_tokens(cfg)

    def loss(params, remat):
        hidden = whole(cfg, params, tokens, remat=remat).hidden
        return vocab.score(vocab.head(params), hidden, tokens).log_prob.mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    a, b = gradient(params, False), gradient(params, True)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), a, b)
    assert all((np.asarray(x) != 0).any() for x in jax.tree.leaves(a))


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    "name", ["experts behind a dense layer", *more("gemma", "every other has experts")]
)
def test_sharded_forward_equals_unsharded(name):
    cfg, params = model(name)
    tokens = random_tokens(cfg, B=4)

    def run(params, tokens):
        start = jnp.zeros(4, jnp.int32)
        cache = init_cache(cfg, 4, 16)
        first = Window.at(tokens[:, :8], start, is_causal=True)
        first = decoder.forward(params, cfg, first, Slots.append(cache, start))
        then = Window.at(tokens[:, 8:], start + 8, is_causal=True)
        then = decoder.forward(params, cfg, then, Slots.append(first.cache, start + 8))
        return vocab.logits(vocab.head(params), then.hidden)

    expected = jax.jit(run)(params, tokens)
    mesh = make_mesh(data=2, tensor=2, sequence=2)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(jax.device_put(params, param_shardings(cfg, mesh)), tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4)


# ---- Layers of several kinds ------------------------------------------------------------------


def test_runs_of_layers_become_few_scans():
    assert repeats("eeee") == [(0, 1, 4)]
    assert repeats("deeee") == [(0, 1, 1), (1, 1, 4)]
    assert repeats("dedede") == [(0, 2, 3)]
    assert repeats("ede") == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]
    assert repeats("eedeedee") == [(0, 3, 2), (6, 1, 2)]


def test_patterns_are_said_in_the_shortest_way():
    assert shortest_pattern("abab") == ("a", "b") and shortest_pattern("abc") == tuple("abc")
    assert shortest_pattern("aabaa") == ("a", "a", "b")
    cfg, _ = model("experts behind a dense layer")
    same = dataclasses.replace(cfg, pattern=cfg.pattern * 2, n_layers=8)
    assert same.pattern == cfg.pattern and same.stacks == {
        "dense": (0, 4),
        "experts": (1, 2, 3, 5, 6, 7),
    }


@pytest.mark.parametrize("layers", [(0, 2), (1, 2, 3), (3,)])
def test_some_layers_are_a_model_of_those_layers(layers):
    cfg, params = model("experts behind a dense layer")
    tokens = random_tokens(cfg)
    kinds = tuple(cfg.pattern[i] for i in layers)
    short = dataclasses.replace(cfg, n_layers=len(layers), pattern=kinds)
    dense = [0] if 0 in layers else []
    experts = [i - 1 for i in layers if i]
    take = lambda kind, rows: jax.tree.map(
        operator.itemgetter(jnp.array(rows)), params["layers"][kind]
    )
    taken = take("experts", experts)
    if dense:
        taken = {"dense": take("dense", dense), "experts": taken}
    expected = whole(short, params | {"layers": taken}, tokens).hidden
    got = whole(cfg, params, tokens, layers=layers).hidden
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.exhaustive
def test_features_are_the_residual_stream():
    cfg, params = model("every other has experts")
    tokens = random_tokens(cfg)
    found = whole(cfg, params, tokens, feature_layers=(1, 3, 4)).features
    for i, part in zip((1, 3), jnp.split(found, 3, axis=-1), strict=False):
        alone = whole(cfg, params, tokens, layers=tuple(range(i)), feature_layers=(4,)).features
        np.testing.assert_allclose(part, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["every other has experts", *more("gemma", "experts behind a dense layer")]
)
def test_weights_of_layers_are_not_copied(name):
    """Beside arguments and results a step of decoding needs less than 1.5 layers of weights."""
    experts = dataclasses.replace(EXPERTS, d_ff=512, num_experts=8)
    experts = experts if KINDS[name].get("experts") else None
    cfg = dataclasses.replace(
        PRESETS["tiny"], **KINDS[name] | dict(n_layers=8, d_model=128, d_ff=2048, experts=experts)
    )
    params = abstract_params(cfg)
    one = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params["layers"])) // 8
    window = Window(*(jax.ShapeDtypeStruct((1, 1), jnp.int32),) * 2)
    slots = Slots(jax.eval_shape(lambda: init_cache(cfg, 1, 8)), jnp.array([[[0, 4]]]))
    memory = forward.lower(params, cfg, window, slots).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * one


def test_settings_that_contradict_each_other_are_refused():
    tiny = PRESETS["tiny"]
    for changes, message in (
        (dict(pattern=("dense sliding rotary",)), "has sliding layers: sliding_window must be"),
        (dict(pattern=("experts global rotary",)), "has experts layers: experts must be given"),
        (dict(rotary_dim=18), r"rotary_dim=18 must be even and in \[2, head_dim=16\]"),
        (dict(norm="batch"), "norm='batch' must be one of"),
        (dict(attention_cap=0.0), "attention_cap=0.0 must be positive"),
        (dict(joint_qk_norm=True), "which is False"),
        (dict(sliding_window=0), "sliding_window=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(tiny, **changes)
    cfg, params = model("gemma")
    window = Window(*(jnp.zeros((1, 4), jnp.int32),) * 2, BlockDiffusion(jnp.zeros((1, 2), int), 2))
    with pytest.raises(ValueError, match="neither sliding windows nor scales"):
        forward(params, cfg, window)


@pytest.mark.parametrize("name", KINDS)
def test_configs_survive_json(name):
    cfg, _ = model(name)
    assert ModelConfig(**dataclasses.asdict(cfg)) == cfg
    assert cfg.plain().stacks == {"dense": tuple(range(cfg.n_layers))}
    assert cfg.plain().logit_cap is None and cfg.plain().vocab_size == cfg.vocab_size
