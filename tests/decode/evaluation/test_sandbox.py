"""Programs that mean no good, and each wall by itself."""

import os
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest

from decode.evaluation import sandbox
from decode.evaluation.sandbox import Limits, run_program

WALLS = run_program("").walls  # of this system
needs = lambda wall: pytest.mark.skipif(wall not in WALLS, reason=f"no {wall} on this system")


@pytest.fixture
def secret(tmp_path):
    """A file outside."""
    path = tmp_path / "outside"
    path.write_text("as it was")
    return path


def test_a_right_program_passes():
    outcome = run_program("assert sorted([2, 1]) == [1, 2]\nprint('much' * 10**6)")
    assert outcome.is_passed and outcome.reason == "passed" and "interpreter" in outcome.walls


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError: "),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "killed"),  # before it says that it passed
        ("def f(): f()\nf()", "RecursionError: "),
        ("input()", "EOFError: "),
        ("print(secret)", "NameError: "),
    ],
)
def test_others_do_not(program, reason):
    outcome = run_program(program)
    assert not outcome.is_passed and outcome.reason.startswith(reason), outcome


@pytest.mark.parametrize(
    ("program", "patience", "reason"),
    [
        ("while True: pass", 20, "timeout"),
        ("import time\ntime.sleep(60)", 1, "timeout"),
        (
            "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
            20,
            "killed",
        ),
    ],
)
def test_a_program_without_end_is_ended(program, patience, reason, monkeypatch):
    """By the second of the processor that it may use, or where it does nothing, by the clock."""
    monkeypatch.setattr(sandbox, "_PATIENCE", patience)
    began = time.perf_counter()
    outcome = run_program(program, Limits(cpu_s=1.0))
    assert not outcome.is_passed and outcome.reason == reason
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize("program", ["x = bytearray(2**32)", "x = [0]\nwhile True: x += x"])
def test_memory_is_limited(program):
    assert run_program(program).reason.startswith("MemoryError")


def test_files_are_limited():
    program = "f = open('f', 'wb')\nfor _ in range(100): f.write(bytes(2**20))"
    assert run_program(program, Limits(file_bytes=2**22)).reason.startswith("OSError")


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import multiprocessing as m\np = m.Process(target=print); p.start()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.kill(os.getppid(), 9)",
        "import socket; socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import ctypes; ctypes.CDLL(None)",
        "import ctypes; ctypes.pythonapi.PyOS_FSPath",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (9, 9))",
    ],
)
def test_python_starts_and_reaches_nothing(program):
    outcome = run_program(program)
    assert "refused" in outcome.reason, outcome


@pytest.mark.parametrize(
    "program",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'r+b')",
        "import os; os.open({path!r}, os.O_RDWR)",
        "import pathlib; pathlib.Path({path!r}).write_text('x')",
        "import os; os.remove({path!r})",
        "import os; os.rename({path!r}, 'here')",
        "import os; os.symlink({path!r}, 'link')",
        "import os; os.chdir('/'); open('new file', 'w')",
        "import sqlite3; sqlite3.connect({path!r})",
        "import shutil, os; shutil.rmtree(os.path.dirname({path!r}))",
    ],
)
def test_python_changes_nothing_outside(program, secret):
    outcome = run_program(program.format(path=str(secret)))
    assert not outcome.is_passed and "PermissionError" in outcome.reason, outcome
    assert secret.read_text() == "as it was" and list(secret.parent.iterdir()) == [secret]


def test_a_program_has_its_own_directory_and_nothing_else(monkeypatch):
    monkeypatch.setenv("PASSWORD", "open sesame")
    program = """
    import os, pathlib, tempfile, threading
    assert os.listdir() == [] and "PASSWORD" not in os.environ
    pathlib.Path("made").mkdir()
    with open("made/f", "w") as f: f.write("x")
    with tempfile.TemporaryFile() as f: f.write(b"x")
    os.remove("made/f")
    thread = threading.Thread(target=print)
    thread.start(); thread.join()
    """
    assert run_program(textwrap.dedent(program)).reason == "passed"


def test_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    run_program("open('f', 'w').write('x')")
    assert list(tmp_path.iterdir()) == []


def test_the_main_module_is_the_program():
    program = """
    import dataclasses, typing
    @dataclasses.dataclass
    class A:
        b: "A | None" = None
    assert __name__ == "__main__" and typing.get_type_hints(A)
    """
    assert run_program(textwrap.dedent(program)).reason == "passed"


