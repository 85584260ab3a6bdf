"""Caches opened for adding shards to them: one writer at a time, which may be several ranks of one run."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import shutil
import socket
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from probsurgery.pipeline.errors import DamagedCacheError, InputError, ProbsurgeryError
from probsurgery.pipeline.files import broken_seal, refuse_links, seal, write_atomically
from probsurgery.pipeline.fingerprints import differences
from probsurgery.pipeline.store.formats import BACKENDS, Backend, shard_count
from probsurgery.pipeline.store.manifest import (
    COEFFICIENTS,
    MERGED,
    check_form,
    new_manifest,
    read_manifest,
    values_digest,
    write_manifest,
)

JOURNAL = "journal"
FEATURES = ("manifest.json", "features.h5", "features.zarr", "shards", JOURNAL, MERGED, COEFFICIENTS)
HEADS = ("heads", "results.jsonl")
LOCK = (".lock", ".owner")
_OWN = (*FEATURES, *HEADS, *LOCK)


class CacheWriter:
    """A cache opened for adding shards to it.

    Of several ranks, the first keeps the manifest (`begin`); each other one (`join`) notes its shards in a journal of
    its own, which the first takes over as it goes on (`collect`), or the next run does after a kill.
    """

    def __init__(self, path: Path, manifest: dict, journal: Path | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.backend: Backend = BACKENDS[manifest["store"]](path)
        self._journal = journal
        self._taken: dict[Path, int] = {}
        self._lock = threading.RLock()  # shards are written by a thread, while the main one collects

    @classmethod
    def begin(cls, path: Path, identity: dict, store: str, *, fresh: bool = False) -> CacheWriter:
        """Open the cache at `path`, or begin it, inside a `locked(path)`.

        Raises `InputError` as `check_target` does; `fresh` deletes what is there first, heads and results too.
        """
        known = check_target(path, identity, store, fresh=fresh)
        if known is None:
            remove_features(path, heads=fresh and (path / "manifest.json").exists())
        for name in FEATURES:
            for partial in [path / f"{name}.partial", *(path / name).rglob("*.partial")]:
                partial.unlink(missing_ok=True)
        writer = cls(path, known or new_manifest(identity, store))
        writer.mend()
        return writer

    @classmethod
    def join(cls, path: Path, identity: dict, rank: int) -> CacheWriter:
        """Open a cache that the first rank has begun. Raises `InputError` if that goes by other settings."""
        manifest = read_manifest(path)
        differ = differences(manifest["identity"], identity)
        if differ:
            raise InputError(f"rank {rank} would write other features to {path} than rank 0: {'; '.join(differ[:3])}")
        journal = path / JOURNAL / f"{rank}.jsonl"
        journal.parent.mkdir(exist_ok=True)
        return cls(path, manifest, journal)

    def mend(self) -> None:
        """Bring the manifest and what is on disk into line: ask again for what is gone, and describe arrays anew."""
        self.finish()
        self._taken.clear()
        arrays = self.manifest["arrays"]
        for name, spec in arrays.items():
            for part, sealed in enumerate(spec["shards"]):
                path = self.backend.file(name, part)
                if sealed and (not path.is_file() or path.stat().st_size != sealed["bytes"]):
                    spec["shards"][part] = None
        self.save()
        self._describe({name: spec for name, spec in arrays.items() if not self._is_described(name)})

    def _is_described(self, name: str) -> bool:
        metadata = self.manifest["metadata"]
        for file, path in self._metadata([name]).items():
            if file not in metadata or broken_seal(path, metadata[file]):
                return False
        try:
            return self.backend.described(name, self.manifest["arrays"][name])
        except Exception:  # the formats' libraries raise anything for a garbled file
            return False

    def _metadata(self, names: Iterable[str]) -> dict[str, Path]:
        """What describes arrays to plain readers: path in the cache -> file."""
        return {file.relative_to(self.path).as_posix(): file for n in names for file in self.backend.metadata(n)}

    def _describe(self, arrays: dict[str, dict]) -> None:
        """Make arrays known to plain readers. A kill in the midst of it leaves files without a seal, not wrong ones."""
        if not arrays:
            return
        metadata = self.manifest["metadata"]
        with self.room():
            for name, file in self._metadata(arrays).items():
                sealed = metadata.pop(name, None)
                if sealed is None or broken_seal(file, sealed):
                    file.unlink(missing_ok=True)
            self.save()
            for name, spec in self.manifest["arrays"].items():  # what several arrays have in common may be gone
                if not all(file.is_file() for file in self.backend.metadata(name)):
                    arrays = arrays | {name: spec}
            self.backend.declare(arrays, self.manifest["arrays"] | arrays)
            metadata |= {name: seal(file) for name, file in self._metadata(arrays).items()}
            self.save()

    def request(self, names: list[str]) -> None:
        """Note which `<split>/<task>` this run will write, so that a reader knows an unfinished cache."""
        self.manifest["requested"] = list(dict.fromkeys([*self.manifest["requested"], *names]))
        self.save()

    def declare(self, arrays: dict[str, dict]) -> None:
        """Make arrays known that are not yet; each spec is `{"shape", "dtype"}`."""
        new = {name: spec for name, spec in arrays.items() if name not in self.manifest["arrays"]}
        for name, spec in arrays.items():
            known = self.manifest["arrays"].get(name, spec)
            if known["shape"] != spec["shape"]:
                raise InputError(
                    f"{self.path}: {name} has shape {known['shape']}, this run would write {spec['shape']}"
                )
        self._describe(new)
        for name, spec in new.items():
            self.manifest["arrays"][name] = {**spec, "shards": [None] * shard_count(spec["shape"][0])}
        if new:
            self.save()

    def pending(self, name: str) -> set[int]:
        """Parts of which an array lacks a whole shard."""
        return {part for part, sealed in enumerate(self.manifest["arrays"][name]["shards"]) if sealed is None}

    def write(self, part: int, values: dict[str, np.ndarray], skipped: dict[str, dict[str, str]] | None = None) -> None:
        """Write one part of several arrays, then count them as whole.

        `skipped` says which rows of a `<split>/<task>` were left out, and why.
        """
        with self.room():
            for name, array in values.items():
                self.backend.write(name, part, array)
        seals = {n: seal(self.backend.file(n, part)) | {"values": values_digest(v)} for n, v in values.items()}
        self.note({"part": part, "shards": seals, "skipped": skipped or {}})

    def adopt(self, part: int, name: str, file: Path, sealed: dict, skipped: dict[str, dict[str, str]]) -> None:
        """Take a whole shard of another cache that is stored in the same way: a hard link, or else a copy."""
        own = self.backend.file(name, part)
        partial = own.with_name(f"{own.name}.partial")
        own.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        try:
            os.link(file, partial)
        except OSError:  # another file system, or one without hard links
            with self.room():
                shutil.copyfile(file, partial)
        partial.replace(own)
        partial.unlink(missing_ok=True)  # which stays if a killed run had linked it already
        self.note({"part": part, "shards": {name: sealed}, "skipped": skipped})

    def note(self, entry: dict) -> None:
        """Keep a record of what was done: in the manifest, or in this rank's journal."""
        with self._lock:
            self._take(entry)
            if self._journal is None:
                self.save()
                return
            with self.room(), self._journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _take(self, entry: dict) -> None:
        arrays = self.manifest["arrays"]
        for name, sealed in entry.get("shards", {}).items():
            arrays[name]["shards"][entry["part"]] = sealed
        for name, rows in entry.get("skipped", {}).items():
            split, task = name.split("/")
            if rows:
                self.manifest["tasks"][task]["splits"][split].setdefault("skipped", {}).update(rows)
        if "precision" in entry:
            self.manifest.setdefault("precision", {}).update(entry["precision"])

    def collect(self) -> None:
        """Take over what the other ranks have noted since the last time; a line that is not whole yet waits.

        Raises `DamagedCacheError` if a journal holds what no rank writes.
        """
        with self._lock:
            found = False
            for journal in sorted((self.path / JOURNAL).glob("*.jsonl")):
                with journal.open("rb") as file:
                    file.seek(self._taken.get(journal, 0))
                    text = file.read()
                whole = text[: text.rfind(b"\n") + 1]
                self._taken[journal] = self._taken.get(journal, 0) + len(whole)
                for line in whole.splitlines():
                    try:
                        self._take(json.loads(line))
                    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
                        raise DamagedCacheError(f"{journal} is garbled; delete it and extract again") from None
                    found = True
            if found:
                check_form(self.manifest, self.path / "manifest.json")
                self.save()

    def finish(self) -> None:
        """Take over what is left in the journals, and remove them."""
        self.collect()
        shutil.rmtree(self.path / JOURNAL, ignore_errors=True)

    def save(self) -> None:
        """Replace the manifest."""
        with self._lock, self.room():
            write_manifest(self.path, self.manifest)

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Say of a full disk what to do."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise ProbsurgeryError(
                f"cannot write to {self.path}: {error.strerror}; what is written is kept: make room, and run the same "
                "command again"
            ) from None


