"""Blocks that a model drafts and judges itself, against plain Python and against its blocks of one.

Models whose outputs are shifted are judged as all others are; those that write where MASK stands by
"2L" rows.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from decode.complete import complete
from decode.constraints.token_ban import TokenBan
from decode.core.sampling import Sampling
from decode.diffusion import loop as diffusion
from decode.diffusion.components import BlockCausal, FixedBlocks
from decode.speculative.accept import BlockVerification, SpeculativeSampling
from decode.speculative.contracts import Drafter, ExtraRows, Proposal
from decode.speculative.drafters.draft_model import DraftModelTree
from decode.speculative.drafters.lookahead import Lookahead
from decode.speculative.drafters.self_speculation import SelfSpeculation
from decode.speculative.drafters.suffix import Suffix
from decode.speculative.in_place import ask, join
from decode.speculative.judge import judge_tree
from decode.speculative.loop import SpeculativeMethod, init_state, prefill, stream
from decode.speculative.state import context_of
from decode.speculative.tree import chain, from_paths
from dlm.lm import LanguageModel
from tests.lib.oracle import Model
from tests.lib.paths import GOLDEN
from tests.lib.speculation import check_statistics, run, texts
from tests.lib.tiers import more

C, B, P, G = 4, 16, 13, 12
PROMPTS = [np.random.default_rng(n).integers(0, 20, 1 + n % P).tolist() for n in range(B)]
KINDS = ("in_place", "shifted")


@pytest.fixture(scope="module")
def model_of(toy_cfg, toy_params, toy_dream):
    """Of a kind: a block-diffusion model whose texts end now and then."""
    cfgs = {
        "in_place": (dataclasses.replace(toy_cfg, block_len=C), toy_params),
        "shifted": (dataclasses.replace(toy_dream[0], block_len=C), toy_dream[1]),
    }
    return lambda kind: cfgs[kind]


def begin(cfg, params, method, prompts=PROMPTS, **options):
    state = init_state(
        cfg, method, prompts, gen_len=G, prompt_len=P, chunk=8, batch_size=B, **options
    )
    return prefill(params, cfg, method, state)


# ---- Judging where MASK stands ----------------------------------------------------------------


def test_golden_masks():
    """S2D2's rows, of which our root is the last one of the cache: it judges one token more."""
    for case in json.loads((GOLDEN / "s2d2_mask" / "s2d2_mask.json").read_text())["cases"]:
        L, cached = case["block"], case["cached"]
        tree = chain(L).tree(jnp.zeros((1, L + 1), jnp.int32))
        above = tree.ancestors(L)
        rows = ask(tree, above, 9)
        assert (rows.tokens == 9).all()
        np.testing.assert_array_equal(rows.offsets[0], np.arange(1, L + 2))
        nodes = np.pad(above[0], ((0, 0), (0, L + 1)))[1:]
        masks = np.asarray(rows.sees[0])[:-1]
        assert nodes[:, 0].all() and masks[:, 0].all()  # all see the root
        own = np.delete(np.concatenate([nodes, masks]), [0, 2 * L + 1], axis=1)
        found = [[*range(cached), *(cached + np.flatnonzero(row))] for row in own]
        assert found == case["visible"]


def test_other_rows_stand_behind_and_do_not_see_those_that_ask():
    tree = from_paths([[0], [1]]).tree(jnp.array([[5, 6, 7]]))
    asking = ask(tree, tree.ancestors(1), 9)
    own = ExtraRows(jnp.array([[3]]), jnp.array([[4]]), jnp.array([[[True, False, True, True]]]))
    both = join(asking, own)
    assert both.tokens.tolist() == [[9, 9, 9, 3]] and both.offsets.tolist() == [[1, 2, 2, 4]]
    expected = ["1001000", "1100100", "1010010", "1010001"]  # nodes, then rows
    assert ["".join("01"[int(x)] for x in row) for row in both.sees[0]] == expected
    assert join(asking, None) is asking


@struct.dataclass
class Watcher(Drafter):
    """Drafts nothing right, has a row of its own behind the root, and remembers what it gave."""

    shape = chain(1)
    num_extra = 1

    def init(self, cfg, batch_size, num_slots):
        return jnp.zeros((batch_size, 1, cfg.d_model))

    def propose(self, cfg, context, state):
        tokens = jnp.stack([context.root, jnp.zeros_like(context.root)], axis=1)
        every = jnp.ones((len(tokens), 1), jnp.int32)
        sees = jnp.broadcast_to(jnp.array([True, False, True]), (len(tokens), 1, 3))
        extra = ExtraRows(3 * every, every, sees)
        return Proposal(self.shape.tree(tokens), jnp.zeros(len(tokens), jnp.int32), state, extra)

    def observe(self, cfg, context, seen, state):
        return seen.extra_hidden


