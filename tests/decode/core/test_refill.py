"""Rows that are replaced while others go on give what they give alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm
from decode import complete, generate
from decode.core.refill import refill
from decode.core.requests import prompt_buckets, round_lengths, round_rows
from decode.core.texts import Asked
from decode.diffusion.components import (
    BlockCausal,
    DualCache,
    FixedBlocks,
    PrefixCache,
    Quota,
    Threshold,
)
from decode.diffusion.loop import DiffusionMethod
from decode.speculative import answers as drafted
from decode.speculative.components import ADED, SAM, Hybrid, InputGuided
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.drafters.token_recycling import TokenRecycling
from decode.speculative.loop import SpeculativeMethod
from dlm.compilation import Compiling
from dlm.sharding import make_mesh
from tests.lib.tiers import more

NUM, ROWS = 11, 4
BLOCKS = FixedBlocks(4)

METHODS = {
    "plain": DiffusionMethod(BLOCKS, rule=Threshold(0.5)),
    "dual": DiffusionMethod(BLOCKS, DualCache(), rule=Threshold(0.5)),
    "prefix": DiffusionMethod(BLOCKS, PrefixCache(), rule=Threshold(0.5)),
    "block causal": DiffusionMethod(
        FixedBlocks(4, aligned=True), BlockCausal(4), rule=Threshold(0.5)
    ),
    "guidance": DiffusionMethod(BLOCKS, DualCache(), rule=Quota(2), guidance=0.5),
    "sampled": DiffusionMethod(BLOCKS, rule=Threshold(0.5), temperature=0.9),
    "lookahead": DiffusionMethod(BLOCKS, rule=Quota(4), lookahead=2),
    "one by one": SpeculativeMethod(),
    "lookup": SpeculativeMethod(PromptLookup(num_drafts=3)),
    "recycling": SpeculativeMethod(TokenRecycling()),
    "copies": SpeculativeMethod(Hybrid(SAM(num_drafts=4), ADED(num_pairs=64, num_kept=6), 1)),
    "input": SpeculativeMethod(InputGuided(num_drafts=4)),
}


def requests(cfg, num=NUM):
    """Prompts of 1 to 9 tokens, completions of 3 to 12."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 20, rng.integers(1, 10)).tolist() for _ in range(num)]
    return prompts, rng.integers(3, 13, num).tolist(), list(range(40, 40 + num))


def loop_of(method):
    return drafted.LOOP if isinstance(method, SpeculativeMethod) else generate.LOOP


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    "name", ["dual", "lookup",
             *more("block causal", "guidance", "plain", "prefix", "sampled", "lookahead",
                   "one by one", "recycling", "copies", "input")]
)  # fmt: skip
def test_every_answer_is_the_one_its_prompt_gets_alone(toy_cfg, toy_params, name):
    lm = dlm.LanguageModel(toy_params, toy_cfg)
    method = METHODS[name]
    asked = Asked(lm, *requests(toy_cfg))
    together = asked.answers(loop_of(method), method, ROWS, progress=False)
    whole = asked.answers(loop_of(method), method, NUM, progress=False)  # one batch
    for a, b in zip(together, whole, strict=True):
        assert a.canvas.tolist() == b.canvas.tolist()
        assert a.step_map.tolist() == b.step_map.tolist()
        assert (a.num_forwards, a.finish_reason) == (b.num_forwards, b.finish_reason)
        np.testing.assert_allclose(a.log_prob, b.log_prob, atol=1e-5)


def test_rows_are_kept_busy_by_programs_compiled_once(toy_cfg, toy_params):
    """Three times as many requests take no new program, and fewer rounds than batches would."""
    lm = dlm.LanguageModel(toy_params, toy_cfg)
    method = METHODS["plain"]
    asked = Asked(lm, *requests(toy_cfg))
    first = [i for i, _ in asked.as_finished(generate.LOOP, method, ROWS)]
    assert sorted(first) == list(range(NUM))
    sizes = generate.LOOP.decode._cache_size()
    more_asked = Asked(lm, *requests(toy_cfg, 3 * NUM))
    answers = more_asked.answers(generate.LOOP, method, ROWS, progress=False)
    assert generate.LOOP.decode._cache_size() == sizes
    forwards = [answer.num_forwards for answer in answers]
    batches = sum(max(forwards[i : i + ROWS]) for i in range(0, len(forwards), ROWS))
    rounds = 0

    def run(state, max_done):
        nonlocal rounds
        before = int(state.num_steps)
        state = generate.LOOP.decode(lm.params, lm.cfg, method, state, 10**9, max_done)
        rounds += int(state.num_steps) - before
        return state

    prompts, lens, seeds = requests(toy_cfg, 3 * NUM)
    start = lambda some, rows: generate.LOOP.prepare(
        lm, method, [prompts[i] for i in some], gen_len=[lens[i] for i in some],
        seeds=[seeds[i] for i in some], prompt_len=32, canvas_len=16, batch_size=rows,
    )  # fmt: skip
    found = [i for some, _ in refill(len(prompts), ROWS, start, run, generate.LOOP.reported)
             for i in some]  # fmt: skip
    assert sorted(found) == list(range(3 * NUM))
    assert sum(forwards) / ROWS <= rounds < batches


