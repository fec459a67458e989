"""The planner: what it reads from compiled programs, its meshes and floors; and one whole plan."""

import json
import os
import subprocess
import sys

import pytest

from dlm.params import num_params
from dlm.presets import PRESETS
from scripts.plan.collectives import collectives
from scripts.plan.meshes import decoding_meshes, mesh_name, mesh_of_name, training_meshes
from tests.lib.commands import needs_libtpu, run
from tests.lib.paths import ROOT

PROGRAM = """\
HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%layer (p: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %r = bf16[2,4]{1,0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  ROOT %t = (s32[], bf16[2,4]) tuple(%i, %r)
}

%until (p: (s32[], bf16[2,4])) -> pred[] {
  %constant.1 = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%no (p: bf16[2,4]) -> bf16[2,4] {
  %w = (s32[], bf16[2,4]) while(%t), condition=%until, body=%layer
}

%yes (p: bf16[2,4]) -> bf16[2,4] {
  %g = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8]
  %h = f32[1,4]{1,0} reduce-scatter(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%round (p: bf16[2,4]) -> bf16[2,4] {
  %c = bf16[2,4] conditional(%pred, %x, %x), branch_computations={%no, %yes}
  %m = s32[16]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

%done (p: bf16[2,4]) -> pred[] {
  ROOT %n = pred[] not(%x)
}

ENTRY %main (p: bf16[2,4]) -> bf16[2,4] {
  ROOT %w = bf16[2,4] while(%x), condition=%done, body=%round
}
"""


def in_a_process(code, *arguments):
    """`scripts.plan.aot` changes what JAX looks for, so it stays out of this process."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_transfers_are_counted_as_often_as_they_run():
    found = {move.op: move for move in collectives(PROGRAM)}
    assert found.keys() == {"all-reduce", "all-gather", "reduce-scatter", "collective-permute"}
    expected = {  # chips, branch, times, bytes through a chip's links
        "all-reduce": (4, 0, 7, 7 * 2 * 3 / 4 * 16),
        "all-gather": (4, 1, 1, 3 / 4 * 64),
        "reduce-scatter": (2, 1, 1, 1 / 2 * 2 * 16),
        "collective-permute": (2, -1, 1, 64),
    }
    for op, (group, branch, times, moved) in expected.items():
        move = found[op]
        assert (move.group, move.branch, move.times) == (group, branch, times)
        assert move.bytes_moved == pytest.approx(moved)


def test_every_chip_trains_on_rows_of_its_own():
    sizes = [
        [list(dict(mesh).values()) for mesh in training_meshes(chips, 64)] for chips in (16, 256)
    ]
    assert sizes == [[[16, 1], [8, 2], [4, 4]], [[64, 4], [32, 8], [16, 16]]]
    with pytest.raises(ValueError, match=r"data\.batch_size=7 cannot be divided among 256 chips"):
        list(training_meshes(256, 7))


def test_meshes_use_all_chips_and_no_more_rows_than_there_are():
    cfg = PRESETS["llada_8b"]
    of_one, of_eight, large, idle = (
        [
            {axis: size for axis, size in mesh if size > 1}
            for mesh in decoding_meshes(cfg, chips, batch)
        ]
        for chips, batch in ((16, 1), (16, 8), (256, 64), (256, 2))
    )
    assert cfg.n_heads == 32
    assert of_one == [{"tensor": 16}]
    assert of_eight == [{"tensor": 16}, *({"data": d, "tensor": 16 // d} for d in (2, 4, 8))]
    assert large == [{"data": d, "tensor": 256 // d} for d in (8, 16, 32, 64)]
    assert idle == [{"data": 8, "tensor": 32}, {"data": 2, "tensor": 32, "sequence": 4}]


def test_keys_name_cases():
    mesh = ("data", 2), ("tensor", 8)
    for name, axes in (("data 2 x tensor 8", mesh), ("one chip", ())):
        assert mesh_of_name(name) == axes and mesh_name(axes) == name
    assert mesh_of_name(mesh_name((*mesh, ("sequence", 1)))) == mesh


@pytest.mark.exhaustive(every=4)
def test_lengths_that_a_model_has_no_room_for_are_refused(tmp_path):
    said = run("scripts.plan.pod", "--preset=tiny", f"--out={tmp_path}", ok=False)
    assert "error: prompt_len=3840 and gen_len=256 must be at most the model's max_seq_len" in said
    assert "Traceback" not in said


def moves_of_experts(moves, cfg):
    """Transfers that have both dimensions of an expert's matrix."""
    wanted = {cfg.d_model, cfg.experts.d_ff}
    dims = lambda move: {
        int(d) for d in move["shape"].partition("[")[2].rstrip("]").split(",") if d
    }
    return [move for move in moves if wanted <= dims(move)]


