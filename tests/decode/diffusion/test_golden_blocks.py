"""What public loops of block-diffusion models do on small checkpoints, round for round.

A round here is a denoising forward there. Forwards that only store a finished block's keys and
values have no round: `BlockCausal` stores them with the next block's first.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from decode.diffusion import public
from decode.diffusion.components import Filled, LeftToRight, Probability, TokenBan
from decode.diffusion.loop import decode, init_state, stream
from dlm.hf.files import read_config
from tests.lib.checkpoints import load_with_mask
from tests.lib.paths import SHARED
from tests.lib.replay import replay
from tests.lib.rounds import make_round

GOLDENS = SHARED / "goldens"
pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason="the traces are not there")


def cases(family, *folders, only="", marks=()):
    for folder in folders:
        for file in sorted((GOLDENS / family / folder).glob("*.npz")):
            if only in file.name and file.name != "forward.npz":
                name = f"{folder}-{file.stem}"
                yield pytest.param(file.parent, file.stem, id=name, marks=marks)


def more_cases(family, *folders, only=""):
    return cases(family, *folders, only=only, marks=pytest.mark.exhaustive)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a checkpoint, once."""
    return functools.cache(lambda path: load_with_mask(path, tmp_path_factory.mktemp("model")))


def read(folder, name):
    """The loop's arguments, and what happened."""
    trace = dict(np.load(folder / f"{name}.npz"))
    return json.loads((folder / f"{name}.json").read_text()), trace


def check_rounds(lm, method, prompt, gen_len, starts, blocks):
    """Decodes, and compares where and what the open block is before every round; the last state.

    Args:
      starts: [R]. Where each round's block starts, in the text.
      blocks: [R, C]. What stood in it.
    """
    first, seen = init_state(lm.cfg, method, [prompt.tolist()], gen_len=gen_len), []

    def look(state):
        tokens, C = np.asarray(state.tokens)[0], blocks.shape[1]
        start = int(state.block_start[0]) // C * C
        seen.append((start, tokens[start : start + C].tolist()))

    look(first)
    for state in stream(lm.params, lm.cfg, method, first):
        look(state)
    assert seen[:-1] == [(int(s), b.tolist()) for s, b in zip(starts, blocks, strict=True)]
    assert int(state.num_forwards[0]) == len(starts)
    return state


# ---- SDAR -----------------------------------------------------------------------------------


def of_sdar(a):
    """The method of the arguments of SDAR's loops."""
    same = ("block_length", "denoising_steps", "stopping_criteria_idx")
    own = ("remasking_strategy", "confidence_threshold")
    given = {name: a[name] for name in (*same, *own) if name in a}
    if "remasking_strategy" not in a:
        method = public.sdar_evaluation(**given, threshold=a["threshold"])
    else:
        method = public.sdar(**given, temperature=a["temperature"])
        # Proposals and their probabilities come with the traces.
        confidence = LeftToRight() if a["remasking_strategy"] == "sequential" else Probability()
        method = method.replace(temperature=None, confidence=confidence)
    return method.replace(constraint=TokenBan(ban_mask=False))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        *cases("sdar", "dense_a", only="greedy"),
        *more_cases("sdar", "dense_b_headdim8", "moe_a", only="greedy"),
    ],
)
def test_sdar_greedy(load, folder, name):
    a, trace = read(folder, name)
    rounds = ~trace["call_is_store"]
    gen_len = len(trace["canvas"]) - len(trace["prompt"])
    lm = load(folder)
    state = check_rounds(
        lm, of_sdar(a), trace["prompt"], gen_len,
        trace["call_start"][rounds], trace["call_tokens"][rounds],
    )  # fmt: skip
    assert np.asarray(state.tokens)[0].tolist() == trace["canvas"].tolist()


@pytest.mark.parametrize(("folder", "name"), cases("sdar", "dense_a", "dense_b_headdim8", "moe_a"))
def test_sdar_rules(folder, name):
    """What was drawn is given, also from the mixture of experts: which of it stays?"""
    a, trace = read(folder, name)
    cfg = read_config(GOLDENS / "sdar" / "dense_a")
    rounds = np.flatnonzero(~trace["call_is_store"])
    calls = [
        (trace["call_start"][i], trace["call_tokens"][i], sampled, prob)
        for i, sampled, prob in zip(rounds, trace["sampled"], trace["sampled_prob"], strict=True)
        # Where MASK was drawn and committed nothing changed; here it is never drawn.
        if (trace["call_tokens"][i] != trace["call_tokens"][i + 1]).any()
    ]
    state = replay(
        cfg, of_sdar(a), trace["prompt"], len(trace["canvas"]) - len(trace["prompt"]), calls
    )
    tokens = np.asarray(state.tokens)[0]
    assert state.has_stopped[0]
    if name.startswith("quirk"):  # overwrites a token of an earlier round, which nothing here does
        (at,) = np.flatnonzero(tokens != trace["canvas"])
        assert (at, tokens[at]) == (14, trace["call_tokens"][1][14 - 8])
    else:
        assert tokens.tolist() == trace["canvas"].tolist()


