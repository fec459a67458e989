import dataclasses

import jax
import numpy as np
import pytest

import dlm
from decode.core.requests import round_rows
from decode.core.results import Completion
from decode.diffusion.components import (
    BlockCausal,
    DualCache,
    FixedBlocks,
    Quota,
    SubBlocks,
    Threshold,
)
from decode.diffusion.loop import DiffusionMethod, decode, init_state
from decode.generate import choose, generate
from decode.view import Answer, write_commit_order
from dlm.presets import PRESETS
from dlm.sharding import make_mesh
from dlm.tokenizer import byte_tokenizer
from tests.lib.paths import GOLDEN
from tests.lib.tiers import more
from tests.lib.weights import init_params


@pytest.fixture(scope="module")
def lm():
    return dlm.load(GOLDEN / "llada_small")


@pytest.fixture(scope="module")
def text_lm():
    tokenizer = byte_tokenizer()
    cfg = dataclasses.replace(
        PRESETS["tiny"],
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return dlm.LanguageModel(init_params(jax.random.key(0), cfg), cfg, tokenizer)


PROMPT = [40, 50, 31, 23, 26, 26, 29, 11, 51]  # copy 31 23 26 26 29 11


def test_one_prompt_gives_one_completion_and_a_list_a_list(lm):
    one = generate(lm, PROMPT, gen_len=32, block_len=8)
    assert isinstance(one, Completion)
    several = generate(lm, [PROMPT, PROMPT[:5]], gen_len=32, block_len=8)
    assert [type(c) for c in several] == [Completion] * 2
    np.testing.assert_array_equal(several[0].tokens, one.tokens)
    assert several[0].num_forwards == one.num_forwards


def test_the_statistics_add_up(lm):
    c = generate(lm, PROMPT, gen_len=32, block_len=8, cache="dual")
    assert c.text is None  # the golden checkpoint has no tokenizer
    assert c.finish_reason == "eos" and lm.cfg.eos_token_id not in c.tokens
    assert c.canvas[len(c.tokens)] == lm.cfg.eos_token_id
    assert c.tokens_per_forward == len(c.tokens) / c.num_forwards
    decided = c.step_map >= 0
    assert decided[: len(c.tokens) + 1].all() and not decided.all()  # stopped at end-of-text
    assert c.step_map.max() == c.num_forwards - 1
    assert (c.log_prob[decided] <= 0).all() and (c.confidence[decided] <= 1).all()
    np.testing.assert_allclose(c.confidence[decided], np.exp(c.log_prob[decided]), rtol=1e-5)


def test_the_most_probable_tokens_are_reported(lm):
    """With them nothing else changes; the first of them is what the arg-max commits."""
    c = generate(lm, PROMPT, gen_len=32, block_len=8, cache="dual", top_logprobs=4)
    bare = generate(lm, PROMPT, gen_len=32, block_len=8, cache="dual")
    assert bare.top is None and c.canvas.tolist() == bare.canvas.tolist()
    decided = c.step_map >= 0
    assert c.top.tokens.shape == c.top.log_probs.shape == (32, 4)
    assert (c.top.tokens[decided][:, 0] == c.canvas[decided]).all()
    np.testing.assert_array_equal(c.top.log_probs[decided][:, 0], c.log_prob[decided])
    assert (np.diff(c.top.log_probs, axis=1) <= 0).all() and (c.top.tokens[~decided] == -1).all()
    stored = generate(lm, PROMPT, gen_len=32, block_len=8, cache="dual", top_logprobs=4, min_p=0.0)
    assert stored.top.tokens.tolist() == c.top.tokens.tolist()


def test_a_full_canvas_ends_for_length(lm):
    c = generate(lm, PROMPT, gen_len=3, block_len=3)
    assert c.finish_reason == "length" and len(c.tokens) == 3


def test_gen_len_need_not_be_a_multiple_of_the_block(lm):
    full = generate(lm, PROMPT, gen_len=10, block_len=10, stopper="filled")
    odd = generate(lm, PROMPT, gen_len=10, block_len=4, stopper="filled", cache="dual")
    assert len(odd.canvas) == len(full.canvas) == 10
    assert (odd.step_map >= 0).all() and (odd.canvas != lm.cfg.mask_token_id).all()


def test_every_end_of_the_model_ends_a_text(lm):
    whole = generate(lm, PROMPT, gen_len=32, block_len=8)
    first, third = whole.tokens[0], whole.tokens[2]
    assert first != third and third not in whole.tokens[:2]
    cfg = dataclasses.replace(lm.cfg, more_eos_ids=(int(third),))
    cut = generate(dataclasses.replace(lm, cfg=cfg), PROMPT, gen_len=32, block_len=8)
    assert cut.finish_reason == "eos" and cut.tokens.tolist() == whole.tokens[:2].tolist()
    assert cut.num_forwards < whole.num_forwards  # the row is done there


def test_text_in_text_out(text_lm):
    prompts = ["Grüße", "a longer prompt"]
    completions = generate(text_lm, prompts, rule=Quota(4), gen_len=8, block_len=4)
    for c in completions:
        assert c.text == text_lm.tokenizer.decode([int(t) for t in c.tokens])


def test_seeds_are_per_request(text_lm):
    options = dict(gen_len=8, block_len=8, temperature=1.0, rule=Quota(8))
    both = generate(text_lm, ["same", "same"], seed=[3, 4], **options)
    assert both[0].tokens.tolist() != both[1].tokens.tolist()
    again = generate(text_lm, "same", seed=4, **options)
    assert again.tokens.tolist() == both[1].tokens.tolist()


def test_buckets_share_one_compilation(lm):
    decode.clear_cache()
    for n, threshold in ((3, 0.9), (9, 0.5), (16, 0.7)):
        generate(lm, [5] * n, rule=Threshold(threshold), gen_len=8, block_len=8)
    for num in (3, 4):  # batches go up to a power of two
        generate(lm, [[5] * 4] * num, gen_len=8, block_len=8)
    assert decode._cache_size() == 2


@pytest.mark.parametrize(
    "axes", [dict(data=3, fsdp=2), *more(dict(data=2, tensor=2), dict(data=8))]
)
def test_sharded_model(lm, axes):
    """Three prompts, which no mesh divides: the batch is filled up, and the rows stay the same."""
    mesh = make_mesh(**axes)
    sharded = dlm.load(GOLDEN / "llada_small", mesh=mesh)
    with jax.set_mesh(mesh):
        method = DiffusionMethod(FixedBlocks(8), DualCache())
        rows = round_rows(3, None)
        state = init_state(lm.cfg, method, [[5]] * 3, gen_len=8, batch_size=rows)
    rows = state.cache.kv.k.sharding.shard_shape(state.cache.kv.k.shape)[1]
    assert rows == {4: 2, 6: 1, 8: 1}[len(state.tokens)]
    prompts = [PROMPT, PROMPT[:5], PROMPT[:7]]
    options = dict(gen_len=16, block_len=8, cache=DualCache())
    for a, b in zip(
        generate(sharded, prompts, **options), generate(lm, prompts, **options), strict=True
    ):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.step_map.tolist() == b.step_map.tolist()


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, ValueError, "empty list"),
        ("text", {}, ValueError, "the checkpoint has no tokenizer"),
        (7, {}, TypeError, "prompts is a int"),
        ([94], {}, ValueError, "contains the mask token 94"),
        ([1] * 300, {}, ValueError, "max_seq_len=256"),
        (
            PROMPT,
            dict(cache="duel"),
            ValueError,
            r"cache='duel' must be one of \['delayed', 'dual'",
        ),
        (PROMPT, dict(confidence="prob"), ValueError, "confidence='prob' must be one of"),
        (PROMPT, dict(stopper="never"), ValueError, "stopper='never' must be one of"),
        (PROMPT, dict(temperature=-1.0), ValueError, "temperature=-1 must be positive"),
        (PROMPT, dict(gen_len=0), ValueError, "gen_len=0"),
        (PROMPT, dict(block_len=0), ValueError, "block_len=0"),
        (PROMPT, dict(block_len=1.5), ValueError, "block_len=1.5 must be a whole number"),
        (PROMPT, dict(block_len="x"), ValueError, "block_len='x' must be a whole number"),
        (PROMPT, dict(confidence=5), ValueError, "confidence=5 must be of class Confidence"),
        (PROMPT, dict(reviser="x"), ValueError, "reviser='x' must be of class Reviser"),
        (PROMPT, dict(method=5), ValueError, "method=5 must be a DiffusionMethod, or the name"),
        (PROMPT, dict(temperature="x"), ValueError, "temperature='x' must be a number"),
        (PROMPT, dict(lookahead=1.5), ValueError, "lookahead=1.5 must be a whole number"),
        (PROMPT, dict(top_logprobs=1.5), ValueError, "top_logprobs=1.5 must be a whole number"),
        (PROMPT, dict(infill="no"), ValueError, "infill='no' must be True or False"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(lm, prompts, options, error, message):
    with pytest.raises(error, match=message) as caught:
        generate(lm, prompts, **{"gen_len": 8, **options})
    assert "\n" not in str(caught.value)


def test_the_page_is_written(text_lm, tmp_path):
    completion = generate(text_lm, "<b>&", rule=Quota(4), gen_len=8, block_len=4)
    page = tmp_path / "order.html"
    write_commit_order(
        page, [Answer("<b>&", "quota", completion, True)], text_lm.tokenizer, "A & B"
    )
    text = page.read_text()
    assert "A &amp; B" in text and "&lt;b&gt;&amp;" in text and "http" not in text
    assert text.count('class="t"') == (completion.step_map >= 0).sum()


def test_what_a_method_has_is_not_ignored(toy_cfg, toy_params):
    """Its stop tokens cut the text; its constraint is not replaced by filters without a word."""
    lm = dlm.LanguageModel(toy_params, toy_cfg)
    method = DiffusionMethod(FixedBlocks(4))
    canvas = generate(lm, [1, 2, 3], method=method, gen_len=8).canvas
    stop = int(canvas[2])
    cut = generate(lm, [1, 2, 3], method=method.replace(stop_ids=(stop,)), gen_len=8)
    assert len(cut.tokens) == canvas.tolist().index(stop) and cut.finish_reason == "eos"
    with pytest.raises(ValueError, match=r"the method's constraint=Nucleus.* two constraints"):
        generate(lm, [1], method="dream_sampled", top_k=3, gen_len=8)


def test_zero_turns_off_what_a_method_has(lm):
    method = DiffusionMethod(FixedBlocks(None), temperature=0.5, guidance=0.2, lookahead=3)
    none = dict(temperature=0, guidance=0.0, lookahead=0)
    assert choose(lm, 8, {"method": method}) == method
    assert choose(lm, 8, {"method": method} | dict.fromkeys(none)) == method
    assert choose(lm, 8, {"method": method} | none) == DiffusionMethod(FixedBlocks(None))


@pytest.mark.exhaustive(every=4)
def test_many_prompts_are_decoded_a_few_at_a_time(lm):
    """In any number of rows they get the same answers, and lengths alike share a program."""
    prompts = [PROMPT[: 3 + i % 7] for i in range(13)]
    options = dict(gen_len=8, block_len=8, num_return=2, temperature=0.7)
    few, many = (generate(lm, prompts, batch_size=n, **options) for n in (4, 26))
    for a, b in zip(few, many, strict=True):
        assert a.canvas.tolist() == b.canvas.tolist()
        assert a.others[0].canvas.tolist() == b.others[0].canvas.tolist()
    assert any(a.canvas.tolist() != a.others[0].canvas.tolist() for a in few)
    generate(lm, PROMPT, gen_len=17)
    sizes = decode._cache_size()
    for length in range(18, 22):
        assert len(generate(lm, PROMPT, gen_len=length, stopper="filled").canvas) == length
        assert decode._cache_size() <= sizes + 1


def test_a_model_trained_in_blocks_is_decoded_in_them(lm):
    blocks = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, block_len=4))
    scheduler = FixedBlocks(4, aligned=True)
    expected = generate(lm, PROMPT, scheduler=scheduler, cache=BlockCausal(4), gen_len=16)
    for options in ({}, {"method": "block_causal"}, {"block_len": 4}, {"rule": Threshold(0.9)}):
        found = generate(blocks, PROMPT, gen_len=16, **options)
        np.testing.assert_array_equal(found.canvas, expected.canvas)
        np.testing.assert_array_equal(found.step_map, expected.step_map)
    sub = SubBlocks(4, 2, aligned=True)
    assert generate(blocks, PROMPT, gen_len=16, scheduler=sub).num_forwards > 0
    for options in ({"cache": "dual"}, {"method": "threshold"}, {"block_len": None}):
        with pytest.raises(ValueError, match=r"never saw in training: use BlockCausal\(4\)"):
            generate(blocks, PROMPT, gen_len=16, **options)
