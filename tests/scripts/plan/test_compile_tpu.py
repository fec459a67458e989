"""Kernels, loops and training steps compile for TPUs, ahead of time, where libtpu is installed."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.lib.commands import needs_libtpu
from tests.lib.paths import ROOT
from tests.lib.tiers import more


def compile_for(target, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_OPTIMIZATION_LEVEL": "O1"}  # O2 takes twice as long
    return subprocess.run(
        [sys.executable, "-m", "scripts.plan.compile_tpu", f"--target={target}", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540,
    )  # fmt: skip


@needs_libtpu
@pytest.mark.exhaustive(every=4)
def test_a_tree_and_what_only_training_uses_compile():
    """One shape of each kernel; the next test has them all."""
    done = compile_for("v5e:2x2", "--only=llama3_8b tree,training", "--loops=")
    assert done.returncode == 0, done.stderr[-2000:]
    programs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [program["pallas_calls"] for program in programs] == [1] * 5 + [3, 1]
    assert all(program["full_logits"] == [] for program in programs)


@needs_libtpu
@pytest.mark.parametrize("target", more("v5e:2x2", "v6e:2x2", "v5p:2x2x1"))
def test_everything_compiles(target):
    models = ["llada_8b", "dream_7b"]
    done = compile_for(target, f"--loops={','.join(models)}")
    assert done.returncode == 0, done.stderr[-2000:]
    programs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kernels = [p for p in programs if "vmem" in p]
    training = {p["program"]: p for p in programs if p["program"].startswith("training")}
    loops = {p["program"]: p for p in programs if p["program"].startswith("decode")}
    assert len(kernels) >= 10 and set(loops) == {f"decode: {name}" for name in models}
    for program in kernels:
        assert program["pallas_calls"] == 1 and program["vmem"] < 16 * 2**20, program
    for program in loops.values():
        # Attention of a refresh and of a block step, and the vocabulary; the cache stays in place.
        assert program["pallas_calls"] == 3, program
        assert program["alias_bytes"] >= program["cache_bytes_per_chip"], program
        assert program["argument_bytes"] + program["temp_bytes"] < 16 * 2**30, program
    # Forward and two backward kernels; the forward kernel, and tiles in XLA instead of logits.
    assert training["training: block_diffusion_attention"]["pallas_calls"] == 3
    assert training["training: unembed_loss"]["pallas_calls"] == 1
    for program in programs:
        assert program["full_logits"] == [], program


@needs_libtpu
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("recipe", "target", "state_bytes"),
    [
        # What is learned and its two moments, float32, over all chips.
        ("llada_8b_dparallel", "v5e:2x4", 12 * 335_544_320 // 8),
        ("llada_8b_sft", "v5p:2x4x4", 12 * 8_015_581_184 // 32),
    ],
)
def test_training_8b_fits(recipe, target, state_bytes):
    done = compile_for(target, f"--recipes={recipe}")
    assert done.returncode == 0, done.stderr[-2000:]
    (program,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert program["needed_bytes"] < 0.95 * program["hbm_bytes"], program
    # Nothing that is learned lies whole on a chip but the norms, and all of it is updated in place.
    assert 0 <= program["alias_bytes"] - state_bytes < 4 * 2**20, program
    assert program["full_logits"] == [], program
    # What is kept for the backward pass, layer by layer; then the head, the only gathered weight.
    first, *others = program["largest"]
    assert re.match(r"bf16\[32,\d+,\d+,4096\]", first), program
    assert not any(re.search(r"\[32,.*(4096,4096|4096,12288|12288,4096)", x) for x in others)


@needs_libtpu
@pytest.mark.exhaustive
def test_collecting_with_8b_fits():
    done = compile_for("v5e:2x2", "--recipes=llada_8b_learn2pd")
    assert done.returncode == 0, done.stderr[-2000:]
    programs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [p["program"] for p in programs] == [
        "answers: llada_8b_learn2pd", "rounds: llada_8b_learn2pd"
    ]  # fmt: skip
    for program in programs:
        assert program["needed_bytes"] < 0.5 * program["hbm_bytes"], program
        assert program["full_logits"] == [] and program["pallas_calls"] == 2, program


@needs_libtpu
@pytest.mark.exhaustive
def test_a_slice_of_another_size_than_the_mesh_is_refused():
    done = compile_for("v5e:2x2", "--recipes=llada_8b_dparallel")
    assert done.returncode != 0 and "has 4 devices and llada_8b_dparallel is for" in done.stderr


@needs_libtpu
@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("v99:2x2", (), "--target: slice 'v99:2x2' must begin with one of v4,"),
        *more(
            (
                "v5e:2x2",
                ("--only=tree,attn",),
                "--only: no kernel's name contains 'attn'",
            ),
            ("v5e:2x2", ("--only=tree", "--recipes=llada_8b_sft"), "--only: names kernels, and"),
        ),
    ],
)
def test_what_makes_no_sense_is_refused(target, options, message):
    done = compile_for(target, *options)
    assert done.returncode != 0 and message in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
