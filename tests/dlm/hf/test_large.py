"""Published directories that are written again, and one that is too large to be held twice."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from dlm.hf.files import format_for, raw_config, read_config
from dlm.hf.saving import convert_hf, write_tensors
from dlm.hf.weights import expected_tensors, load_params
from dlm.presets import PRESETS
from tests.lib.paths import GOLDEN, ROOT

NAMES = ("llada_small", "dream_small")


@pytest.mark.parametrize("name", NAMES)
def test_convert_changes_dtype_and_files_only(tmp_path, name):
    convert_hf(GOLDEN / name, tmp_path / "copy", "bfloat16", shard_bytes=50_000)
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    cfg, copy_cfg = read_config(GOLDEN / name), read_config(tmp_path / "copy")
    assert copy_cfg == dataclasses.replace(cfg, dtype="bfloat16")
    params, copy = load_params(GOLDEN / name, copy_cfg), load_params(tmp_path / "copy", copy_cfg)
    jax.tree.map(np.testing.assert_array_equal, params, copy)
    raw, copied = (
        json.loads((path / "config.json").read_text())
        for path in (GOLDEN / name, tmp_path / "copy")
    )
    assert {k for k in raw | copied if raw.get(k) != copied.get(k)} <= {"torch_dtype", "dtype"}
    with pytest.raises(FileExistsError, match="must be a new or an empty directory"):
        convert_hf(GOLDEN / name, tmp_path / "copy")


def test_convert_copies_what_lies_beside(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llada_small", source)
    (source / "LICENSE").write_text("free")
    (source / "chat_template.jinja").write_text("{{ x }}")
    (source / "weights.bin").write_bytes(b"old")
    convert_hf(source, tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"LICENSE", "chat_template.jinja", "model.safetensors"} <= names
    assert "weights.bin" not in names
    next(source.glob("*.safetensors")).write_bytes(b"broken")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        convert_hf(source, tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "copy"}


MEASURED_LOAD = """
import pathlib, sys, threading, time
import jax
from dlm.hf.weights import load_params
from dlm.hf.files import read_config
from dlm.sharding import make_mesh
from tests.lib.paths import GOLDEN, ROOT

def used():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    global peak
    while True:
        peak = max(peak, used())
        time.sleep(0.001)

cfg = read_config(sys.argv[1])
jax.device_put(0.0, jax.devices()[-1]).block_until_ready()
before = peak = used()
threading.Thread(target=watch, daemon=True).start()
params = load_params(sys.argv[1], cfg, make_mesh(fsdp=2, tensor=4))
size = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
print(peak - before, size)
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_model_of_eight_billion_shapes_loads_in_bounded_memory(tmp_path):
    """LLaDA-8B's shapes, eight layers of them: the arrays, and at most 1.5 files beside them."""
    cfg = dataclasses.replace(PRESETS["llada_8b"], n_layers=8)
    form, root = format_for(cfg), tmp_path / "model"
    root.mkdir()
    (root / "config.json").write_text(json.dumps(raw_config(cfg, form)))
    shapes = dict(expected_tensors(cfg, form))
    write_tensors(root, cfg, form, lambda n: np.ones(shapes[n], cfg.jnp_dtype), shard_bytes=10**9)
    files = [path.stat().st_size for path in root.glob("*.safetensors")]
    assert sum(files) > 4 * 10**9
    done = subprocess.run(
        [sys.executable, "-c", MEASURED_LOAD, str(root)],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    used, size = map(int, done.stdout.split())
    assert sum(files) * 0.99 < size < 1.01 * sum(files)
    print(f"{used - size:,} bytes beside the arrays; the largest file has {max(files):,}")
    assert used - size < 1.5 * max(files)
