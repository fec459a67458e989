"""The products that `scripts.bench train` counts and times are those of the program."""

import dataclasses

import jax
import pytest
from jax.extend import core

from dlm.trainable import Learned
from scripts.bench.timing import forward_cost
from scripts.bench.train import _random_batch, product_flops, train_products
from tests.lib.weights import init_params
from train.objectives import Context
from train.objectives.masked_diffusion import MaskedDiffusion

B, P, G = 3, 5, 7


def dots(jaxpr, times=1):
    """Operations of every `dot_general`, as often as loops run it; without other platforms'."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((over, _), _) = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * eqn.invars[0].aval.shape[over[0]] * times
        inner = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        if eqn.primitive.name == "pallas_call":
            continue
        if eqn.primitive.name == "cond":  # by platform: each multiplies the same, in its own way
            total += max(dots(branch.jaxpr, times) for branch in eqn.params["branches"])
            continue
        for sub in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
        ):
            if isinstance(sub, core.Jaxpr | core.ClosedJaxpr):
                total += dots(getattr(sub, "jaxpr", sub), inner)
    return total


@pytest.mark.parametrize("remat", [True, False])
def test_products_are_those_of_the_program(toy_cfg, remat):
    cfg = dataclasses.replace(toy_cfg, n_layers=3)
    objective, batch = MaskedDiffusion(remat=remat), _random_batch(cfg, B, P, G)

    def loss(params):
        return objective.loss(Learned(params), cfg, batch, Context(jax.random.key(0)))[0]

    program = jax.make_jaxpr(jax.grad(loss))(init_params(jax.random.key(0), cfg))
    products = train_products(cfg, B, P, G, remat)
    assert sum(n * product_flops(p) for p, n in products.items()) == dots(program.jaxpr)


def test_products_beyond_the_needed_ones(toy_cfg):
    """The logits again; with remat another forward of the layers, but for the last product."""
    needed = 3 * forward_cost(toy_cfg, B, P + G, 0, G)[0]
    head = 2 * B * G * toy_cfg.d_model * toy_cfg.vocab_size
    down = 2 * B * (P + G) * toy_cfg.d_ff * toy_cfg.d_model * toy_cfg.n_layers
    made = [
        sum(n * product_flops(p) for p, n in train_products(toy_cfg, B, P, G, remat).items())
        for remat in (False, True)
    ]
    expected = [needed + head, needed + head + (needed / 3 - head) - down]
    assert made == pytest.approx(expected, rel=0.02)  # norms count among the needed ones
