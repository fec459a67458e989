"""Acceptance rules where there is little to draw: laws with zeros in them, counted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from decode.speculative.accept import (
    BlockVerification,
    Match,
    SpeculativeSampling,
    Typical,
    Verdict,
)
from decode.speculative.tree import chain, from_paths

N = 4000  # rows, all alike


@functools.partial(jax.jit, static_argnums=2)
def walked(rule, verdict, depth):
    return rule.walk(verdict, depth)


def walk(rule, shape, tokens, target, draft=None, drawn="without"):
    """Accepted drafts and bonus of N rows with a tree; laws are of its nodes [W, V]."""
    repeat = lambda x: jnp.tile(jnp.asarray(x)[None], (N, *[1] * np.ndim(x)))
    tree = shape.tree(repeat(jnp.array(tokens, jnp.int32)))
    if draft is not None:
        tree = tree.replace(probs=repeat(jnp.array(draft, jnp.float32)), drawn=drawn)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), N))
    target = jnp.array(target, jnp.float32)
    verdict = Verdict(tree, repeat(jnp.argmax(target, axis=-1)), repeat(target), keys)
    found = walked(rule, verdict, shape.depth)
    return np.asarray(found.num_accepted), np.asarray(found.bonus)


PAIR = from_paths([[0], [1]])


def test_drafts_that_do_not_exist_are_not_accepted():
    tokens, chosen = jnp.array([[9, 4, 4]] * 2), jnp.array([[4, 7, 8]] * 2)
    tree = PAIR.tree(tokens, jnp.array([[True, False, True], [True, False, False]]))
    walk = Match().walk(Verdict(tree, chosen, None, jnp.zeros((2, 2), jnp.uint32)), 1)
    assert walk.path.tolist() == [[0, 2], [0, 0]] and walk.bonus.tolist() == [8, 4]


def test_behind_a_rejection_only_what_is_left_is_drawn():
    """The draft is 0, whose share of the target's law is used up once it is rejected."""
    target = [[0.5, 0.3, 0.2], [0, 0, 1]]
    for rule in (SpeculativeSampling(), BlockVerification()):
        accepted, bonus = walk(rule, chain(1), [9, 0], target)
        assert abs(accepted.mean() - 0.5) < 0.03 and (bonus[accepted == 1] == 2).all()
        of_rest = bonus[accepted == 0]
        assert (of_rest > 0).all() and abs((of_rest == 1).mean() - 0.6) < 0.05


def test_a_sibling_is_tested_against_what_is_left_of_both_laws():
    """0 is rejected; then r = (0, 0.2, 0.8), and s = (0, 1, 0), or as before with replacement."""
    target, draft = [[0, 0.6, 0.4]] + [[1, 0, 0]] * 2, [[0.5, 0.5, 0]] * 3
    for drawn, expected in (("without", 0.2), ("with", 0.4)):
        rule = SpeculativeSampling()
        accepted, bonus = walk(rule, PAIR, [9, 0, 1], target, draft, drawn)
        assert abs(accepted.mean() - expected) < 0.04
        assert (bonus[accepted == 1] == 0).all()
        # With replacement max(r - s, 0) = (0, 0, 0.8): 2 is left either way.
        assert (bonus[accepted == 0] == 2).all()


def test_what_its_own_law_rules_out_is_not_accepted():
    target, draft = [[1, 0], [0, 1]], [[0, 1], [0, 1]]
    for rule in (SpeculativeSampling(), BlockVerification()):
        accepted, bonus = walk(rule, chain(1), [9, 0], target, draft)
        assert (accepted == 0).all() and (bonus == 0).all()


def test_a_chain_is_judged_as_a_whole_and_no_probability_exceeds_one():
    """P_1 = min(1, 1 / 0.5) = 1, P_2 = 0.5 / 1; then h_1 = 1, and norm(max(p - q, 0)) = (0, 1)."""
    target, draft = [[1, 0], [0.5, 0.5], [0, 1]], [[0.5, 0.5], [1, 0], [1, 0]]
    accepted, bonus = walk(BlockVerification(), chain(2), [9, 0, 0], target, draft)
    assert accepted.min() == 1 and abs((accepted == 2).mean() - 0.5) < 0.03
    assert (bonus == 1).all()


def test_what_is_typical_depends_on_how_much_is_possible():
    """0.1 is too little beside 0.7, at an entropy of 0.94 nats; 0.25 of a flat law would do."""
    rule = Typical(epsilon=1.0, delta=0.3)
    for law, expected in (([0.7, 0.1, 0.1, 0.1], 0), ([0.25] * 4, 1)):
        accepted, bonus = walk(rule, chain(1), [9, 1], [law, law])
        assert (accepted == expected).all()
        assert set(bonus) == ({0} if expected == 0 else {0, 1, 2, 3})
