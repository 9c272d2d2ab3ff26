"""Compiled programs that are kept on disk, for the points of a sweep and for when it goes on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

from aqt_search.training.storage import in_bucket


def _processor() -> str:
    """A name for this kind of processor and what it can do."""
    told = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):  # Linux alone has it
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = ("model name", "flags", "CPU part", "Features")
        told += sorted({line for line in lines if line.startswith(names)})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


# Above it JAX deletes what was used least; given any size, it locks the folder.
_LARGEST_SHARED = 2**36


def keep_compiled(folder: Path, shared: bool = False) -> None:
    """Keeps compiled programs in a folder, unless JAX keeps them elsewhere already.

    The points of a sweep, seeds above all, compile the same programs. Every kind of processor has a
    folder of its own within, as JAX does not tell them apart: a workdir may move between machines.
    Those of a workdir in a bucket are kept in the user's cache folder: JAX reads and writes them
    while it compiles.
    With `shared` several processes may read and write there at once.
    """
    if in_bucket(folder):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "aqt_search"
        folder /= "compiled"
    if jax.config.jax_compilation_cache_dir is None:
        own = folder.absolute() / ("shared" if shared else "") / _processor()
        jax.config.update("jax_compilation_cache_dir", str(own))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        if shared:  # else JAX writes in place, without a lock
            jax.config.update("jax_compilation_cache_max_size", _LARGEST_SHARED)