def test_experts_stay_where_they_are_in_the_plans_of_the_docs():
    """16 billion parameters on 16 chips: a sixteenth each, or more rows and fewer shards."""
    cfg = PRESETS["llada2_mini"]
    plans = json.loads((ROOT / "docs" / "pods.json").read_text())["cases"]
    ours = {key: found for key, found in plans.items() if "llada2_mini" in key}
    assert {key.split(" | ")[0] for key in ours} == {"v5e:4x4", "v6e:4x4"}
    page = (ROOT / "docs" / "pods.md").read_text()
    for key, found in ours.items():
        if "refused" in found:
            continue
        tensor = dict(mesh_of_name(key.split(" | ")[2]))["tensor"]
        assert found["weights"] < 1.1 * num_params(cfg) * 2 / tensor, key
        assert not moves_of_experts(found["collectives"], cfg), key
        # A round moves what tokens are, not what experts are.
        assert found["moved"] < 2 * cfg.d_model * cfg.experts.d_ff * cfg.experts.num_experts, key
        assert key.split(" | ")[1] in page


@needs_libtpu
@pytest.mark.exhaustive
@pytest.mark.parametrize("axes", [{"tensor": 16}, {"data": 2, "tensor": 8}], ids=str)
def test_no_expert_travels(axes):
    """The decoding loop of LLaDA2.0-mini, of three layers, as compiled for a slice.

    Rows and lengths of which no product is an expert's width.
    """
    code = """
import dataclasses, json, sys
from scripts.plan import aot
from decode.diffusion.components import BlockCausal, FixedBlocks, Threshold
from decode.diffusion.loop import DiffusionMethod
from dlm.presets import PRESETS
from dlm.sharding import make_mesh
cfg = PRESETS["llada2_mini"]
cfg = dataclasses.replace(cfg, n_layers=3, pattern=cfg.pattern[:3])
mesh = make_mesh(**json.loads(sys.argv[1]), devices=aot.devices_of("v5e:4x4"))
method = DiffusionMethod(FixedBlocks(32, aligned=True), BlockCausal(32), rule=Threshold(0.9))
print(json.dumps(aot.decoding(method, cfg, mesh, batch_size=6, prompt_len=288, gen_len=64)))
"""
    found = in_a_process(code, json.dumps(axes))
    cfg = PRESETS["llada2_mini"]
    assert found["collectives"] and not moves_of_experts(found["collectives"], cfg)
    expert = 2 * cfg.d_model * cfg.experts.d_ff
    gathered = [m for m in found["collectives"] if m["op"] == "all-gather" and m["branch"] != 1]
    assert all(move["num_bytes"] < expert for move in gathered), gathered


@needs_libtpu
@pytest.mark.exhaustive
def test_meshes_lie_on_slices_of_any_kind():
    """Axes that no dimension of the slice has the size of."""
    code = """
import json
from scripts.plan import aot
from dlm.sharding import make_mesh
print(json.dumps([
    make_mesh(**axes, devices=aot.devices_of(target)).devices.size
    for target in ("v5e:4x4", "v6e:4x4", "v5p:2x2x4")
    for axes in (dict(tensor=16), dict(data=2, tensor=8), dict(fsdp=8, tensor=2))
]))
"""
    assert in_a_process(code) == [16] * 9


@needs_libtpu
@pytest.mark.exhaustive
def test_a_plan_of_llada_8b(tmp_path):
    """No full logits and no cache travel between chips; a second call compiles nothing."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [
        sys.executable, "-m", "scripts.plan.pod", "--slices=v5e:2x2", "--batch=1", "--recipes=",
        f"--out={tmp_path}",
    ]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    plan = json.loads((tmp_path / "pods.json").read_text())
    ((key, found),) = plan["cases"].items()
    assert key == "v5e:2x2 | llada_8b, batch 1 | tensor 4"
    assert found["full_logits"] == []
    assert 3.7 < found["weights"] / 2**30 < 3.8 and found["cache"] == 2**31 // 4
    total = found["weights"] + found["cache"] + found["other"] + found["temporaries"]
    assert total == found["needed"] < 8 * 2**30
    vocab, slots = PRESETS["llada_8b"].vocab_size, 4096
    for move in found["collectives"]:
        dims = [int(d) for d in move["shape"].partition("[")[2].rstrip("]").split(",") if d]
        assert vocab not in dims and vocab // 4 not in dims, move
        assert move["op"] != "all-gather" or slots not in dims, move
    assert found["round_ms"] > 1e3 * (found["weights"] + found["cache"]) / 819e9 * 0.9
    assert "| v5e:2x2 | llada_8b, batch 1 | tensor 4 * | yes " in (tmp_path / "pods.md").read_text()
    assert plan["commands"] == [" ".join(["python -m scripts.plan.pod", *command[3:]])]
    assert (tmp_path / "pods.png").read_bytes().startswith(b"\x89PNG")
    command[3] = "--slices=v5e:3x7"
    wrong = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert wrong.returncode == 1 and "error: slice 'v5e:3x7' cannot be" in wrong.stderr