def require_writable(path: Path, option: str | None) -> None:
    """Raise `InputError` unless the folder can be written, or made; `option` is what names another place."""
    advice = f"; choose another place with {option}" if option else ""
    try:
        parent = next(p for p in (path, *path.absolute().parents) if _is_there(p))
        is_folder = stat.S_ISDIR(os.stat(parent).st_mode)
    except OSError as error:
        name = str(path) if len(str(path)) <= 80 else f"{str(path)[:77]}..."
        raise InputError(f"cannot write to {name}: {error.strerror}{advice}") from None
    if not is_folder:
        raise InputError(f"cannot write to {path}: {parent} is a file{advice}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {path}: no permission in {parent}{advice}")


def _is_there(path: Path) -> bool:
    """Whether a path names something, be it a dangling link. Raises an OSError for a name that cannot be one."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextlib.contextmanager
def locked(path: Path, option: str | None = "--root or --out") -> Iterator[None]:
    """Keep every other writer from the cache at `path`.

    The lock is the system's, and goes with the process that holds it, however that ends. Raises `InputError`, naming
    the process that writes, if there is one, and if there is no permission.
    """
    require_writable(path, option)
    refuse_links(path)
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    lock, owner = path / ".lock", path / ".owner"
    here = lock.exists()
    try:
        with FileLock(lock, timeout=0):
            since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            write_atomically(owner, f"process {os.getpid()} on {socket.gethostname()}, since {since}")
            try:
                yield
            finally:
                owner.unlink(missing_ok=True)
                if not here and not (path / "manifest.json").exists():  # nothing was begun
                    lock.unlink(missing_ok=True)
    except Timeout:
        other = f", or choose another place with {option}" if option else ""
        raise InputError(f"another process is writing to {path}{_named(owner)}; wait for it{other}") from None
    finally:
        if new:
            with contextlib.suppress(OSError):  # something is in it
                path.rmdir()


def _named(owner: Path) -> str:
    try:
        text = owner.read_text(encoding="utf-8")[:200]
    except (OSError, ValueError):
        return ""
    return f" ({''.join(c for c in text if c.isprintable())})"


def check_target(path: Path, identity: dict, store: str, *, fresh: bool = False) -> dict | None:
    """The manifest of the cache at `path` if this identity can be added to it; None if one is to be begun there.

    Changes nothing. Raises `InputError` if a cache of another identity or store is there (with the difference;
    `fresh` is to replace it), if the folder holds something else, or if it cannot be written. The merge's digest is not
    compared where the identity has none yet.
    """
    require_writable(path, "--root or --out")
    if not path.exists():
        return None
    if not (path / "manifest.json").exists():
        if any(path.iterdir()) and not is_remains(path):
            held = min(p.name for p in path.iterdir())
            raise InputError(f"{path} exists and is not a cache (it holds {held}); choose another --out")
        refuse_links(path)
        return None
    if fresh:
        with contextlib.suppress(DamagedCacheError):  # a damaged one may be replaced, another program's may not
            read_manifest(path)
        return None
    manifest = read_manifest(path)
    there = manifest["identity"]
    if "digest" not in identity["merge"]:
        there = there | {"merge": {key: value for key, value in there["merge"].items() if key != "digest"}}
    differ = differences(there, identity)
    if manifest["store"] != store:
        differ.insert(0, f"store: {manifest['store']} / {store}")
    if differ:
        more = f" (and {len(differ) - 3} more)" if len(differ) > 3 else ""
        raise InputError(
            f"{path} was written with other settings (there / asked): {'; '.join(differ[:3])}{more}; "
            "choose another --out, or replace it with --fresh"
        )
    return manifest


def is_remains(path: Path) -> bool:
    """Whether a folder is what a kill left of a cache: its own files without a manifest, and its lock, which is empty.

    Other programs' files may have the names of our own, but not all of this.
    """
    lock = path / ".lock"
    own = all(p.name.removesuffix(".partial") in _OWN for p in path.iterdir())
    return own and not (path / "manifest.json").exists() and lock.is_file() and not lock.stat().st_size


def remove_features(path: Path, *, heads: bool) -> None:
    """Remove what a cache is made of: heads first, then the manifest. A kill leaves a cache or remains, no torn one."""
    for name in (HEADS if heads else ()) + FEATURES:
        if (path / name).is_dir() and not (path / name).is_symlink():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)
