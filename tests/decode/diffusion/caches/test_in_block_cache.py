import numpy as np
import pytest

from decode.diffusion.components import (
    BlockCausal,
    FixedBlocks,
    InBlockCache,
    SubBlocks,
    Threshold,
    TokenEdit,
)
from decode.diffusion.loop import DiffusionMethod, decode, init_state
from tests.lib.oracle import Model, proposals, sure

C, c = 6, 3
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 3, 2, 2], [2] * 6, [9] * 12]
LENGTHS = [12, 10, 14, 11, 6]


def decode_plainly(model, prompt, gen_len, threshold, first_alone):
    """Fast-dLLM v2's loop with its block cache: keys and values kept by hand."""
    cfg, P, n = model.cfg, len(prompt), len(prompt) + gen_len
    shift = int(cfg.shifted_logits)
    canvas, done = list(prompt) + [cfg.mask_token_id] * gen_len, [True] * P + [False] * gen_len
    block, step_map, step = np.arange(n) // C, [-1] * gen_len, 0
    log_prob = np.zeros(gen_len)
    for b in range(P // C, block[-1] + 1):
        low, high = b * C, min(b * C + C, n)
        allowed = block[:low, None] >= block[None, :low]
        before, prefix = model.run(canvas[:low], range(low), allowed=allowed) if b else (None, None)
        rounds, fresh, own = 0, None, None
        while not all(done[low:high]):
            left = done.index(False, low)
            part = low + (left - low) // c * c
            here = range(part, min(part + c, n))
            if fresh != part or not done[part]:
                hidden, own = model.run(canvas[low:high], range(low, high), prefix)
                first = low
                if not (rounds == 0 and part == low and not done[low]):
                    fresh = part
            else:
                rows = [i - low for i in here]
                context = []
                for layer, (k, v) in enumerate(own):
                    k, v = np.delete(k, rows, axis=0), np.delete(v, rows, axis=0)
                    if prefix is not None:
                        k, v = (np.concatenate(x) for x in zip(prefix[layer], (k, v), strict=True))
                    context.append((k, v))
                hidden, new = model.run(canvas[part : part + len(here)], here, context)
                first = part
                for (k, v), (new_k, new_v) in zip(own, new, strict=True):
                    k[rows], v[rows] = new_k, new_v
            eligible = [i for i in here if not done[i]]
            if first_alone and part == low and not done[low]:
                eligible = [low]
            at = {
                i: before[-1] if shift and i == low else hidden[i - shift - first] for i in eligible
            }
            found = proposals(model, at)
            for i in sure(found, threshold):
                canvas[i], done[i], step_map[i - P] = found[i][1], True, step
                log_prob[i - P] = np.log(found[i][0])
            step, rounds = step + 1, rounds + 1
    return canvas[P:], step_map, step, log_prob


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("threshold", [0.5])
def test_a_ragged_batch_equals_the_plain_loop(toy_model, threshold):
    cfg, params = toy_model
    alone = cfg.shifted_logits
    method = DiffusionMethod(
        SubBlocks(C, c, aligned=True, first_alone=alone),
        InBlockCache(C, sub_len=c),
        rule=Threshold(threshold),
    )
    state = init_state(cfg, method, PROMPTS, gen_len=LENGTHS, prompt_len=14, batch_size=8)
    state = decode(params, cfg, method, state)
    exact = method.replace(cache=BlockCausal(C))
    other = init_state(cfg, exact, PROMPTS, gen_len=LENGTHS, prompt_len=14, batch_size=8)
    other = decode(params, cfg, exact, other)
    model = Model(params, cfg)
    for b, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        tokens, step_map, steps, log_prob = decode_plainly(model, prompt, length, threshold, alone)
        assert state.tokens[b, 14 : 14 + length].tolist() == tokens
        assert state.step_map[b, :length].tolist() == step_map
        assert int(state.num_forwards[b]) == steps
        np.testing.assert_allclose(state.log_prob[b, :length], log_prob, atol=1e-4)
    assert (state.log_prob != other.log_prob).any()  # it is an approximation


@pytest.mark.exhaustive(every=4)
def test_it_is_exact_if_sub_blocks_are_decided_at_once(toy_cfg, toy_params):
    """Then every forward is a sub-block's first, which runs over the whole block."""
    method = DiffusionMethod(SubBlocks(C, c, aligned=True), BlockCausal(C), rule=Threshold(0.0))
    run = lambda method: decode(
        toy_params, toy_cfg, method, init_state(toy_cfg, method, PROMPTS, gen_len=LENGTHS)
    )
    exact, cached = run(method), run(method.replace(cache=InBlockCache(C, sub_len=c)))
    for name in ("tokens", "step_map", "num_forwards", "num_steps"):
        np.testing.assert_array_equal(getattr(cached, name), getattr(exact, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduler": FixedBlocks(C, aligned=True)}, "in parts of 3"),
        ({"scheduler": SubBlocks(C, 2, aligned=True)}, "in parts of 3"),
        ({"scheduler": SubBlocks(C, c)}, r"InBlockCache\(block_len=6\) .* use aligned blocks of 6"),
        ({"reviser": TokenEdit()}, "TokenEdit looks at the whole block"),
        ({"cache": InBlockCache(C, sub_len=7)}, r"sub_len=7 must be in \[1, 6\]"),
    ],
)
def test_what_it_cannot_do_is_refused(toy_cfg, change, message):
    method = DiffusionMethod(SubBlocks(C, c, aligned=True), InBlockCache(C, sub_len=c))
    with pytest.raises(ValueError, match=message):
        init_state(toy_cfg, method.replace(**change), [[1]], gen_len=4)
