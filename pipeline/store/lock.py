"""One writer to a cache: a lock of the system, and who holds it."""

import datetime
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.files import open_file, refuse_links, write_atomically
from probsurgery.pipeline.texts import plain

LOCK, OWNER = ".lock", ".owner"


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


@contextmanager
def locked(path: Path, option: str | None = "--root or --out") -> Iterator[None]:
    """Keep every other writer from the cache at `path`.

    The lock belongs to the process and ends with it, however it ends. Raises `InputError` if there is no permission, or
    naming the process that holds the lock.
    """
    require_writable(path, option)
    refuse_links(path)
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    lock, owner = path / LOCK, path / OWNER
    had_lock = lock.exists()
    try:
        with FileLock(lock, timeout=0):
            since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            write_atomically(owner, f"process {os.getpid()} on {socket.gethostname()}, since {since}")
            try:
                yield
            finally:
                owner.unlink(missing_ok=True)
                if not had_lock and not (path / "manifest.json").exists():  # nothing was begun
                    lock.unlink(missing_ok=True)
    except Timeout:
        other = f", or choose another place with {option}" if option else ""
        raise InputError(f"another process is writing to {path}{_holder(owner)}; wait for it{other}") from None
    finally:
        if is_new:
            with suppress(OSError):  # not empty
                path.rmdir()


def _holder(owner: Path) -> str:
    try:
        with open_file(owner) as file:
            text = file.read(200).decode(errors="replace")
    except (OSError, InputError):
        return ""
    return f" ({plain(text)})"
