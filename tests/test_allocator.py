from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

BLOCK = 2**26
FAULTS_OF_TEN_BLOCKS = f"""
import ctypes, resource, sys
from lmrl_env.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
counts = []
for _ in range(11):
    block = libc.malloc({BLOCK})
    ctypes.memset(block, 1, {BLOCK})
    libc.free(block)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(counts[-1] - counts[0])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a property of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    faults = {
        choice: int(subprocess.check_output([sys.executable, "-c", FAULTS_OF_TEN_BLOCKS, choice]))
        for choice in ("keep", "return")
    }
    assert faults["return"] >= 10 * BLOCK / resource.getpagesize()
    assert faults["keep"] < 100
