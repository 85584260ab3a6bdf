"""Files of a cache: replaced whole or not at all, sealed, and never behind a link."""

from __future__ import annotations

import os
from pathlib import Path

from probsurgery.pipeline.config import file_digest
from probsurgery.pipeline.errors import InputError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace a file so that a reader sees the old or the new content, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # a kill may have left one, and a stranger a link to somewhere else
    try:
        with partial.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def seal(path: Path) -> dict:
    """Size and digest of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def broken_seal(path: Path, sealed: dict) -> str | None:
    """What is wrong with a sealed file, if anything."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != sealed["bytes"]:
        return f"has {path.stat().st_size} bytes instead of {sealed['bytes']}"
    return None if file_digest(path) == sealed["sha256"] else "was changed since it was written (its digest differs)"


def refuse_links(path: Path) -> None:
    """Raise `InputError` if a cache's folder holds a symbolic link, through which we might write or read elsewhere.

    Or a pipe or device, on which we might wait for ever.
    """
    waiting = [path]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        raise InputError(
                            f"{entry.path} is a link; a cache must not hold one, so put a copy in its place"
                        )
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                        raise InputError(f"{entry.path} is neither a file nor a folder; a cache holds nothing else")
        except (FileNotFoundError, NotADirectoryError):  # none there, or it was removed meanwhile
            continue
