"""Freed memory is kept: a second allocation of the same size faults no page in."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, threading
from experiments.allocator import keep_freed_memory

print(keep_freed_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
SIZE = 200_000_000

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(SIZE)
    ctypes.memset(block, 1, SIZE)
    libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

for _ in range(3):
    thread = threading.Thread(target=faults)
    thread.start()
    thread.join()
"""


def outcome(**settings):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**kept, **settings}, capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    done, *faults = found.stdout.split()
    return done == "True", [int(count) for count in faults]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise():
    pages = 200_000_000 // os.sysconf("SC_PAGE_SIZE")
    done, faults = outcome()
    if not done:
        pytest.skip("JAX has a plugin for an accelerator here")
    assert max(faults[1:]) < 0.01 * pages
    # Pages may be huge ones where the system says so, but never none.
    _, faults = outcome(MALLOC_ARENA_MAX="8", MALLOC_MMAP_THRESHOLD_="1000000")
    assert min(faults[1:]) > 0.001 * pages
