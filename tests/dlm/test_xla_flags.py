import os
import subprocess
import sys

import pytest

from dlm import xla_flags
from dlm.xla_flags import prefer_cublas
from tests.lib.paths import ROOT

OFF = "--xla_gpu_enable_triton_gemm=false"


@pytest.mark.parametrize(
    ("plugins", "given", "expected"),
    [
        (("xla_cuda13",), None, OFF),
        (("tpu", "xla_cuda12"), "--xla_dump_to=here", f"--xla_dump_to=here {OFF}"),
        (("xla_cuda13",), "--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true"),
        (("tpu",), "--xla_dump_to=here", "--xla_dump_to=here"),
        ((), None, None),
    ],
)
def test_only_where_a_gpu_may_be_and_nobody_decided(monkeypatch, plugins, given, expected):
    def entry_points(group):
        assert group == "jax_plugins"
        return tuple(xla_flags.metadata.EntryPoint(name, "module", group) for name in plugins)

    monkeypatch.setattr(xla_flags.metadata, "entry_points", entry_points)
    environ = {} if given is None else {"XLA_FLAGS": given}
    prefer_cublas(environ)
    assert environ.get("XLA_FLAGS") == expected
    prefer_cublas(environ)
    assert environ.get("XLA_FLAGS") == expected


def test_importing_the_package_is_enough(tmp_path):
    plugin = tmp_path / "plugin-1.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[jax_plugins]\nxla_cuda13 = nowhere\n")
    result = subprocess.run(
        [sys.executable, "-c", "import os, dlm; print(os.environ['XLA_FLAGS'])"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == OFF, result.stderr
