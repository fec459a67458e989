import pytest

from dlm import xla_flags
from dlm.xla_flags import prefer_cublas

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
