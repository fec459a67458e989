"""Lookahead changes the number of forwards, and nothing else."""

import functools

import numpy as np
import pytest

from decode.diffusion.components import (
    AdaBlock,
    Credit,
    DualCache,
    Eos,
    Eotp,
    FixedBlocks,
    Klass,
    NarrowOut,
    Prophet,
    Quota,
    Random,
    Remask,
    ReMDM,
    SparseCredit,
    Threshold,
    TokenEdit,
)
from decode.diffusion.loop import DiffusionMethod, decode, init_state
from tests.lib import batches
from tests.lib.batches import PROMPTS
from tests.lib.tiers import more, often

run = functools.partial(batches.run, seeds=3, batch_size=8)

METHODS = {
    "one per step": DiffusionMethod(FixedBlocks(None), rule=Quota(32)),
    "blocks": DiffusionMethod(FixedBlocks(4), rule=Quota(4)),
    "threshold": DiffusionMethod(FixedBlocks(4), rule=Threshold(0.5), stopper=Eos()),
    "klass": DiffusionMethod(FixedBlocks(4), rule=Klass(0.3, 0.5, 1)),
    "credit": DiffusionMethod(FixedBlocks(7), confidence=Credit(), rule=Threshold(0.6)),
    "sampled": DiffusionMethod(FixedBlocks(4), rule=Quota(4), temperature=0.3),
    "random": DiffusionMethod(FixedBlocks(4), confidence=Random(), rule=Quota(4)),
    "guided": DiffusionMethod(FixedBlocks(4), rule=Quota(4), guidance=0.5),
    "adablock": DiffusionMethod(AdaBlock((3, 5, 7), 4, share=0.5), rule=Threshold(0.6)),
    "edits": DiffusionMethod(FixedBlocks(4), rule=Quota(4), reviser=TokenEdit(0.1, 4)),
    "remask": DiffusionMethod(FixedBlocks(6), rule=Quota(6), reviser=Remask(2, 2, 0.5)),
    "remdm": DiffusionMethod(FixedBlocks(4), reviser=ReMDM(4, 0.5), temperature=0.2),
    "eotp": DiffusionMethod(FixedBlocks(4), rule=Quota(4), stopper=Eotp(eot_id=3)),
    "prophet": DiffusionMethod(FixedBlocks(4), rule=Quota(4), stopper=Prophet(4, late=0.5)),
}


SOME = ("threshold", "sampled", "adablock")


@pytest.mark.parametrize(
    "name", [*often(*SOME), *more(*(name for name in METHODS if name not in SOME))]
)
def test_everything_but_the_forwards_is_that_of_the_plain_loop(toy_cfg, toy_params, name):
    method = METHODS[name]
    plain = run(toy_params, toy_cfg, method)
    ahead = run(toy_params, toy_cfg, method.replace(lookahead=3))
    for field in ("tokens", "step_map", "end", "row_step", "stopped_early"):
        np.testing.assert_array_equal(getattr(ahead, field), getattr(plain, field), field)
    for field in ("log_prob", "confidence"):
        np.testing.assert_allclose(getattr(ahead, field), getattr(plain, field), atol=1e-4)
    forwards = np.asarray(ahead.num_forwards)
    assert (forwards <= plain.num_forwards).all()
    cost = 1 if method.guidance is None else 2
    assert (forwards * 4 >= plain.num_forwards).all() and (forwards % cost == 0).all()


def test_forwards_fall_where_rounds_can_be_guessed(toy_cfg, toy_params):
    """Positions that do not see each other: every guess is right, d + 1 rounds per forward."""
    layers = toy_params["layers"]
    silent = layers | {"attention": layers["attention"] | {"o": 0 * layers["attention"]["o"]}}
    params = toy_params | {"layers": silent}
    method = DiffusionMethod(FixedBlocks(None), rule=Quota(64), lookahead=3)
    state = run(params, toy_cfg, method, gen_len=12)
    # The first forward has no guesses yet: 1 + 4 + 4 + 3 rounds.
    assert state.num_forwards[:4].tolist() == [4] * 4 and state.row_step[:4].tolist() == [12] * 4


@pytest.mark.exhaustive(every=4)
def test_one_row_decodes_as_in_a_batch(toy_cfg, toy_params):
    method = METHODS["threshold"].replace(lookahead=2)
    together = run(toy_params, toy_cfg, method, gen_len=12)
    state = init_state(toy_cfg, method, [PROMPTS[2]], gen_len=12, seeds=[5])
    alone = decode(toy_params, toy_cfg, method, state)
    assert alone.tokens[0, 6:].tolist() == together.tokens[2, 6:].tolist()
    assert int(alone.num_forwards[0]) == int(together.num_forwards[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(cache=DualCache()), "DualCache does not allow"),
        (dict(reviser=NarrowOut()), "NarrowOut does not allow"),
        (dict(confidence=SparseCredit()), "use Credit with lookahead"),
        (dict(lookahead=-1), "lookahead=-1 must be at least 0"),
    ],
)
def test_what_cannot_look_ahead_is_refused(toy_cfg, change, message):
    method = DiffusionMethod(lookahead=2).replace(**change)
    with pytest.raises(ValueError, match=message):
        init_state(toy_cfg, method, [[1]], gen_len=4)