def decode_some(lm, name, prompts, how=None, **options):
    if name == "generate":
        run = getattr(generate, how or name)
        return run(lm, prompts, block_len=4, rule=Threshold(0.5), **options)
    return getattr(complete, how or name)(
        lm, prompts, drafter=PromptLookup(num_drafts=3), **options
    )


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("name", ["complete", *more("generate")])
def test_what_was_warmed_up_compiles_nothing_more(toy_cfg, toy_params, name):
    """Neither more prompts nor other lengths of the same buckets, thresholds or seeds."""
    lm = dlm.LanguageModel(toy_params, toy_cfg)
    prompts, lens, _ = requests(toy_cfg, 3 * ROWS)
    options = {"gen_len": lens, "batch_size": ROWS, "num_return": 2}
    jax.clear_caches()
    with Compiling() as compiling:
        assert decode_some(lm, name, prompts, "warm_up", **options) > 0
    assert compiling.num > 2
    with Compiling() as compiling:
        whole = decode_some(lm, name, prompts, **options)
        parts = dict(decode_some(lm, name, prompts, "as_finished", **options))
        assert decode_some(lm, name, prompts, "warm_up", **options) < 0.5
    assert compiling.num == 0
    assert sorted(parts) == list(range(len(prompts)))
    for i, answer in enumerate(whole):
        for ours, theirs in zip(
            (answer, *answer.others), (parts[i], *parts[i].others), strict=True
        ):
            assert ours.canvas.tolist() == theirs.canvas.tolist()


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("name", ["generate", "complete"])
def test_lengths_of_one_bucket_share_a_program(toy_cfg, toy_params, name):
    lm = dlm.LanguageModel(toy_params, toy_cfg)
    blocks = {"block_len": None, "method": "klass"} if name == "generate" else {}
    decode = getattr(dict(generate=generate, complete=complete)[name], name)
    decode(lm, [1, 2, 3], gen_len=17, **blocks)
    with Compiling() as compiling:
        answers = [decode(lm, [1, 2, 3], gen_len=n, **blocks) for n in range(18, 22)]
    assert compiling.num == 0
    assert [len(answer.canvas) for answer in answers] == [18, 19, 20, 21]


@pytest.mark.exhaustive(every=4)
def test_an_iterator_decodes_as_it_is_asked_and_leaves_the_mesh_alone(toy_cfg, toy_params):
    mesh = make_mesh(data=2)
    lm = dlm.LanguageModel(jax.device_put(toy_params), toy_cfg, mesh=mesh)
    prompts, lens, _ = requests(toy_cfg)
    with pytest.raises(ValueError, match="gen_len=0 of prompt 0"):  # before it is asked
        decode_some(lm, "generate", prompts, "as_finished", gen_len=0)
    found = decode_some(lm, "generate", prompts, "as_finished", gen_len=lens, batch_size=2)
    alone = decode_some(dlm.LanguageModel(toy_params, toy_cfg), "generate", prompts, gen_len=lens)
    numbers = []
    for i, answer in found:
        assert jax.sharding.get_abstract_mesh().empty
        assert answer.canvas.tolist() == alone[i].canvas.tolist()
        numbers.append(i)
    assert sorted(numbers) == list(range(NUM)) != numbers


def test_what_is_not_per_row_is_refused(toy_cfg, toy_params):
    lm = dlm.LanguageModel(toy_params, toy_cfg)

    def start(some, rows):
        state = generate.LOOP.prepare(
            lm, METHODS["plain"], [[1]] * len(some), gen_len=4, batch_size=rows
        )
        return state.replace(cache=jnp.zeros(3))

    with pytest.raises(TypeError, match=r"state.cache of shape \(3,\) is not per row"):
        next(refill(5, 2, start, lambda state, n: state, generate.LOOP.reported))


def test_a_bad_request_is_refused_before_the_first_is_decoded(toy_cfg, toy_params):
    lm = dlm.LanguageModel(toy_params, toy_cfg)
    prompts = [[1, 2]] * 9 + [[toy_cfg.vocab_size]]
    asked = Asked(lm, prompts, [4] * 10, [0] * 10)
    with pytest.raises(ValueError, match="prompt 9 contains token"):
        next(asked.as_finished(generate.LOOP, METHODS["plain"], 2))
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        next(asked.as_finished(generate.LOOP, METHODS["plain"], 0))


def test_lengths_share_buckets(toy_cfg):
    cfg = toy_cfg
    shapes = {round_lengths(cfg, [[1] * 5], [n]) for n in range(17, 22)}
    assert shapes == {(32, 24)}
    limit = cfg.max_seq_len
    for P, G in ((1, 1), (limit - 3, 3), (limit // 2, limit // 2), (limit - 1, 1)):
        p, g = round_lengths(cfg, [[1] * P], [G])
        assert p >= P and G <= g <= max(1.25 * G, 8) and p + g <= limit


def test_prompts_of_like_lengths_are_decoded_together():
    lengths = [100, 3, 90, 5, 4, 80, 120, 2]
    prompts = [[1] * n for n in lengths]
    assert prompt_buckets(prompts, 8) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    buckets = prompt_buckets(prompts, 2)
    assert buckets == [[6, 0, 2, 5], [3, 4, 1, 7]]
    assert prompt_buckets(prompts[:3], 1) == [[0, 2], [1]]


def test_rows_fill_the_devices():
    assert [round_rows(n, None) for n in (1, 3, 32, 33, 10_000)] == [1, 4, 32, 32, 32]
    assert round_rows(100, 5) == 5
    with jax.set_mesh(make_mesh(data=3, fsdp=2)):
        assert [round_rows(3, None), round_rows(100, 5)] == [6, 6]
