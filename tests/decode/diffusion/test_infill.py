"""Gaps in prompts are filled; what stands around them stays."""

import dataclasses

import numpy as np
import pytest

import dlm
from decode.core.requests import split_gaps
from decode.diffusion.components import (
    P2,
    AdaBlock,
    BlockCausal,
    DelayedCache,
    DualCache,
    Eos,
    EosBlock,
    Eotp,
    FixedBlocks,
    MultiBlock,
    NarrowOut,
    NoCache,
    PrefixCache,
    Prophet,
    Quota,
    Remask,
    ReMDM,
    RunningConfidence,
    SlowFast,
    SubBlocks,
    Threshold,
    TokenEdit,
    VicinityCache,
)
from decode.diffusion.loop import DiffusionMethod, decode, init_state
from decode.generate import as_finished, generate
from dlm.tokenizer import word_tokenizer
from tests.lib.models import TOY_CFG
from tests.lib.oracle import Model
from tests.lib.tiers import more

M, END = TOY_CFG.mask_token_id, TOY_CFG.eos_token_id
# Several gaps, one at an end, none at all, whole blocks that are given; and what is written behind.
TEXTS = [
    [1, 2, M, M, 5, 6, M, 8], [3, M, M, M, M], [4, 7, 9],
    [5, M, *range(1, 13), M, M, 3], [2, M, END, 4, 1, M, M],
]  # fmt: skip
BEHIND = [0, 3, 6, 0, 5]
P, G = 4, 20


def run(params, cfg, method, rows=range(len(TEXTS))):
    """The final state, and how its rows began."""
    heads, bodies, lengths = split_gaps(cfg, [TEXTS[b] for b in rows], [BEHIND[b] for b in rows])
    state = init_state(
        cfg, method, heads, gen_len=lengths, seeds=list(rows), given=bodies,
        prompt_len=P, canvas_len=G, batch_size=len(TEXTS),
    )  # fmt: skip
    return decode(params, cfg, method, state)


def fill_plainly(model, text, behind, block_len, threshold, guidance=None):
    """In blocks that are counted from the first gap; those without a gap take no forward."""
    canvas = text + [M] * behind
    given = [token != M for token in canvas]
    shift, n = int(model.cfg.shifted_logits), len(canvas)
    steps, step, first = {}, 0, canvas.index(M)
    blind = lambda: [M if g else token for g, token in zip(given, canvas, strict=True)]
    for low in range(first, n, block_len or n):
        block = [i for i in range(low, min(low + (block_len or n), n)) if not given[i]]
        while any(i not in steps for i in block):
            hidden, _ = model.run(canvas, range(n))
            if guidance is not None:
                other, _ = model.run(blind(), range(n))
                hidden = other + (guidance + 1) * (hidden - other)
            sure = {}
            for i in block:
                if i not in steps:
                    z = model.logits(hidden[i - shift])
                    z[M] = -np.inf
                    p = np.exp(z - z.max())
                    sure[i] = (p.max() / p.sum(), int(z.argmax()))
            best = max(sure, key=lambda i: (sure[i][0], -i))
            for i, (p, token) in sure.items():
                if p >= threshold or i == best:
                    canvas[i], steps[i] = token, step
            step += 1
    return canvas, steps, step


def check(state, cfg, params, block_len, guidance=None):
    model = Model(params, cfg)
    for b, (text, behind) in enumerate(zip(TEXTS, BEHIND, strict=True)):
        canvas, steps, count = fill_plainly(model, text, behind, block_len, 0.4, guidance)
        start, end = int(state.start[b]), int(state.end[b])
        assert state.tokens[b, start:end].tolist() == canvas
        found = {
            P - start + i: int(state.step_map[b, i])
            for i in range(end - P)
            if not state.given[b, i]
        }
        assert found == steps
        assert int(state.num_forwards[b]) == count * (1 if guidance is None else 2)