@pytest.mark.parametrize(("folder", "name"), cases("sdar", "dense_a", "moe_a", only="sampled"))
def test_sdar_confidences_are_of_what_the_filters_leave(folder, name):
    a, trace = read(folder, name)
    names = ("temperature", "top_k", "top_p")
    method = public.sdar(block_length=8, **{name: a[name] for name in names})
    z = jnp.asarray(trace["logits"])
    view = make_round(np.full(z.shape[:2], 0.5)).replace(temperature=jnp.float32(a["temperature"]))
    view = view.replace(proposal=jnp.asarray(trace["sampled"]))
    confidence = confidence_of(method, view, z)
    np.testing.assert_allclose(np.exp(confidence), trace["sampled_prob"], atol=1e-5)


@jax.jit
def confidence_of(method, view, z):
    z = method.constraint.mask_logits(view, z, ())
    given = jnp.take_along_axis(jax.nn.log_softmax(z), view.proposal[..., None], axis=-1)
    view = view.replace(logits=z, log_prob=given[..., 0])
    return method.confidence.measure(view, ())[0].confidence


# ---- Fast-dLLM v2 ---------------------------------------------------------------------------


@struct.dataclass
class StaysMask(TokenBan):
    """A position whose proposal is MASK stays what it is, though it was the surest: public loops.

    Without a ban they write MASK over MASK; if nothing else changes, for ever.
    """

    def init(self, cfg, batch_size, window_len):
        return jnp.full((batch_size, 1), cfg.mask_token_id)

    def accept(self, round, commit, state):
        return commit & (round.proposal != state), state


@pytest.mark.parametrize(
    ("folder", "name"), [*cases("fast_dllm_v2", "a"), *more_cases("fast_dllm_v2", "b_tied")]
)
def test_fast_dllm_v2(load, folder, name):
    a, trace = read(folder, name)
    lm = load(folder)
    prompts = [trace[key].tolist() for key in sorted(trace) if key.startswith("prompt")]
    results = [trace[key].tolist() for key in sorted(trace) if key.startswith("result")]
    lengths = [len(result) - len(prompt) for prompt, result in zip(prompts, results, strict=True)]
    names = ("block_size", "small_block_size", "threshold", "use_block_cache", "stop_token")
    method = public.fast_dllm_v2(**{name: a[name] for name in names})
    method = method.replace(constraint=StaysMask(ban_mask=False))
    state = init_state(lm.cfg, method, prompts, gen_len=lengths)
    state = decode(lm.params, lm.cfg, method, state)
    for b, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        start = int(state.start[b])
        is_stop = [token == a["stop_token"] for token in result[len(prompt) :]]
        end = len(prompt) + (is_stop.index(True) + 1 if any(is_stop) else len(is_stop))
        assert np.asarray(state.tokens)[b, start : start + end].tolist() == result[:end]
    if len(prompts) == 1:
        # A block's first round is the forward that stores the one before it. The prompt's counts
        # only if it predicts a token that was not there.
        P, C = len(prompts[0]), a["block_size"]
        is_free = P > C and P % C > 0
        assert int(state.num_forwards[0]) == len(trace["call_position"]) - is_free


# ---- LLaDA2 ---------------------------------------------------------------------------------


def of_llada2(a):
    """The method of the arguments of LLaDA2's loops."""
    edits = "editing_threshold" in a
    own = ("editing_threshold", "max_post_steps", "num_to_transfer") if edits else ("steps",)
    names = ("block_length", "threshold", "eos_early_stop", *own)
    make = public.llada2_1 if edits else public.llada2
    method = make(**{name: a[name] for name in names if name in a})
    method = method.replace(stop_ids=(a["eos_id"],))
    return method.replace(stopper=Filled()) if edits else method  # that loop decodes all


LLADA2 = ("v20_a", "v20_b_noshared_group1", "v21_a")


def read_llada2(folder, name):
    """The method, and columns of what happened; rounded up to whole blocks."""
    a, trace = read(folder, name)
    P, C = len(trace["prompt"]), a["block_length"]
    return of_llada2(a), trace, -(-(P + a["gen_length"]) // C) * C - P


@pytest.mark.parametrize(("folder", "name"), cases("llada2", *LLADA2))
def test_llada2_rules(folder, name):
    """What the mixture of experts proposes is given."""
    method, trace, gen_len = read_llada2(folder, name)
    cfg = read_config(GOLDENS / "sdar" / "dense_a")  # whose MASK and sizes are the same
    columns = ("call_start", "call_tokens", "call_argmax", "call_prob")
    calls = list(zip(*(trace[column] for column in columns), strict=True))
    state = replay(cfg, method, trace["prompt"], gen_len, calls)
    assert returned(state, trace) == trace["returned"].tolist()
    assert state.has_stopped[0]


def returned(state, trace):
    first = len(trace["prompt"])
    return np.asarray(state.tokens)[0, first : first + len(trace["returned"])].tolist()


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        *cases("llada2", "v20_a"),
        *more_cases("llada2", "v21_a", "v20_b_noshared_group1"),  # a router of another kind
    ],
)
def test_llada2(load, folder, name):
    method, trace, gen_len = read_llada2(folder, name)
    method = method.replace(constraint=StaysMask(ban_mask=False))
    starts, blocks = trace["call_start"], trace["call_tokens"]
    state = check_rounds(load(folder), method, trace["prompt"], gen_len, starts, blocks)
    assert returned(state, trace) == trace["returned"].tolist()
