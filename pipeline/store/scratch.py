"""Scratch folders for features on disk. What a killed process leaves in one is removed by the next run."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import Timeout

from probsurgery.pipeline.errors import ProbsurgeryError, first_line
from probsurgery.pipeline.store.lock import system_lock

_PREFIX = "probsurgery-scratch-"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder in the system's one for temporary files (`TMPDIR`), removed at the end.

    A lock on a file beside it ends with the process, however that ends. So the lock of a folder that a killed process
    left is free, and such folders are removed first.
    """
    advice = "point TMPDIR to a folder with room for the features"
    try:
        remove_abandoned()
        folder = Path(tempfile.gettempdir(), f"{_PREFIX}{uuid4().hex}")
        lock = system_lock(_lock_of(folder))
        with suppress(OSError):  # without locks, what a kill leaves stays
            lock.acquire()
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise ProbsurgeryError(f"no scratch folder can be made: {first_line(error)}; {advice}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _lock_of(folder).unlink(missing_ok=True)
        lock.release()


def remove_abandoned() -> None:
    """Remove this user's scratch folders whose processes have ended."""
    with suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            with suppress(OSError, Timeout):
                if folder.is_dir() and _is_own(folder) and _is_own(_lock_of(folder)):
                    with system_lock(_lock_of(folder)):
                        shutil.rmtree(folder, ignore_errors=True)
                        _lock_of(folder).unlink()


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _is_own(path: Path) -> bool:
    """Whether a file or folder, which is no link, is this user's. Raises an OSError if it does not exist."""
    status = os.lstat(path)
    return not stat.S_ISLNK(status.st_mode) and (not hasattr(os, "getuid") or status.st_uid == os.getuid())