@pytest.mark.parametrize("block_len", [4, *more(None)])
def test_gaps_are_filled_as_the_plain_loop_fills_them(toy_model, block_len):
    cfg, params = toy_model
    method = DiffusionMethod(FixedBlocks(block_len), rule=Threshold(0.4))
    check(run(params, cfg, method), cfg, params, block_len)


def test_guidance_hides_all_that_was_given(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), rule=Threshold(0.4), guidance=0.5)
    check(run(toy_params, toy_cfg, method), toy_cfg, toy_params, 4, guidance=0.5)


CHOICES = [
    {"reviser": TokenEdit(0.0, 3)}, {"stopper": Eotp()}, {"scheduler": MultiBlock(4, 3, 0.3)},
    {"cache": DualCache(), "stopper": Eos()},
    *more(
        {"reviser": NarrowOut(0.9)}, {"reviser": P2(4)}, {"reviser": ReMDM(4, 0.4)},
        {"reviser": Remask(2, 2, 0.5), "rule": Quota(2)},
        {"reviser": RunningConfidence(), "rule": Quota(2)},
        {"stopper": Eotp("committed")}, {"stopper": Prophet(0, 20, None, 0.1, 0.1, 0.1)},
        {"stopper": EosBlock()}, {"scheduler": AdaBlock((1, 2, 3), 4, threshold=0.1)},
        {"scheduler": SlowFast(None, 3)}, {"scheduler": SubBlocks(6, 2)},
        {"cache": PrefixCache()}, {"cache": DelayedCache(3)}, {"cache": VicinityCache(before=2)},
        {"lookahead": 2, "cache": NoCache()},
    ),
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(map(str, c.values()))[:60])
def test_what_is_given_stays_whatever_decides(toy_cfg, toy_params, choice):
    """Every token of the prompt; and no gap stays open in front of one."""
    method = DiffusionMethod(FixedBlocks(4), rule=Threshold(0.3)).replace(**choice)
    state = run(toy_params, toy_cfg, method)
    for b, (text, behind) in enumerate(zip(TEXTS, BEHIND, strict=True)):
        start, end = int(state.start[b]), int(state.end[b])
        found = state.tokens[b, start:end].tolist()
        assert len(found) >= len(text) and len(found) <= len(text) + behind
        assert [t for t, old in zip(found, text, strict=False) if old != M] == [
            t for t in text if t != M
        ]
        last = max((i for i, t in enumerate(text) if t != M), default=0)
        assert M not in found[: last + 1]
    alone = run(toy_params, toy_cfg, method, rows=[3])
    np.testing.assert_array_equal(alone.tokens[0], state.tokens[3])
    assert int(alone.num_forwards[0]) == int(state.num_forwards[3])


def test_an_end_that_is_given_ends_nothing(toy_cfg, toy_params):
    """Nor does one that is written into a gap in front of something that is given."""
    method = DiffusionMethod(FixedBlocks(4), rule=Threshold(0.4), stopper=Eos())
    state = run(toy_params, toy_cfg, method)
    assert not state.stopped_early[4] or END in state.tokens[4, -BEHIND[4] :].tolist()
    ends = dataclasses.replace(toy_cfg, eos_token_id=int(state.tokens[3, P]))  # fills a gap
    again = run(toy_params, ends, method)
    np.testing.assert_array_equal(again.tokens[3], state.tokens[3])
    for kind in ("predicted", "committed"):
        cut = run(toy_params, ends, method.replace(stopper=Eotp(kind)))
        assert int(cut.end[3] - cut.start[3]) == len(TEXTS[3])  # whose last token is given


@pytest.fixture(scope="module")
def lm(toy_cfg, toy_params):
    return dlm.LanguageModel(toy_params, toy_cfg)


OPTIONS = dict(infill=True, rule=Threshold(0.4), block_len=4, stopper="filled")


