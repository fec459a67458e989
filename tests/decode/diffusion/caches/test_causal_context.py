"""Blocks that see all of themselves, behind a text that is read from left to right."""

import numpy as np
import pytest

from decode.diffusion.components import CausalContext, FixedBlocks, Threshold
from decode.diffusion.loop import DiffusionMethod, decode, init_state
from tests.lib.oracle import Model, proposals, sure

C, P = 4, 11
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [2, 2, 2, 2], [9] * 8]
LENGTHS = [12, 10, 5, 12, 1]


def decode_plainly(model, prompt, gen_len, threshold):
    """Threshold decoding with everything recomputed: only the open block looks ahead."""
    cfg, n = model.cfg, len(prompt) + gen_len
    canvas, step_map, step = list(prompt) + [cfg.mask_token_id] * gen_len, [-1] * gen_len, 0
    block, shift = np.arange(n) // C, int(cfg.shifted_logits)
    for b in range(block[len(prompt)], block[-1] + 1):
        stop = min((b + 1) * C, n)
        allowed = (block[:stop] == b)[:, None] | np.tri(stop, dtype=bool)
        here = range(max(b * C, len(prompt)), stop)
        while todo := [i for i in here if step_map[i - len(prompt)] < 0]:
            hidden, _ = model.run(canvas[:stop], range(stop), allowed=allowed)
            found = proposals(model, {i: hidden[i - shift] for i in todo})
            for i in sure(found, threshold):
                canvas[i], step_map[i - len(prompt)] = found[i][1], step
            step += 1
    return canvas, step_map, step


@pytest.mark.exhaustive(every=4)
def test_cached_decoding_equals_recomputing_everything(toy_model):
    """And what is cached of finished blocks is what a causal model makes of the text."""
    cfg, params = toy_model
    method = DiffusionMethod(FixedBlocks(C, aligned=True), CausalContext(C), rule=Threshold(0.5))
    state = init_state(cfg, method, PROMPTS, gen_len=LENGTHS, prompt_len=P, batch_size=8)
    state = decode(params, cfg, method, state)
    model, keys = Model(params, cfg), np.asarray(state.cache.kv.k)
    for b, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        canvas, step_map, steps = decode_plainly(model, prompt, length, 0.5)
        assert state.tokens[b, P : P + length].tolist() == canvas[len(prompt) :]
        assert state.step_map[b, :length].tolist() == step_map
        assert int(state.num_forwards[b]) == steps
        settled = (len(canvas) - 1) // C * C  # all but the last block
        text = canvas[:settled]
        _, written = model.run(text, range(settled), allowed=np.tri(settled, dtype=bool))
        first = P - len(prompt)
        for layer, (k, _) in enumerate(written):
            cached = keys[layer, b, :, first : first + settled].swapaxes(0, 1)
            np.testing.assert_allclose(cached, k, atol=2e-5)
