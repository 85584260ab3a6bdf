"""Caches opened for adding shards to them: one writer at a time, which may be several ranks of one run."""

import errno
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
from msgspec import field
from msgspec.structs import replace

from probsurgery.pipeline.errors import DamagedCacheError, InputError, ProbsurgeryError
from probsurgery.pipeline.files import (
    Record,
    broken_seal,
    decode,
    file_size,
    json_text,
    open_file,
    parse_json,
    replaced,
    seal,
)
from probsurgery.pipeline.fingerprints import differences
from probsurgery.pipeline.store import manifest as manifests
from probsurgery.pipeline.store.arrays import ArraySpec, Seals, ShardSeal, shard_count, values_digest, with_seals
from probsurgery.pipeline.store.formats import open_format
from probsurgery.pipeline.store.manifest import Identity, Manifest, RowNumber
from probsurgery.pipeline.store.target import FEATURES, JOURNAL, check_target, remove_features

Skipped = Mapping[str, Mapping[str, str]]
"""By `<split>/<task>`: rows that were left out, and why."""


class JournalEntry(Record, frozen=True, omit_defaults=False):
    """What was done to a cache: a line of a rank's journal."""

    number: int = field(default=0, name="part")
    """Shard number."""
    shards: Mapping[str, ShardSeal] = {}
    skipped: Mapping[str, Mapping[RowNumber, str]] = {}
    precision: Mapping[str, float] = {}


