"""One writer to a cache: a lock of the system, and who holds it. Whether a folder can be written at all."""

import datetime
import errno
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.files import open_file, refuse_links, write_atomically
from probsurgery.pipeline.texts import plain

LOCK, OWNER = ".lock", ".owner"
_ENOTSUPP = 524
"""Of NFS on Linux; Python has no name for it."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, _ENOTSUPP)
"""Error numbers of a file system without locks."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE)


def require_writable(path: Path, option: str | None) -> None:
    """Raise `InputError` unless the folder can be written, or created; `option` is the one that names another place."""
    advice = f"; choose another place with {option}" if option else ""
    try:
        for parent in (path, *path.absolute().parents):
            with suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(parent)  # a dangling link exists; an impossible name is an error
                break
        is_folder = stat.S_ISDIR(os.stat(parent).st_mode)
    except OSError as error:
        name = str(path) if len(str(path)) <= 80 else f"{str(path)[:77]}..."
        raise InputError(f"cannot write to {name}: {error.strerror}{advice}") from None
    if not is_folder:
        raise InputError(f"cannot write to {path}: {parent} is a file{advice}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {path}: no permission in {parent}{advice}")
    try:  # a folder of the system, such as /proc, grants everything and holds no files
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        if error.errno not in _FULL:  # which the write itself says, and what is written stays
            raise InputError(f"cannot write to {path}: {parent} takes no files ({error.strerror}){advice}") from None


def system_lock(path: Path) -> FileLock:
    """A lock on a file that ends with the process, however it ends. It raises `Timeout` if another process has it.

    On a file system without locks it raises an OSError of `NO_LOCKS`. filelock's own substitute would outlive a killed
    process.
    """
    return FileLock(path, timeout=0, fallback_to_soft=False)


@contextmanager
def locked(path: Path, option: str | None = "--root or --out") -> Iterator[None]:
    """Keep every other writer from the cache at `path`.

    The lock belongs to the process and ends with it, however it ends. Raises `InputError` if there is no permission, if
    the file system has no locks, or naming the process that holds the lock.
    """
    require_writable(path, option)
    refuse_links(path)
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    lock, owner = path / LOCK, path / OWNER
    had_lock = lock.exists()
    held = system_lock(lock)
    try:
        _acquire(held, path, option)
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        write_atomically(owner, f"process {os.getpid()} on {socket.gethostname()}, since {since}")
        try:
            yield
        finally:
            owner.unlink(missing_ok=True)
            if not had_lock and not (path / "manifest.json").exists():  # nothing was begun
                lock.unlink(missing_ok=True)
    finally:
        held.release()
        if is_new:
            with suppress(OSError):  # not empty
                path.rmdir()


def _acquire(lock: FileLock, path: Path, option: str | None) -> None:
    """Take a folder's lock. Raises `InputError` that names the folder, and what to do."""
    other = f", or choose another place with {option}" if option else ""
    try:
        lock.acquire()
    except Timeout:
        holder = _holder(path / OWNER)
        raise InputError(f"another process is writing to {path}{holder}; wait for it{other}") from None
    except OSError as error:
        if error.errno in NO_LOCKS:
            advice = "mount it with locks (NFS: without nolock; Lustre: with -o flock)"
            with suppress(OSError):
                (path / LOCK).unlink()
            raise InputError(f"{path} is on a file system without locks ({error.strerror}); {advice}{other}") from None
        raise InputError(
            f"cannot lock {path}: {error.strerror} ({path / LOCK}); ask its owner for permission{other}"
        ) from None


def _holder(owner: Path) -> str:
    try:
        with open_file(owner) as file:
            text = file.read(200).decode(errors="replace")
    except (OSError, InputError):
        return ""
    return f" ({plain(text)})"
