"""Small drafters by hand: which occurrence is copied, which successor stands where."""

import jax
import jax.numpy as jnp
import numpy as np

from decode.core.sampling import Sampling
from decode.speculative.contracts import Context
from decode.speculative.drafters.medusa import Medusa
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
