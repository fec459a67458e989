import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource
from dlm.memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def faults(num_bytes):
    block = libc.malloc(num_bytes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for page in range(1000):
        ctypes.memset(block + page * 2**13, 1, 1)
    touched = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    libc.free(block)
    return touched - before

small, large = 2**25, 5 * 2**29
faults(small)
print(faults(small), keep_freed_memory())
for num_bytes in (small, large):
    faults(num_bytes)
    print(faults(num_bytes))
"""


@pytest.mark.exhaustive(every=4)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no glibc")
def test_freed_memory_is_used_again_without_page_faults():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    before, is_kept, small, large = done.stdout.split()
    assert is_kept == "True" and int(small) < 100 < int(before)
    assert int(large) < 100  # more than any threshold that mallopt takes as a number