@pytest.mark.parametrize("limits", [Limits(cpu_s=0.0), Limits(memory_bytes=0)])
def test_limits_without_sense_are_refused(limits):
    with pytest.raises(ValueError, match="must be above 0"):
        run_program("", limits)


# ---- Walls by themselves: what is inside of the sandbox, without Python's own refusals.


def behind(wall: str, program: str, folder: pathlib.Path) -> str:
    """What a program prints behind one wall."""
    inside = pathlib.Path(sandbox.__file__).with_name("sandboxed.py")
    start = f"""
    import importlib.util, os, sys
    spec = importlib.util.spec_from_file_location("sandboxed", {str(inside)!r})
    sandboxed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sandboxed)
    sandboxed.{wall}
    """
    source = textwrap.dedent(start) + textwrap.dedent(program)
    command = [sys.executable, "-IB", "-c", source]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@needs("filter")
@pytest.mark.parametrize(
    "call",
    [
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "__import__('socket').socket()",
        "os.kill(os.getppid(), 0)",
        "os.forkpty()",
    ],
)
def test_the_filter_refuses(call, tmp_path):
    said = behind("filter_calls()", call, tmp_path)
    assert "PermissionError" in said, said


@needs("filter")
def test_the_filter_lets_threads_be(tmp_path):
    program = """
    import threading
    thread = threading.Thread(target=lambda: print("threads"))
    thread.start(); thread.join()
    open("f", "w").write("x")
    """
    assert behind("filter_calls()", program, tmp_path) == "threads\n"


@needs("namespaces")
def test_namespaces_hold_everything_else_away(secret, tmp_path):
    """Also for root: no file outside is written, nobody is reached, nobody is seen."""
    work = tmp_path / "work"
    work.mkdir()
    program = f"""
    import errno, socket
    def fails(call, *codes):
        try: call()
        except OSError as error: return error.errno in codes
    assert fails(lambda: open({str(secret)!r}, "w"), errno.EROFS)
    assert fails(lambda: os.remove({str(secret)!r}), errno.EROFS)
    assert fails(lambda: open("/dev/shm/f", "w"), errno.EROFS)
    network = socket.socket()
    assert fails(lambda: network.connect(("127.0.0.1", 9)), errno.ENETUNREACH)
    assert os.getpid() == 1 and os.listdir("/proc") == [] and os.listdir() == []
    ctypes, call = sandboxed.ctypes, sandboxed._call
    writable = (ctypes.c_uint64 * 4)(0, 1, 0, 0)
    change = lambda: call("syscall", 442, -100, b"/", 0x8000, writable, ctypes.c_size_t(32))
    assert fails(change, errno.EPERM)
    call("unshare", 0x20000)  # mounts of its own, of which the locks are copies, too
    assert fails(change, errno.EPERM)
    assert fails(lambda: call("umount", b"/proc"), errno.EINVAL)
    assert fails(lambda: open({str(secret)!r}, "w"), errno.EROFS)
    assert open({str(secret)!r}).read() == "as it was"
    open("f", "w").write("x")
    try: open("g", "wb").write(bytes(2**21))
    except OSError as error: print(error.errno == errno.ENOSPC)
    """
    said = behind(f"enter_namespaces({str(work)!r}, 2**20)", program, work)
    assert said == "True\n" and list(work.iterdir()) == [] and secret.read_text() == "as it was"


@needs("namespaces")
def test_children_end_with_the_program(tmp_path):
    """Even those that left its session: a namespace ends with its first process."""
    program = """
    import time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        os._exit(0)
    os.wait()
    sys.stdout.flush()
    os._exit(0)
    """
    began = time.perf_counter()
    behind(f"enter_namespaces({str(tmp_path)!r}, 2**20)", program, tmp_path)
    assert time.perf_counter() - began < 30  # its output is closed, so nobody holds it


def test_the_system_says_what_is_missing(monkeypatch, caplog):
    sandbox._warn.cache_clear()
    monkeypatch.setattr(sandbox, "_run", lambda *_: sandbox.Outcome(True, "passed", ("filter",)))
    with caplog.at_level("WARNING", logger="absl"):
        run_program("")
        run_program("")
    (record,) = caplog.records
    assert "without the system's namespaces here" in record.getMessage()
    sandbox._warn.cache_clear()


def test_a_broken_interpreter_is_no_pass(monkeypatch):
    monkeypatch.setattr(sandbox, "_CHILD", pathlib.Path(os.devnull))
    outcome = run_program("")
    assert outcome == sandbox.Outcome(False, "killed", ())
