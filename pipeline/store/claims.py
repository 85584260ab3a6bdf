"""Several processes that fit heads into one folder: none fits what another is fitting, and none brings back a folder.

Claims are record locks on bytes of one file, a byte for each head, so they end with their process. Different heads are
fitted side by side. On a file system without such locks, work may be done twice; the later row of results counts.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from probsurgery.pipeline.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is claimed
    fcntl = None  # type: ignore[assignment]

CLAIMS = ".claims"
_REFUSED = (BlockingIOError, PermissionError)
"""Raised if another process has the lock."""


@contextmanager
def claimed(folder: Path, labels: Mapping[str, str]) -> Iterator[None]:
    """Claim heads in a folder of results: what a message calls them, by what determines them.

    Raises `InputError` if another process is fitting one of them.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = None
    try:
        descriptor = _claim(folder, labels) if fcntl else None
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of all bytes: nobody else has a claim
                if _is_at(descriptor, folder / CLAIMS):
                    (folder / CLAIMS).unlink()
            os.close(descriptor)
        if is_new:
            with suppress(OSError):  # not empty, or removed
                folder.rmdir()


def _claim(folder: Path, labels: Mapping[str, str]) -> int | None:
    """The open file with the claims; None where there are no locks, or no permission for them."""
    while True:
        try:
            descriptor = os.open(folder / CLAIMS, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError:
            return None
        try:
            for key, label in labels.items():
                byte = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
                try:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
                except _REFUSED:
                    advice = "wait for it, or choose another place with --results"
                    raise InputError(f"another process is fitting {label} into {folder}; {advice}") from None
                except OSError:
                    return descriptor
            if _is_at(descriptor, folder / CLAIMS):
                return descriptor
        except InputError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last owner removed it between the two


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def held_open(folder: Path) -> Iterator[None]:
    """Keep a folder from being removed, or written to, by another process in here; for moments only.

    Raises FileNotFoundError if there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if descriptor is not None:
            with suppress(OSError):  # not every file system locks folders
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
