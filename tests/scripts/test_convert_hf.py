"""`scripts.convert_hf` says what a directory holds, writes it again, refuses what is none."""

import pytest

import dlm
from dlm.hf.files import read_config
from scripts.convert_hf.describe import as_size, describe, parse_mesh
from tests.lib.mains import run_main
from tests.lib.paths import GOLDEN


def test_what_each_device_would_hold():
    cfg = read_config(GOLDEN / "qwen2_small", "bfloat16")
    text = describe(GOLDEN / "qwen2_small", cfg, 10**9, {"fsdp": 2, "tensor": 4})
    assert "qwen2" in text and "qkv_bias=True" in text and "38 tensors" in text
    assert "on fsdp 2 x tensor 4" in text
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("| ")}
    assert "[3, 1, 24, 48]" in lines["layers/attention/q"]
    assert "[3, 2, 24, 48]" in lines["layers/attention/k"]  # 2 heads on 4 shards: on all of them
    assert "2.25 KiB" in lines["embed"]  # 96 * 96 / 8 numbers of two bytes
    assert "per device" not in describe(GOLDEN / "qwen2_small", cfg, 10**9, {})


def test_sizes():
    assert [as_size(n) for n in (0, 1023, 1024, 3 * 2**29, 2**41)] == [
        "0 B", "1023 B", "1.00 KiB", "1.50 GiB", "2048.00 GiB",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["rows=2", "fsdp", "fsdp=0", "fsdp=two", "fsdp=-1"])
def test_meshes_that_are_none(text):
    with pytest.raises(ValueError, match="which must be data, fsdp or tensor"):
        parse_mesh([text])


def test_command(tmp_path):
    source = f"--checkpoint={GOLDEN / 'llada_small'}"
    out = run_main("scripts.convert_hf", source, "--dry_run", f"--out={tmp_path / 'copy'}")
    assert "llada" in out and not (tmp_path / "copy").exists()
    run_main("scripts.convert_hf", source, f"--out={tmp_path / 'copy'}", "--dtype=bfloat16")
    assert dlm.load(tmp_path / "copy").cfg.dtype == "bfloat16"
    for arguments, message in (
        ((source,), "--out='' must name the folder to write"),
        ((source, "--dtype=half"), "--dtype='half' must be one of"),
        ((f"--checkpoint={tmp_path / 'none'}", "--dry_run"), "is not a directory"),
    ):
        error = run_main("scripts.convert_hf", *arguments, code=1)
        assert message in error and "Traceback" not in error