class CacheWriter:
    """A cache opened for adding shards to it.

    Of several ranks, the first owns the manifest (`begin`); each other one (`join`) notes its shards in a journal of
    its own, which the first takes over as it goes on (`collect`), or the next run does after a kill.
    """

    def __init__(self, path: Path, manifest: Manifest, journal: Path | None = None) -> None:
        self.path, self.manifest, self._journal = path, manifest, journal
        self.format = open_format(manifest.store, path)
        self._collected: Counter[Path] = Counter()
        """Bytes of each journal that were taken over."""
        self._lock = threading.RLock()  # shards are written by a thread, while the main one collects

    @classmethod
    def begin(cls, path: Path, identity: Identity, store: str, *, fresh: bool = False) -> Self:
        """Open the cache at `path`, or begin it, inside a `locked(path)`.

        Raises `InputError` as `check_target` does; `fresh` deletes what is there first, heads and results too.
        """
        manifest = check_target(path, identity, store, fresh=fresh)
        if manifest is None:
            remove_features(path, heads=fresh and (path / manifests.FILE).exists())
        for name in FEATURES:
            for partial in (path / f"{name}.partial", *(path / name).rglob("*.partial")):
                partial.unlink(missing_ok=True)
        writer = cls(path, manifest or manifests.new_manifest(identity, store))
        writer.reconcile()
        return writer

    @classmethod
    def join(cls, path: Path, identity: Identity, rank: int) -> Self:
        """Open a cache that the first rank has begun. Raises `InputError` if that one has other settings."""
        manifest = manifests.read_manifest(path)
        differ = differences(manifest.identity.to_json(), identity.to_json())
        if differ:
            raise InputError(f"rank {rank} would write other features to {path} than rank 0: {'; '.join(differ[:3])}")
        journal = path / JOURNAL / f"{rank}.jsonl"
        journal.parent.mkdir(exist_ok=True)
        return cls(path, manifest, journal)

    def reconcile(self) -> None:
        """Bring the manifest and the disk into line: drop seals of missing shards, rewrite missing metadata."""
        self.finish()
        self._collected.clear()
        gone: dict[str, dict[int, None]] = {}
        for name, spec in self.manifest.arrays.items():
            for number, sealed in enumerate(spec.shards):
                file = self.format.file(name, number)
                if sealed and file_size(file) != sealed.bytes:
                    gone.setdefault(name, {})[number] = None
        self.set_seals(gone)
        arrays = self.manifest.arrays
        self._describe({name: spec for name, spec in arrays.items() if not self._is_described(name, spec)})

    def _is_described(self, name: str, spec: ArraySpec) -> bool:
        return all(map(self._is_sealed, self.format.metadata(name))) and self.format.is_described(name, spec)

    def _is_sealed(self, key: str) -> bool:
        """Whether a file that describes arrays has a seal, and is as it was sealed."""
        metadata = self.manifest.metadata
        return key in metadata and not broken_seal(self.path / key, metadata[key])

    def _metadata(self, arrays: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(key for name in arrays for key in self.format.metadata(name)))

    def _describe(self, arrays: Mapping[str, ArraySpec]) -> None:
        """Write the metadata of arrays. A kill during this leaves files without a seal, and no wrong ones."""
        if not arrays:
            return
        with self.room():
            keys = self._metadata(arrays)
            for key in keys:
                if not self._is_sealed(key):
                    (self.path / key).unlink(missing_ok=True)
            metadata = {key: sealed for key, sealed in self.manifest.metadata.items() if key not in keys}
            self.update(metadata=metadata)
            described = dict(arrays)
            for name, spec in self.manifest.arrays.items():  # several arrays share some of the files
                if not all((self.path / key).is_file() for key in self.format.metadata(name)):
                    described[name] = spec
            self.format.declare(described, {**self.manifest.arrays, **described})
            self.update(metadata=metadata | {key: seal(self.path / key) for key in self._metadata(described)})

    def update(self, **changes: object) -> None:
        """Replace fields of the manifest, and write it."""
        with self._lock:
            self.manifest = replace(self.manifest, **changes)
            self.save()

    def set_seals(self, seals: Seals) -> None:
        """Replace the seals of some shards."""
        with self._lock:
            self.update(arrays=with_seals(self.manifest.arrays, seals))

    def request(self, names: Iterable[str]) -> None:
        """Note which `<split>/<task>` this run will write, so that a reader recognises an unfinished cache."""
        self.update(requested=tuple(dict.fromkeys([*self.manifest.requested, *names])))

    def declare(self, arrays: Mapping[str, ArraySpec]) -> None:
        """Add arrays that the cache does not have yet. Raises `InputError` if one is there in another shape."""
        for name, spec in arrays.items():
            known = self.manifest.arrays.get(name, spec).shape
            if known != spec.shape:
                raise InputError(f"{self.path}: {name} has shape {known}, this run would write {spec.shape}")
        new = {name: spec for name, spec in arrays.items() if name not in self.manifest.arrays}
        new = {name: replace(spec, shards=(None,) * shard_count(spec.shape[0])) for name, spec in new.items()}
        self._describe(new)
        if new:
            self.update(arrays={**self.manifest.arrays, **new})

    def add_whole(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Declare and write small arrays, as a classifier's, where the cache lacks them."""
        self.declare({name: ArraySpec(values.shape, str(values.dtype)) for name, values in arrays.items()})
        for name, values in arrays.items():
            if self.missing(name):
                self.write(0, {name: values})

    def missing(self, name: str) -> set[int]:
        """Numbers of the shards that an array lacks."""
        return self.manifest.arrays[name].missing

    def write(self, number: int, values: Mapping[str, np.ndarray], skipped: Skipped | None = None) -> None:
        """Write the shards of one number of several arrays, then count them as whole."""
        seals = {}
        with self.room():
            for name, array in values.items():
                self.format.write(name, number, array)
                sealed = seal(self.format.file(name, number))
                seals[name] = ShardSeal(sealed.bytes, sealed.sha256, values_digest(array))
        self.note(JournalEntry(number, seals, skipped or {}))

    def adopt(self, number: int, name: str, file: Path, sealed: ShardSeal, skipped: Skipped) -> None:
        """Take a whole shard of another cache of the same store: a hard link, or else a copy."""
        own = self.format.file(name, number)
        own.parent.mkdir(parents=True, exist_ok=True)
        with self.room(), replaced(own) as partial:
            try:
                os.link(file, partial)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(file, partial)
        self.note(JournalEntry(number, {name: sealed}, skipped))

    def note(self, entry: JournalEntry) -> None:
        """Record what was done: in the manifest, or in this rank's journal."""
        with self._lock:
            self._apply(entry)
            if self._journal is None:
                self.save()
            else:
                with self.room(), self._journal.open("a", encoding="utf-8") as file:
                    file.write(json_text(entry.to_json()) + "\n")

    def _apply(self, entry: JournalEntry) -> None:
        arrays = with_seals(self.manifest.arrays, {name: {entry.number: s} for name, s in entry.shards.items()})
        tasks = dict(self.manifest.tasks)
        for name, rows in entry.skipped.items():
            if rows:
                split, task = name.split("/")
                data = tasks[task].splits[split]
                data = replace(data, skipped={**data.skipped, **rows})
                tasks[task] = replace(tasks[task], splits={**tasks[task].splits, split: data})
        precision = {**self.manifest.precision, **entry.precision}
        self.manifest = replace(self.manifest, arrays=arrays, tasks=tasks, precision=precision)

    def collect(self) -> None:
        """Take over what the other ranks have noted since the last time; an incomplete last line waits.

        Raises `DamagedCacheError` if a journal holds what no rank writes.
        """
        with self._lock:
            before = self.manifest
            for journal in sorted((self.path / JOURNAL).glob("*.jsonl")):
                with open_file(journal) as file:
                    file.seek(self._collected[journal])
                    text = file.read()
                complete = text[: text.rfind(b"\n") + 1]
                self._collected[journal] += len(complete)
                for line in complete.splitlines():
                    try:
                        self._apply(decode(JournalEntry, parse_json(line)))
                    except (ValueError, LookupError):
                        raise DamagedCacheError(f"{journal} is damaged; delete it and extract again") from None
            if self.manifest is not before:
                manifests.checked_manifest(self.manifest.to_json(), self.path / manifests.FILE)
                self.save()

    def finish(self) -> None:
        """Take over what is left in the journals, and remove them."""
        self.collect()
        shutil.rmtree(self.path / JOURNAL, ignore_errors=True)

    def save(self) -> None:
        """Write the manifest."""
        with self._lock, self.room():
            manifests.write_manifest(self.path, self.manifest)

    @contextmanager
    def room(self) -> Iterator[None]:
        """Turn a full disk's error into one that says what to do."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise ProbsurgeryError(
                f"cannot write to {self.path}: {error.strerror}; what is written stays: make room, and run the same "
                "command again"
            ) from None