def test_a_drafter_sees_its_own_rows(model_of):
    cfg, params = model_of("in_place")
    method, model = SpeculativeMethod(Watcher()), Model(params, cfg)
    state = next(stream(params, cfg, method, begin(cfg, params, method)))
    for b, prompt in enumerate(PROMPTS):
        text = [*prompt, 3]
        hidden, _ = model.run(text, range(len(text)), allowed=np.tri(len(text), dtype=bool))
        np.testing.assert_allclose(state.drafter[b, 0], hidden[-1], atol=2e-5)


@functools.partial(jax.jit, static_argnames="cfg")
def laws(params, cfg, method, state, tokens):
    """What is said behind each node of a chain, and the nodes' hidden states."""
    proposal = Proposal(method.drafter.shape.tree(tokens), jnp.zeros(B, jnp.int32), ())
    output, verdict, *_ = judge_tree(params, cfg, method, state, proposal)
    return verdict.probs, output.hidden


def test_laws_are_those_of_blocks_of_one(model_of):
    """Card: position by position, for any fill; and the nodes are read as a causal model does."""
    cfg, params = model_of("in_place")
    method = SpeculativeMethod(SelfSpeculation(C), SpeculativeSampling(), Sampling(temperature=1.0))
    state, model = begin(cfg, params, method), Model(params, cfg)
    drafts = np.random.default_rng(0).integers(0, 20, (B, C + 1))
    drafts[:, 0] = [prompt[-1] for prompt in PROMPTS]
    probs, hidden = jax.device_get(laws(params, cfg, method, state, jnp.asarray(drafts)))
    for b, prompt in enumerate(PROMPTS):
        text = [*prompt, *drafts[b, 1:]]
        causal, _ = model.run(text, range(len(text)), allowed=np.tri(len(text), dtype=bool))
        np.testing.assert_allclose(hidden[b, : C + 1], causal[len(prompt) - 1 :], atol=2e-5)
        for v in range(C + 1):
            np.testing.assert_allclose(
                probs[b, v], law_behind(model, text[: len(prompt) + v]), atol=1e-5
            )


def law_behind(model, text):
    """The law of the token behind a text, as MASK says it there: [V] float64."""
    n = len(text) + 1
    canvas = [*text, model.cfg.mask_token_id]
    hidden, _ = model.run(canvas, range(n), allowed=np.tri(n, dtype=bool))
    z = model.logits(hidden[-1])
    z[model.cfg.mask_token_id] = -np.inf
    p = np.exp(z - z.max())
    return p / p.sum()


# ---- Drafts -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="cfg")
def propose(params, cfg, method, state):
    return method.drafter.propose(cfg, context_of(params, method, state), ())


@pytest.mark.parametrize(
    ("kind", "aligned"),
    [("in_place", True), ("shifted", False), *more(("in_place", False), ("shifted", True))],
)
def test_drafts_are_those_of_one_forward_over_the_block(model_of, kind, aligned):
    """Before the block all is read causally; inside it everybody sees everybody."""
    cfg, params = model_of(kind)
    method = SpeculativeMethod(SelfSpeculation(C, aligned))
    proposal = propose(params, cfg, method, begin(cfg, params, method))
    model, shift = Model(params, cfg), int(cfg.shifted_logits)
    assert proposal.cost.tolist() == [1] * B
    for b, prompt in enumerate(PROMPTS):
        n = len(prompt)
        start = n - n % C if aligned else n - 1
        stop = start + C
        canvas = [*prompt, *[cfg.mask_token_id] * (stop - n)]
        place = np.arange(stop)
        allowed = (place[:, None] >= place[None]) | (place >= start)[:, None]
        hidden, _ = model.run(canvas, place, allowed=allowed)
        z = model.logits(hidden[np.arange(n, stop) - shift])
        z[:, cfg.mask_token_id] = -np.inf
        is_valid = np.asarray(proposal.tree.is_valid[b])
        assert is_valid.tolist() == [v <= stop - n for v in range(len(is_valid))]
        drafts = np.asarray(proposal.tree.tokens[b])[is_valid]
        assert drafts.tolist() == [prompt[-1], *z.argmax(axis=1)]


# ---- The text ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks_of_one(model_of):
    """Of a kind: the texts of the diffusion loop in blocks of one, up to their ends."""

    @functools.cache
    def decoded(kind):
        cfg, params = model_of(kind)
        method = diffusion.DiffusionMethod(
            FixedBlocks(1, aligned=True), BlockCausal(1),
            constraint=TokenBan(ban_mask=cfg.writes_in_place),
        )  # fmt: skip
        cfg = dataclasses.replace(cfg, block_len=1)
        state = diffusion.init_state(cfg, method, PROMPTS, gen_len=G)
        state = jax.device_get(diffusion.decode(params, cfg, method, state))
        rows = [row[state.prompt_len :].tolist() for row in state.tokens]
        return [row[: (*row, cfg.eos_token_id).index(cfg.eos_token_id) + 1] for row in rows]

    return decoded


