"""Programs that are kept on disk, where, and how compiling is counted."""

import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from dlm import compilation
from dlm.compilation import Compiling, keep_programs, machine
from tests.lib.paths import ROOT

NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def settings():
    """Puts back what a test changes."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_environment_says_where(settings, tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    assert keep_programs(tmp_path, environ={"DLM_PROGRAMS": "off"}) is None
    own = pathlib.Path("x")
    assert keep_programs(tmp_path, environ={"JAX_COMPILATION_CACHE_DIR": "x"}) == own
    assert jax.config.jax_compilation_cache_dir == before  # the tests' own
    for environ, folder, expected in (
        ({"XDG_CACHE_HOME": str(tmp_path / "xdg")}, None, tmp_path / "xdg" / "dlm" / "programs"),
        ({"XDG_CACHE_HOME": str(tmp_path / "xdg")}, tmp_path / "given", tmp_path / "given"),
        ({"DLM_PROGRAMS": str(tmp_path / "said")}, tmp_path / "given", tmp_path / "said"),
    ):
        path = keep_programs(folder, max_bytes=10**6, environ=environ)
        assert path == expected / machine() and path.is_dir()
        assert jax.config.jax_compilation_cache_dir == str(path)
        assert jax.config.jax_compilation_cache_max_size == 10**6
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    assert keep_programs(environ={}) == tmp_path / ".cache" / "dlm" / "programs" / machine()
    with pytest.raises(ValueError, match="max_bytes=0 must be above 0, or DLM_PROGRAMS=off set"):
        keep_programs(max_bytes=0)


PROGRAM = """
import jax, dlm
from dlm.compilation import Compiling
assert dlm.keep_programs(max_bytes={max_bytes}) is not None
with Compiling() as compiling:
    for n in range({first}, {first} + 3):
        jax.jit(lambda x: (x @ x).sum() * n)(jax.numpy.ones((n, n)))
print(compiling.num - compiling.hits, compiling.hits)
"""


def start(folder, first, max_bytes=10**9):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "DLM_PROGRAMS": str(folder)}
    code = PROGRAM.format(first=first, max_bytes=max_bytes)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(n) for n in done.stdout.split()]


@pytest.mark.exhaustive(every=4)
def test_a_second_process_compiles_nothing_and_the_folder_stays_small(tmp_path):
    compiled, read = start(tmp_path, 3)
    assert compiled >= 3
    assert start(tmp_path, 3) == [0, compiled + read]
    size = sum(file.stat().st_size for file in tmp_path.rglob("*-cache"))
    start(tmp_path, 9, max_bytes=size)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*-cache")) <= size


def test_seconds_that_lie_in_each_other_count_once(monkeypatch):
    clock: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    trace, lower, build = compilation._PHASES
    compiling = Compiling()
    for now, event, duration in (
        (2.0, trace, 1.0), (3.0, trace, 0.5), (3.5, trace, 3.0), (4.0, lower, 0.5),
        (9.0, build, 4.0), (9.5, "/jax/something/else", 9.0),
    ):  # fmt: skip
        clock.append(now)
        compiling._measure(event, duration)
    assert compiling.seconds == pytest.approx(3.0 + 0.5 + 4.0)


def test_what_is_compiled_inside_is_counted():
    with Compiling() as outer:
        jax.jit(lambda x: x * 3.25)(jax.numpy.ones(7))
        num = outer.num
        with Compiling() as inner:
            jax.jit(lambda x: x * 4.25)(jax.numpy.ones(7))
    assert num >= 1 and outer.num == num + inner.num and inner.num >= 1
    assert 0 < inner.seconds < outer.seconds
    jax.jit(lambda x: x * 5.25)(jax.numpy.ones(7))
    assert outer.num == num + inner.num  # it is over
