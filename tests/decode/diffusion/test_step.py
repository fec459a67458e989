"""One round by hand: who is held, what is drawn, what the model is shown."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.diffusion.caches.canvas import CachePolicy
from decode.diffusion.components import DualCache, FixedBlocks, Prophet, TokenEdit, UniformNoise
from decode.diffusion.loop import DiffusionMethod, init_state
from decode.diffusion.step import apply, judge, make_frame
from tests.lib.rounds import make_round

PROMPTS, C, G = [[1], [2, 3]], 4, 8


def state_of(cfg, method):
    return init_state(cfg, method, PROMPTS, gen_len=G, seeds=[5, 6])


def test_a_row_that_waits_stays_as_it_is_even_if_its_block_is_full(toy_cfg):
    """Its reviser would let the block go, but the round was not its own."""
    method = DiffusionMethod(FixedBlocks(C), DualCache(), reviser=TokenEdit(0.5, 4))
    state = state_of(toy_cfg, method)
    P, first = state.prompt_len, jnp.arange(C)
    state = state.replace(
        tokens=state.tokens.at[:, P : P + C].set(first[None]),
        step_map=state.step_map.at[:, :C].set(0),
        block_step=jnp.ones(2, jnp.int32),
    )
    round = make_round([[0.9] * C] * 2, eligible=[[False] * C] * 2)
    round = round.replace(gen_len=jnp.full(2, G), block_step=state.block_step)
    served = jnp.array([True, False])
    after = jax.jit(apply, static_argnums=0)(toy_cfg, method, state, round, served)
    assert after.block_start.tolist() == [P + C, P]  # nothing was edited: the first one is done
    assert after.block_step.tolist() == [0, 1] and after.row_step.tolist() == [1, 0]
    rows = lambda state: [x[1] for x in jax.tree.leaves(state.replace(cache=())) if x.ndim]
    for now, before in zip(rows(after), rows(state), strict=True):
        np.testing.assert_array_equal(now, before)


def test_every_row_round_and_position_draws_for_itself(toy_cfg):
    method = DiffusionMethod(FixedBlocks(C))
    state = state_of(toy_cfg, method)
    P = state.prompt_len

    @jax.jit
    def keys(method, round, start):
        moved = state.replace(
            row_step=jnp.full(2, round), block_start=state.block_start * 0 + P + start
        )
        return make_frame(toy_cfg, method, moved).noise_key

    seen = {(r, s): np.asarray(keys(method, r, s)) for r in range(3) for s in (0, C)}
    every = {tuple(key) for found in seen.values() for key in found.reshape(-1, 2).tolist()}
    assert len(every) == 2 * 3 * G
    whole = np.asarray(keys(method.replace(stopper=Prophet(0)), 1, 0))  # sees the whole canvas
    np.testing.assert_array_equal(whole, np.concatenate([seen[1, 0], seen[1, C]], axis=1))


@struct.dataclass
class Camera(CachePolicy):
    """Keeps what the model would see as its state."""

    def allocate(self, cfg, batch_size, num_slots):
        return ()

    def judge(self, params, cfg, canvas, window_len, state):
        hidden = jnp.zeros((len(canvas.tokens), window_len, cfg.d_model))
        return hidden, canvas, canvas.is_active


def test_noise_is_shown_anew_in_every_round(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(C), Camera(), inputs=UniformNoise())
    state = state_of(toy_cfg, method)
    P = state.prompt_len
    state = state.replace(
        tokens=state.tokens.at[:, P].set(9), step_map=state.step_map.at[:, 0].set(0)
    )

    @jax.jit
    def seen(round):
        moved = state.replace(row_step=jnp.full(2, round))
        return judge(toy_params, toy_cfg, method, moved)[1].tokens

    rounds = np.asarray([seen(round) for round in range(3)])
    assert (rounds[:, :, : P + 1] == np.asarray(state.tokens)[None, :, : P + 1]).all()
    noise = rounds[:, :, P + 1 :].reshape(6, -1)
    assert len({tuple(row) for row in noise.tolist()}) == 6


def test_guidance_shows_the_canvas_without_its_prompt(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(C), Camera(), guidance=1.0)
    state = state_of(toy_cfg, method)
    run = jax.jit(functools.partial(judge, cfg=toy_cfg))
    tokens = np.asarray(run(toy_params, method=method, state=state)[1].tokens)
    P = state.prompt_len
    np.testing.assert_array_equal(tokens[:2], state.tokens)
    assert (tokens[2:, :P] == toy_cfg.mask_token_id).all()
    np.testing.assert_array_equal(tokens[2:, P:], state.tokens[:, P:])