@pytest.mark.exhaustive(every=4)
def test_generate_gives_whole_texts(lm):
    found = generate(lm, TEXTS, gen_len=BEHIND, **OPTIONS)
    model = Model(lm.params, lm.cfg)
    for text, behind, completion in zip(TEXTS, BEHIND, found, strict=True):
        canvas, steps, count = fill_plainly(model, text, behind, 4, 0.4)
        first = canvas.index(M) if M in canvas else min(steps)
        tail = canvas[len(text) :]
        whole = canvas[: len(text) + tail.index(END)] if END in tail else canvas
        assert completion.tokens.tolist() == whole
        assert completion.canvas.tolist() == canvas[first:]
        expected = [steps.get(i, -2) for i in range(first, len(canvas))]
        assert completion.step_map.tolist() == expected
        assert completion.num_forwards == count
        made = sum(i < len(whole) for i in steps)
        assert completion.tokens_per_forward == made / count
    queued = generate(lm, TEXTS, gen_len=BEHIND, batch_size=2, **OPTIONS)
    for a, b in zip(found, queued, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and a.num_forwards == b.num_forwards


def test_gaps_in_a_string(toy_params):
    words = word_tokenizer([f"{i} " for i in range(22)])  # then the end, 22, and MASK, 23
    cfg = dataclasses.replace(TOY_CFG, pad_token_id=END)
    lm = dlm.LanguageModel(toy_params, cfg, words)
    found = generate(lm, "1 2 <|mdm_mask|><|mdm_mask|>5 6 <|mdm_mask|>8 ", gen_len=0, **OPTIONS)
    canvas, _, _ = fill_plainly(Model(lm.params, cfg), [1, 2, M, M, 5, 6, M, 8], 0, 4, 0.4)
    assert found.tokens.tolist() == canvas and found.text == words.decode(canvas)


def test_without_gaps_it_is_plain_decoding(lm):
    options = OPTIONS | {"infill": False}
    plain = generate(lm, [4, 7, 9], gen_len=8, **options)
    filled = generate(lm, [4, 7, 9], gen_len=8, **OPTIONS)
    assert filled.tokens.tolist() == [4, 7, 9, *plain.tokens.tolist()]
    np.testing.assert_array_equal(filled.step_map, plain.step_map)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1, 2], {"gen_len": 0}, r"prompt 0 has 0 MASK tokens \(id 23\) and gen_len=0"),
        ([1, M], {"gen_len": -1}, "and gen_len=-1: with infill=True"),
        ([1, M], {"infill": False}, "contains the mask token 23, .*: remove it"),
        ([1, M, 99], {"gen_len": 0}, r"prompt 0 contains token 99, which must be in \[0"),
        (
            [1, M],
            {"cache": BlockCausal(4), "scheduler": FixedBlocks(4, aligned=True)},
            "BlockCausal shows a block nothing of what stands behind it",
        ),
    ],
)
def test_what_cannot_be_filled_is_refused(lm, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(lm, prompt, **({"gen_len": 4} | OPTIONS | options))


def test_a_bad_gap_is_refused_before_the_first_is_filled(lm):
    texts = [[1, M]] * 5
    with pytest.raises(ValueError, match=r"prompt 5 contains token 77, which must be in \[0, vo"):
        as_finished(lm, [*texts, [1, M, 77]], gen_len=0, batch_size=2, **OPTIONS)
    with pytest.raises(ValueError, match="prompt 5 has 63 tokens, which with gen_len=2 is more"):
        as_finished(lm, [*texts, [1, M] + [2] * 61], gen_len=2, batch_size=2, **OPTIONS)


def test_a_model_that_needs_a_token_before(toy_dream):
    cfg, params = toy_dream
    with pytest.raises(ValueError, match="prompt 0 begins with MASK, but each token is pred"):
        generate(dlm.LanguageModel(params, cfg), [M, 1], gen_len=0, **OPTIONS)
