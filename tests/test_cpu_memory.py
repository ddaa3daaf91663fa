import os
import platform
import subprocess
import sys

import pytest

# Pages touched by 16 pieces of 8 MB, for the first and, after all were freed, for the second time.
FAULTS = """
import ctypes, resource
from kernels.cpu_memory import keep_freed_memory
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [ctypes.c_void_p(library.malloc(2**23)) for _ in range(16)]
    for piece in pieces:
        ctypes.memset(piece, 1, 2**23)
    for piece in pieces:
        library.free(piece)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
if {keep}:
    assert keep_freed_memory()
print(faults(), faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library can be told")
def test_freed_memory_is_used_again_without_page_faults():
    def faults(keep: bool) -> list[int]:
        usual = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        run = subprocess.run(
            [sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True, env=usual
        )
        return [int(word) for word in run.stdout.split()]

    first, *later = faults(keep=True)
    assert max(later) < first / 10
    first, *later = faults(keep=False)
    assert min(later) > first / 2  # else this file is not needed any more
