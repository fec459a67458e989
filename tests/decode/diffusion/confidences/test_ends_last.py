import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import EndsLast, FixedBlocks, Quota
from decode.diffusion.loop import DiffusionMethod
from kernels_pallas.unembed_stats import logits_stats
from tests.lib.batches import LENGTHS, PROMPTS, run
from tests.lib.oracle import Model
from tests.lib.rounds import make_round

LAW = np.array([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.05, 0.05, 0.9]])  # ends: 1 and 2


@pytest.mark.exhaustive(every=4)
def test_others_are_measured_without_the_ends_which_come_last(toy_cfg):
    measure = EndsLast((1, 2))
    state = measure.init(toy_cfg, 1, 3)
    stats = logits_stats(jnp.log(jnp.asarray(LAW, jnp.float32)), given_ids=state[0])
    stats = stats.replace(given_log_probs=stats.given_log_probs[None])
    view = make_round(LAW.max(axis=1)).replace(
        proposal=jnp.asarray(LAW.argmax(axis=1))[None], stats=stats
    )
    confidence = np.asarray(measure.measure(view, state)[0].confidence)[0]
    # The first position's favourite is no end: certain among what is left. The others' are.
    assert confidence[0] == pytest.approx(0.0, abs=1e-6)
    assert np.isneginf(confidence[1:]).all()
    one = EndsLast((1,))  # 2 is a token like others
    state = one.init(toy_cfg, 1, 3)
    stats = logits_stats(jnp.log(jnp.asarray(LAW, jnp.float32)), given_ids=state[0])
    stats = stats.replace(given_log_probs=stats.given_log_probs[None])
    confidence = one.measure(view.replace(stats=stats), state)[0].confidence[0]
    expected = np.log([0.5 / 0.8, 1e-30, 0.9 / 0.95])
    np.testing.assert_allclose(np.where([1, 0, 1], confidence, -69.07755), expected, rtol=1e-5)


def decode_plainly(model, prompt, gen_len, ends):
    """LLaDA's sampler in one block, one token per step, ends out of the confidences."""
    mask = model.cfg.mask_token_id
    out, step_map = [mask] * gen_len, [-1] * gen_len
    for step in range(gen_len):
        hidden, _ = model.run([*prompt, *out], range(len(prompt) + gen_len))
        sure = {}
        for g in range(gen_len):
            if step_map[g] >= 0:
                continue
            z = model.logits(hidden[len(prompt) + g])
            z[mask] = -np.inf
            token = int(z.argmax())
            z[list(ends)] = -np.inf
            sure[g] = (np.exp(z[token] - z.max()) / np.exp(z - z.max()).sum(), token)
        best = max(sure, key=lambda g: (sure[g][0], -g))
        out[best], step_map[best] = sure[best][1], step
    return out, step_map


@pytest.mark.exhaustive(every=4)
def test_a_ragged_batch_equals_the_plain_loop(toy_cfg, toy_params):
    model = Model(toy_params, toy_cfg)
    plain = run(toy_params, toy_cfg, DiffusionMethod(FixedBlocks(None), rule=Quota(99)))
    drawn = np.unique(plain.tokens[:, plain.prompt_len :])
    ends = tuple(int(t) for t in drawn[: len(drawn) // 2] if t < toy_cfg.pad_token_id)
    method = DiffusionMethod(FixedBlocks(None), confidence=EndsLast(ends), rule=Quota(99))
    state = run(toy_params, toy_cfg, method)
    for b, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        tokens, step_map = decode_plainly(model, prompt, length, ends)
        P = state.prompt_len
        assert state.tokens[b, P : P + length].tolist() == tokens
        assert state.step_map[b, :length].tolist() == step_map
    assert (plain.step_map != state.step_map).any()


def test_by_default_the_end_is_the_models(toy_cfg):
    cfg = dataclasses.replace(toy_cfg, eos_token_id=5, more_eos_ids=(7,))
    assert np.unique(EndsLast().init(cfg, 2, 3)).tolist() == [5, 7]
    with pytest.raises(ValueError, match=r"an end in ids=24 must be in \[0, 23\]"):
        EndsLast((24,)).validate(toy_cfg)
    with pytest.raises(ValueError, match=r"ids=\[3, 3\] must be different tokens"):
        EndsLast((3, 3)).validate(toy_cfg)
