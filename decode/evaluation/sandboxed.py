"""What runs inside of the sandbox: locks itself in, then runs a program. Needs only Python itself.

`decode.evaluation.sandbox` starts this file as a process, in the program's directory, with a JSON
object as its input: the program, its limits, the descriptor `ends` to which the end is written, and
a secret that only it and who started it know. It writes

    namespaces filter interpreter       in the first line: the walls that stand
    <secret>"passed"                    or what was raised, as JSON
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
import types
from typing import Any

# Of Linux: sched.h, mount.h, prctl.h, fcntl.h.
_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NET = (
    0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_NO_SUID, _NO_DEVICES, _RECURSIVE, _PRIVATE = 2, 4, 1 << 14, 1 << 18
_MOUNT_SETATTR, _READ_ONLY = 442, 1
_AT_CWD, _AT_RECURSIVE = -100, 0x8000
_SET_PARENT_DEATH, _SET_FILTER, _SET_NO_NEW_PRIVILEGES = 1, 22, 38
_MOST_FILES = 4096

# Of seccomp.h and bpf_common.h; a machine's number, its `clone`, and what is refused: fork, vfork,
# execve, execveat, kill, ptrace, process_vm_writev, socket, socketpair, io_uring_setup.
_CALLS = {
    "x86_64": (0xC000003E, 56, (57, 58, 59, 322, 62, 101, 311, 41, 53, 425)),
    "aarch64": (0xC00000B7, 220, (221, 281, 129, 117, 271, 198, 199, 425)),
}
_CLONE_3, _CLONE_THREAD = 435, 0x10000
_LOAD, _IF_EQUAL, _IF_ANY_BIT, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16  # where `seccomp_data` has them

# Events of Python, see its "audit events table".
_REFUSED = (
    "socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system",
    "os.kill", "pty.", "ctypes.dlopen", "ctypes.dlsym", "ctypes.call_function",
    "signal.pthread_kill", "syslog.", "fcntl.", "resource.", "code.__new__",
)  # fmt: skip
_CHANGES = (
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod",
    "os.chown", "os.truncate", "os.utime", "os.setxattr", "os.removexattr", "sqlite3.connect",
    "shutil.rmtree", "shutil.move",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    told = json.load(sys.stdin)
    ends: int = told["ends"]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    here, walls = os.getcwd(), []  # noqa: PTH109 (needs no import)
    for name, build in (
        ("namespaces", lambda: enter_namespaces(here, told["file_bytes"])),
        ("filter", filter_calls),
    ):
        try:
            build()
        except (OSError, AttributeError, KeyError):  # forbidden, or another system
            continue
        walls.append(name)
    set_limits(told)
    refuse(here)
    os.write(ends, " ".join([*walls, "interpreter\n"]).encode())

    module = sys.modules["__main__"] = types.ModuleType("__main__")
    said = "passed"
    try:
        exec(compile(told.pop("program"), "<program>", "exec"), module.__dict__)
    except BaseException as error:  # SystemExit too
        said = f"{type(error).__name__}: {error}"[:1000]
    os.write(ends, f"{told['secret']}{json.dumps(said)}\n".encode())
    os._exit(0)


def _call(name: str, *arguments: Any) -> None:
    """A function of the C library; OSError if it fails, AttributeError if there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def enter_namespaces(here: str, file_bytes: int) -> None:
    """Leaves everything outside behind. Who returns is a child, which dies with this process.

    Args:
      here: the directory that can be written, which becomes an empty one in memory.
      file_bytes: its size.
    """
    user, group = os.getuid(), os.getgid()

    def write(name: str, text: str) -> None:
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123 (needs no import)
            file.write(text)

    def mount(target: str, options: str) -> None:
        flags = ctypes.c_ulong(_NO_SUID | _NO_DEVICES)
        _call("mount", b"tmpfs", target.encode(), b"tmpfs", flags, options.encode())

    _call("unshare", _NEW_USER | _NEW_MOUNTS | _NEW_PIDS | _NEW_NET | _NEW_IPC)
    write("setgroups", "deny")
    write("uid_map", f"{user} {user} 1")
    write("gid_map", f"{group} {group} 1")
    _call("mount", None, b"/", None, ctypes.c_ulong(_RECURSIVE | _PRIVATE), None)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _call("syscall", _MOUNT_SETATTR, _AT_CWD, b"/", _AT_RECURSIVE, attributes, size)
    mount(here, f"size={file_bytes},nr_inodes={_MOST_FILES},mode=0700")
    mount("/proc", "size=4096,nr_inodes=2,mode=0500")  # where processes outside would be seen
    os.chdir(here)
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)
    _call("prctl", _SET_PARENT_DEATH, signal.SIGKILL)
    _call("unshare", _NEW_USER)  # without rights in the namespaces around it: they stay as they are


def filter_calls() -> None:
    """Has the kernel refuse this process and its threads some system calls."""
    machine, clone, refused = _CALLS[platform.machine()]
    steps = [
        (_LOAD, 0, 0, _MACHINE),
        (_IF_EQUAL, 1, 0, machine),  # so many steps are skipped if so, and if not
        (_RETURN, 0, 0, _FAIL | 1),
        (_LOAD, 0, 0, _NUMBER),
        (_IF_AT_LEAST, 0, 1, 1 << 30),  # the same calls under other numbers
        (_RETURN, 0, 0, _FAIL | 1),
    ]
    for number in refused:
        steps += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _FAIL | 1)]
    steps += [
        (_IF_EQUAL, 0, 1, _CLONE_3),  # not there, so that `clone` is used, whose flags are seen
        (_RETURN, 0, 0, _FAIL | 38),
        (_IF_EQUAL, 0, 3, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_IF_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _FAIL | 1),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    zero = ctypes.c_ulong(0)
    _call("prctl", _SET_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), zero, zero, zero)
    _call("prctl", _SET_FILTER, ctypes.c_ulong(2), program, zero, zero)


def set_limits(told: dict[str, Any]) -> None:
    """What the process may use, see `decode.evaluation.sandbox.Limits`."""
    # The first process of a namespace is not ended by signals that it does not handle.
    signal.signal(signal.SIGXCPU, lambda *_: os._exit(128 + signal.SIGXCPU))
    cpu_s = math.ceil(told["cpu_s"])
    limits = {
        resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),  # the second one kills
        resource.RLIMIT_AS: (told["memory_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (told["file_bytes"],) * 2,
        resource.RLIMIT_CORE: (0, 0),
    }
    for limit, (soft, hard) in limits.items():
        most = resource.getrlimit(limit)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(limit, (soft, hard))


def refuse(here: str) -> None:
    """Makes this interpreter raise PermissionError where a program reaches outside."""
    realpath, inside = os.path.realpath, os.path.join(os.path.realpath(here), "")  # noqa: PTH118

    def is_outside(path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)) or path == os.devnull:
            return False  # a descriptor, or an option
        return not os.path.join(realpath(os.fsdecode(path)), "").startswith(inside)  # noqa: PTH118

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITES and is_outside(path):
                raise PermissionError(f"{path!r} is outside of the program's directory")
        elif event.startswith(_REFUSED):
            raise PermissionError(f"{event} is refused")
        elif event in _CHANGES and any(map(is_outside, arguments)):
            raise PermissionError(f"{event} is refused outside of the program's directory")

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