DRAFTERS = {
    "aligned": lambda cfg, params: SelfSpeculation(C),
    "from_the_root": lambda cfg, params: SelfSpeculation(3, aligned=False),
    "lookahead": lambda cfg, params: Lookahead(ngram=4, window=3, num_candidates=2),
    "suffix": lambda cfg, params: Suffix.example(cfg, params),
    "tree": lambda cfg, params: DraftModelTree(
        params, dataclasses.replace(cfg, block_len=None), from_paths([[0], [1], [0, 0]]),
        layers=(0,),
    ),
}  # fmt: skip


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("in_place", "aligned"),
        *more(
            ("shifted", "aligned"),
            ("in_place", "lookahead"),
            *(("in_place", name) for name in ("from_the_root", "suffix", "tree")),
            ("shifted", "from_the_root"),
        ),
    ],
)
def test_the_text_is_that_of_blocks_of_one(model_of, blocks_of_one, kind, name):
    """Token for token; whoever drafts, with rows of its own or without."""
    cfg, params = model_of(kind)
    drafter = DRAFTERS[name](cfg, params)
    state = run(
        params, cfg, SpeculativeMethod(drafter), PROMPTS, gen_len=G, prompt_len=P, batch_size=B
    )
    assert texts(state, B) == blocks_of_one(kind)
    check_statistics(state, drafter.depth)
    if isinstance(drafter, SelfSpeculation):
        assert (state.draft_forwards == state.num_forwards).all()
        assert int(state.acceptance_histogram[:, 1:].sum()) > 0


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("rule", [SpeculativeSampling(), *more(BlockVerification())])
def test_drawn_drafts_follow_the_law_of_blocks_of_one(model_of, rule):
    """CHI2 of the first two tokens of many rows."""
    cfg, params = model_of("in_place")
    cfg = dataclasses.replace(cfg, eos_token_id=None)
    num, prompt = 4096, PROMPTS[5]
    method = SpeculativeMethod(SelfSpeculation(C, is_sampled=True), rule, Sampling(temperature=1.0))
    state = run(params, cfg, method, [prompt] * num, gen_len=2, seeds=range(num))
    first, second = np.array(texts(state, num)).T
    counts = np.bincount(first * cfg.vocab_size + second, minlength=cfg.vocab_size**2)
    model = Model(params, cfg)
    one = law_behind(model, prompt)
    both = one[:, None] * [law_behind(model, [*prompt, t]) for t in range(cfg.vocab_size)]
    expected = both.reshape(-1) * num
    there = expected > 5
    rest = counts[~there].sum(), expected[~there].sum()
    seen, wanted = np.append(counts[there], rest[0]), np.append(expected[there], rest[1])
    chi_square = ((seen - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
    assert chi_square < there.sum() + 4 * np.sqrt(2 * there.sum())
    assert int(state.acceptance_histogram[:, 1:].sum()) > 0.1 * num


# ---- From outside -----------------------------------------------------------------------------


def test_published_block_diffusion_models_complete(model_of, toy_cfg, toy_params):
    """What was taught blocks can write from left to right; what was not cannot."""
    cfg, params = model_of("in_place")
    lm = LanguageModel(params, dataclasses.replace(cfg, never_causal=True))
    plain, drafted = (
        complete(lm, PROMPTS[:2], gen_len=8, drafter=drafter)
        for drafter in (None, SelfSpeculation(C))
    )
    assert [c.tokens.tolist() for c in plain] == [c.tokens.tolist() for c in drafted]
    lm = dataclasses.replace(lm, cfg=dataclasses.replace(toy_cfg, never_causal=True))
    with pytest.raises(ValueError, match="never learned to write from left to right"):
        complete(lm, PROMPTS[:2], drafter=SelfSpeculation(C))


def test_what_cannot_be_is_refused(model_of):
    cfg, _ = model_of("in_place")
    without = dataclasses.replace(cfg, mask_token_id=None)
    with pytest.raises(ValueError, match="mask_token_id=None must be a token id: with block_len=4"):
        SpeculativeMethod().validate(without)
    with pytest.raises(ValueError, match="mask_id=-1 is the model's MASK, and it has none"):
        SelfSpeculation(C).validate(without)
    SelfSpeculation(C, mask_id=3).validate(without)
    with pytest.raises(ValueError, match="mask_id=24 must be in"):
        SelfSpeculation(C, mask_id=24).validate(without)
