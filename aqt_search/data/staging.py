"""A folder to write in, beside where the result will lie, of which killed processes leave none."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

_PREFIX = "incomplete."


@contextlib.contextmanager
def staging_folder(parent: Path) -> Generator[Path]:
    """A fresh folder in `parent`, deleted at the end; those that killed processes left are, too.

    All that are at work hold a shared lock (`flock`) on `parent`; who gets it alone knows that
    there is no other. Where the file system has no such locks nothing is deleted.

    Raises:
        OSError: the folder cannot be made.
    """
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in parent.glob(_PREFIX + "*"):
                shutil.rmtree(left, ignore_errors=True)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as staging:
            yield Path(staging)
    finally:
        os.close(descriptor)
