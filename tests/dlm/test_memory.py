import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from dlm.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**25, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults(), keep_freed_memory(), faults(), faults())
"""


@pytest.mark.exhaustive(every=4)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no glibc")
def test_freed_memory_is_used_again_without_page_faults():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    before, is_kept, _, after = done.stdout.split()
    assert is_kept == "True" and int(after) < 100 < int(before)
