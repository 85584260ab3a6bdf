"""Files that are replaced whole or not at all, sealed with a digest, read as JSON once, and never behind a link.

What a file of somebody else may hold is declared in types: records, and numbers and texts within bounds.
"""

import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import msgspec

from probsurgery.pipeline.errors import AccessError, InputError, first_line
from probsurgery.pipeline.fingerprints import file_digest

T = TypeVar("T")
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""A SHA-256 in hexadecimal."""
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Text = Annotated[str, msgspec.Meta(pattern=r"\A[^\ud800-\udfff]*\Z", max_length=1_000)]
"""Text to be shown, without lone surrogates. It may hold any character else: see `texts.plain`."""
Name = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_.+-]*\Z", max_length=1_000)]
"""A name that leads to no other folder, and that no program takes for a formula."""
Number = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)] | Annotated[float, msgspec.Meta(ge=-1e38, le=1e38)]
"""A number that float32 holds, or nearly: an int stays an int."""
Setting = bool | Number | Text
Settings = Mapping[Name, Setting | None]
"""Settings of a head, of any version."""


SYSTEM_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ELOOP),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)
"""Numbers of errors for which a file cannot be read although it may be whole."""


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """A frozen record of a JSON file. Its form is checked when it is read; a field at its default is not written."""

    def to_json(self) -> dict[str, Any]:
        """The record as JSON's own types."""
        return msgspec.to_builtins(self)


class Seal(Record, frozen=True):
    """Size and digest of a file."""

    bytes: Count
    sha256: Digest


class SourceFile(Record, frozen=True):
    """A file that something was made from."""

    source: str = ""
    """Where it came from: a repository of the Hub, or a path in the user's folder."""
    bytes: int | None = None
    sha256: str = ""
    hub_digest: str | None = None
    """`agrees` with the Hub's own digest, or `unknown`."""


def seal(path: Path) -> Seal:
    """The seal of a file as it is now."""
    return Seal(bytes=path.stat().st_size, sha256=file_digest(path))


def broken_seal(path: Path, sealed: Seal) -> str | None:
    """What is wrong with a sealed file, if anything. Raises an OSError if it is there and cannot be read."""
    size = file_size(path)
    if size is None:
        return "is missing"
    if size != sealed.bytes:
        return f"has {size} bytes instead of {sealed.bytes}"
    return None if file_digest(path) == sealed.sha256 else "was changed since it was written (its digest differs)"


def file_size(path: Path) -> int | None:
    """Bytes of a file; None if none is there. Raises an OSError if that cannot be told, as for want of permission."""
    status = _status(path)
    return status.st_size if status and stat.S_ISREG(status.st_mode) else None


def is_folder(path: Path) -> bool:
    """Whether a folder is there. Raises an OSError if that cannot be told, where `Path.is_dir` may say no."""
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def folders_in(path: Path) -> list[Path]:
    """The folders in a folder, without hidden ones, by name; none if it is missing. Raises an OSError as `is_folder`.

    `Path.glob` passes over what it may not read.
    """
    try:
        return sorted(inner for inner in path.iterdir() if inner.name[0] != "." and is_folder(inner))
    except (FileNotFoundError, NotADirectoryError):
        return []


def access_error(error: OSError, path: Path, advice: str) -> AccessError:
    """The error for a file that is there and cannot be read: by what the system calls it."""
    return AccessError(f"{error.filename or path} cannot be read: {error.strerror or first_line(error)}; {advice}")


def require_readable(path: Path) -> None:
    """Raise the system's error if a file cannot be opened; safetensors' calls each of them "not found"."""
    path.open("rb").close()


@contextmanager
def replaced(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Replace a file or an empty place for a folder: yields a path beside it, which takes its name at the end.

    A reader sees the old or the new content, never a part; after an error nothing is left. Files get the permissions
    that the user's umask gives, whatever library wrote them. With `shared`, several processes may do this at once. A
    folder that exists is not replaced: renaming onto it raises an OSError.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial" if shared else f"{path.name}.partial")
    _remove(partial)  # a killed process may have left one, and an attacker a link to somewhere else
    try:
        yield partial
        _share(partial)
        partial.replace(path)
    finally:
        _remove(partial)


def _share(path: Path) -> None:
    """Give what a library made private, as those for temporary files do, the permissions of any other new file."""
    inner = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    for file in inner if path.is_dir() else [path]:
        if not stat.S_IMODE(file.stat().st_mode) & 0o077:
            probe = file.with_name(f"{file.name}.mode")
            probe.open("xb").close()
            file.chmod(stat.S_IMODE(probe.stat().st_mode))
            probe.unlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace a file's content as `replaced` does."""
    with replaced(path) as partial, partial.open("xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file."""
    write_atomically(path, json_text(value, indent=1) + "\n")


def json_text(value: object, indent: int | None = None) -> str:
    """A value as JSON, which has no NaN and no infinity: they become null. Paths and the like become text."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def open_file(path: Path, *, append: bool = False, links: bool = True) -> BinaryIO:
    """Open a file for reading, or, with `append`, for reading and appending; it is created then.

    Raises OSError if it cannot be opened or is a folder, and `InputError` if it is a pipe or device, on which reading
    might wait for ever, or, without `links`, a symbolic link.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT if append else os.O_RDONLY
    # A pipe is opened without waiting for its other end.
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if not links and path.is_symlink():
            raise InputError(f"{path} is a link; put a copy of the file in its place") from None
        if error.errno == errno.ENXIO:  # a socket
            raise InputError(f"{path} is a pipe or device; put a file in its place") from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise InputError(f"{path} is a pipe or device; put a file in its place")
    return os.fdopen(descriptor, "a+b" if append else "rb")


def read_json(path: Path, most_bytes: int) -> Any:
    """A JSON file's value. Raises what `open_file` does, and `MalformedError` if it is too large or not JSON."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > most_bytes:
            raise MalformedError(f"it has more than {most_bytes:,} bytes")
        return parse_json(file.read())


def parse_json(text: bytes) -> Any:
    """A value of JSON, which has no NaN, no infinity and no number beyond float64. Raises `MalformedError`."""
    try:
        return json.loads(text.decode(), parse_float=_finite_number, parse_constant=_finite_number)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"it is not valid JSON: {first_line(error)}") from None


def _finite_number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def decode(kind: type[T], value: object) -> T:
    """A value of JSON's types as a record. Raises `MalformedError` that names the field that is missing or wrong."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise MalformedError(first_line(error)[:200]) from None
    except (OverflowError, RecursionError, UnicodeError) as error:
        raise MalformedError(f"a value of it cannot be read: {first_line(error)[:80]}") from None


class MalformedError(ValueError):
    """A file does not have the form that it should have; the message is a clause for the reader's own error."""


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
        except (FileNotFoundError, NotADirectoryError):  # it does not exist, or was removed meanwhile
            continue
