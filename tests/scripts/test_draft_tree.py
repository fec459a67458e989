"""A tree for a target and its draft, found by a command."""

import json

import jax.numpy as jnp
import pytest

import dlm
from decode.speculative import measured_tree
from decode.speculative.tree import TreeShape
from tests.lib.mains import run_main
from tests.lib.untrained import byte_lm


@pytest.mark.exhaustive
def test_a_tree_is_printed_and_written(tmp_path, monkeypatch):
    """Where drafts cost nothing, it has as many nodes as there may be."""

    def with_costs(params, cfg, method, start):
        num = 1 + len(method.controller.widths_of(method.drafter))
        return method.replace(controller=method.controller.replace(costs=jnp.ones(num)))

    monkeypatch.setattr(measured_tree, "with_costs", with_costs)
    model, out, prompts = tmp_path / "model", tmp_path / "tree.json", tmp_path / "prompts.txt"
    dlm.save(model, byte_lm())
    prompts.write_text("Who is next?\n\nWho was first?\n")
    flags = [f"--target={model}", f"--draft={model}", f"--prompts={prompts}", f"--out={out}"]
    sizes = ["--gen_len=12", "--max_nodes=4", "--max_depth=2"]
    said = run_main("scripts.draft_tree", *flags, *sizes)
    assert "accepted by rank: 1.000 0.000" in said
    assert "a round over   4 nodes:  1000.00 ms" in said
    shape = TreeShape(**{k: tuple(v) for k, v in json.loads(out.read_text()).items()})
    assert f"best tree: {shape.num_nodes} nodes, depth {shape.depth}, 3.0 tokens/s" in said
    assert shape.depth == 2
    said = run_main("scripts.draft_tree", *flags[:2], "--prompts=nowhere", code=1)
    assert "error: " in said and "nowhere" in said
