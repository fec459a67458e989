"""Small drafters by hand: which occurrence is copied, which successor stands where."""

import jax
import jax.numpy as jnp
import numpy as np

from decode.core.sampling import Sampling
from decode.speculative.contracts import Context, Seen
from decode.speculative.drafters.jacobi import Jacobi
from decode.speculative.drafters.layer_skip import layer_skip
from decode.speculative.drafters.medusa import Medusa
from decode.speculative.drafters.no_draft import NoDraft
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.drafters.token_recycling import TokenRecycling
from decode.speculative.tree import chain, from_paths
from dlm.heads.medusa import head_hidden


def context_of(row):
    return Context(
        params={}, tokens=jnp.array([row + [0] * 4]), length=jnp.array([len(row)]),
        key=jnp.zeros((1, 2), jnp.uint32), sampling=Sampling(None), active=jnp.ones(1, bool),
        cache=None,
    )  # fmt: skip


@jax.jit
def tree_of(drafter, context, state):
    return drafter.propose(None, context, state).tree


def test_without_a_drafter_the_tree_is_its_root_and_costs_nothing():
    proposal = NoDraft().propose(None, context_of([4, 7]), ())
    assert proposal.tree.tokens.tolist() == [[7]] and proposal.cost.tolist() == [0]


def test_guesses_of_jacobi_are_what_stands_behind_what_was_kept():
    """The root at first; the newest guess fills up."""
    drafter, context = Jacobi(num_guesses=3), context_of([4, 7])
    state = drafter.init(None, 1, 0)
    assert tree_of(drafter, context, state).tokens.tolist() == [[7, 7, 7, 7]]
    none = jnp.zeros((1, 4), jnp.int32)
    for count, expected in ((1, [11, 12, 13]), (2, [12, 13, 13]), (4, [13, 13, 13])):
        seen = Seen(none, none, none[:, 0], jnp.array([count]), chosen=jnp.arange(10, 14)[None])
        state = drafter.observe(None, context, seen, state)
        assert tree_of(drafter, context, state).tokens.tolist() == [[7, *expected]]


def test_layers_that_are_kept_are_the_models_own(toy_cfg, toy_params):
    drafter = layer_skip(toy_params, toy_cfg, [1], num_drafts=3)
    assert drafter.params is toy_params and drafter.draft is toy_cfg
    assert (drafter.layers, drafter.num_drafts) == ((1,), 3)


def test_prompt_lookup_copies_what_followed_the_first_or_the_latest_occurrence():
    context = context_of([1, 2, 7, 1, 2, 8, 5, 1, 2])
    for latest, expected in ((False, [2, 7, 1]), (True, [2, 8, 5])):
        tree = tree_of(PromptLookup(num_drafts=2, latest=latest), context, ())
        assert np.asarray(tree.tokens)[0].tolist() == expected and np.asarray(tree.is_valid).all()


def test_token_recycling_puts_the_best_successors_by_rank():
    drafter = TokenRecycling(shape=from_paths([[0], [1], [1, 0]]))
    state = np.tile(np.arange(6)[None, :, None] * 10, (1, 1, 8)) + np.arange(8)[None, None]
    tree = tree_of(drafter, context_of([3]), jnp.asarray(state % 6, jnp.int32))
    successors = state[0] % 6
    a, b = successors[3][:2]
    assert np.asarray(tree.tokens)[0].tolist() == [3, a, b, successors[b][0]]


def test_every_head_of_medusa_drafts_its_own_depth():
    keys, (J, V, D) = jax.random.split(jax.random.key(0), 3), (3, 11, 4)
    block = {"w": jax.random.normal(keys[1], (J, D, D)), "b": jnp.zeros((J, D))}
    own = {"unembed": jax.random.normal(keys[0], (J, V, D)), "blocks": [block]}
    hidden = jax.random.normal(keys[2], (1, D))
    tree = tree_of(Medusa(own, chain(J)), context_of([3]), hidden)
    best = lambda j, k: int((own["unembed"][j] @ head_hidden(own, hidden, k)[0]).argmax())
    expected = [best(j, j) for j in range(J)]
    assert np.asarray(tree.tokens)[0, 1:].tolist() == expected != [best(j, 0) for j in range(J)]
