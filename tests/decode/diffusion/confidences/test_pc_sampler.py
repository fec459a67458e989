import json

import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import PcSampler, Quota, Threshold
from decode.diffusion.points import complete
from tests.lib.paths import GOLDEN
from tests.lib.rounds import make_round

ROWS = json.loads((GOLDEN / "rules" / "pc_sampler.json").read_text())["rows"]


def scores(measure, probability, token):
    given = make_round(probability).replace(proposal=jnp.asarray(token))
    most = min(float(measure.alpha), -np.log(1e-9))
    return np.exp(measure.measure(given, ())[0].confidence) * most


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['seed']}-{row['lam']}-{row['alpha']}")
def test_scores_are_those_of_the_public_function(row):
    measure = PcSampler(jnp.asarray(row["background"], jnp.float32), row["lam"], row["alpha"])
    found = scores(measure, row["probability"], row["token"])
    np.testing.assert_allclose(found, row["score"], rtol=2e-5)


def test_order_by_distance_and_by_rarity():
    flat = PcSampler(jnp.full(8, 0.1), decay=5.0, alpha=1e6)
    p = [[0.2, 0.9, 0.5, 0.99]]
    assert np.argsort(-scores(flat, p, [[1, 2, 3, 4]]))[0].tolist() == [0, 1, 2, 3]
    common = PcSampler(jnp.asarray([0.9] + [0.01] * 7), decay=0.0)
    assert scores(common, [[0.99, 0.3]], [[0, 1]])[0].argmax() == 1  # a sure end of text waits
    everywhere = PcSampler(jnp.asarray([1.0] + [1e-9] * 7))
    given = make_round([[0.5, 0.5]]).replace(proposal=jnp.asarray([[0, 1]]))
    assert np.isfinite(everywhere.measure(given, ())[0].confidence).all()


def test_it_meets_no_threshold(toy_cfg):
    method = complete(8, confidence=PcSampler(jnp.full(toy_cfg.vocab_size, 0.1)))
    method.validate(toy_cfg)
    assert isinstance(method.rule, Quota)
    with pytest.raises(ValueError, match=r"Threshold compares confidences .* only order positions"):
        method.replace(rule=Threshold()).validate(toy_cfg)
    with pytest.raises(ValueError, match=r"background has shape \(3,\) .*token_frequencies"):
        PcSampler(jnp.ones(3)).validate(toy_cfg)
