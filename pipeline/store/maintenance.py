"""Check, repair, convert, list and remove caches."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from probsurgery.pipeline.config import DTYPES, STORES
from probsurgery.pipeline.errors import DamagedCacheError, InputError, ProbsurgeryError, unknown
from probsurgery.pipeline.files import broken_seal, file_size, folders_in, replaced
from probsurgery.pipeline.fingerprints import fingerprint
from probsurgery.pipeline.progress import Progress, no_progress
from probsurgery.pipeline.store import manifest as manifests
from probsurgery.pipeline.store.arrays import ArraySpec, bad_rows, is_features
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.claims import CLAIMS, held_open
from probsurgery.pipeline.store.lock import LOCK, OWNER, locked
from probsurgery.pipeline.store.manifest import Conversion, read_manifest
from probsurgery.pipeline.store.target import is_remains, refuse_own_files, remove_features
from probsurgery.pipeline.store.writer import CacheWriter


@dataclass(frozen=True)
class ArrayCheck:
    """The check of one array, or of a file of a merge that learned, which has no shards."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shards: int
    missing: int
    """Shards that were not written yet; this is no damage."""
    digest: str | None
    """Of shape, type and values, as the manifest has it; None while shards are missing."""
    problems: tuple[str, ...] = ()
    bad_shards: tuple[int, ...] = ()
    bad_files: tuple[Path, ...] = field(default=(), repr=False)
    """Files with the array's metadata that are not as they were written."""


def check(cache: Cache) -> Iterator[ArrayCheck]:
    """Read every array of a cache and compare it with the manifest, chunk by chunk and as a whole."""
    seen: set[Path] = set()
    for name, spec in cache.manifest.arrays.items():
        problems, bad_files = _metadata_problems(cache, name, seen)
        bad_shards = {}
        for number, sealed in enumerate(spec.shards):
            if sealed and (problem := _shard_problem(cache, name, number, decode=not bad_files)):
                bad_shards[number] = problem
        form = spec.shape, spec.dtype, len(spec.shards), len(spec.missing), spec.digest
        yield ArrayCheck(name, *form, (*problems, *bad_shards.values()), tuple(bad_shards), tuple(bad_files))
    for name, learned in cache.manifest.merge.files.items():
        file = cache.path / name
        problem = broken_seal(file, learned)
        found: tuple[tuple[str, ...], tuple[Path, ...]] = ((f"{file} {problem}",), (file,)) if problem else ((), ())
        yield ArrayCheck(name, (), "", 0, 0, learned.sha256, problems=found[0], bad_files=found[1])


def _metadata_problems(cache: Cache, name: str, seen: set[Path]) -> tuple[list[str], list[Path]]:
    """What is wrong with the files that hold an array's metadata; a file that several arrays share is named once."""
    files = {key: cache.path / key for key in cache.format.metadata(name)}
    seals = cache.manifest.metadata
    if any(key in seals and broken_seal(file, seals[key]) for key, file in files.items()):
        seals = read_manifest(cache.path).metadata  # an extraction may have added arrays meanwhile
    broken = {files[key]: problem for key in files if key in seals and (problem := broken_seal(files[key], seals[key]))}
    what = "which describes arrays to plain readers"
    problems = [f"{file}, {what}, {problem}" for file, problem in broken.items() if file not in seen]
    seen.update(broken)
    # A file without a seal does not count yet: a run ended while it wrote metadata, and the next run writes it again.
    is_sealed = files.keys() <= seals.keys()
    if is_sealed and not broken and not cache.format.is_described(name, cache.manifest.arrays[name]):
        return [f"{next(iter(files.values()))} does not describe {name} as it is"], [*files.values()]
    return problems, [*broken]


def _shard_problem(cache: Cache, name: str, number: int, *, decode: bool) -> str | None:
    """What is wrong with a shard, if anything; without `decode`, only its file's seal is checked."""
    file = cache.file(name, number)
    if not decode:
        problem = cache.broken(name, number)
        return f"{file} {problem}" if problem else None
    try:
        values = cache.decoded_rows(name, number)
    except DamagedCacheError as error:
        return str(error).partition(";")[0]
    task = name.split("/")[1]
    classes = cache.manifest.tasks[task].classes if task in cache.manifest.tasks else 0
    rows, wrong = bad_rows(name, values, classes)
    return f"{file} has {len(rows)} rows that are {wrong}" if len(rows) else None


def repair(path: Path) -> list[ArrayCheck]:
    """Drop every bad shard, so that `extract` fills it again, and rewrite bad metadata; returns the checks."""
    with locked(path, option=None):
        writer = CacheWriter(path, read_manifest(path))
        writer.finish()
        cache = Cache(path)
        checks = list(check(cache))
        bad_shards = {checked.name: dict.fromkeys(checked.bad_shards) for checked in checks if checked.bad_shards}
        bad_files = {file for checked in checks for file in checked.bad_files}
        metadata = {key: sealed for key, sealed in writer.manifest.metadata.items() if path / key not in bad_files}
        learned = {name: s for name, s in writer.manifest.merge.files.items() if path / name not in bad_files}
        # The seals go before the files: a kill leaves a file too many rather than a seal too many.
        writer.update(metadata=metadata, merge=replace(writer.manifest.merge, files=learned))
        writer.set_seals(bad_shards)
        bad_files |= {cache.file(name, number) for name, numbers in bad_shards.items() for number in numbers}
        for file in bad_files:
            file.unlink(missing_ok=True)
        writer.reconcile()
        return checks


def convert(
    source: Path,
    store: str | None = None,
    dtype: str | None = None,
    out: Path | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Write a cache again in another store, or type, beside it or at `out`; continues after an interruption.

    Values keep their digests where the type is the same; in float16 they are those that an extraction in float16
    gives. Heads and results stay with the old cache. Raises `InputError` if nothing would change, or if float16 is
    to become float32, which does not bring back what was lost.
    """
    cache = Cache(source)
    old_store, old_dtype = cache.manifest.store, cache.identity.dtype
    store, dtype = store or old_store, dtype or old_dtype
    for what, given, allowed in (("store", store, STORES), ("dtype", dtype, DTYPES)):
        if given not in allowed:
            raise unknown(what, given, allowed)
    if (store, dtype) == (old_store, old_dtype):
        raise InputError(f"{source} is stored in {store} and {dtype} already; give --store or --dtype to change it")
    if old_dtype == "float16" and dtype == "float32":
        raise InputError(f"{source} is in float16, and float32 would not bring back the lost digits; extract it again")
    named = source if source.name not in ("", "..") else source.resolve()
    suffixes = [new for new, old in ((store, old_store), (dtype, old_dtype)) if new != old]
    out = out or named.with_name("_".join([named.name, *suffixes]))
    if out.resolve() == source.resolve():
        raise InputError(f"--out {out} is the cache itself; choose another place")
    refuse_own_files(out, "--out")
    specs = cache.manifest.arrays
    arrays = {name: ArraySpec(s.shape, dtype if is_features(name) else s.dtype) for name, s in specs.items()}
    with locked(out, option="--out"):
        writer = CacheWriter.begin(out, replace(cache.identity, dtype=dtype), store)
        tasks = fingerprint({name: task.to_json() for name, task in cache.manifest.tasks.items()})
        conversion = Conversion(old_store, old_dtype, cache.content, tasks)
        if writer.manifest.arrays and writer.manifest.converted_from != conversion:
            advice = "remove it with `probsurgery cache rm`, or choose another --out"
            raise InputError(f"{out} was not made from {source} as it is now; {advice}")
        _copy_learned(cache, writer)
        copied = ("tasks", "requested", "files", "merge", "runs", "precision", "software", "created")
        writer.update(converted_from=conversion, **{name: getattr(cache.manifest, name) for name in copied})
        writer.declare(arrays)
        work = [(name, n) for name, spec in specs.items() for n in sorted(writer.missing(name) - spec.missing)]
        for done, (name, number) in enumerate(work):
            progress(done, len(work), name)
            values = cache.shard(name, number)
            writer.write(number, {name: _converted(values, arrays[name].dtype, f"{source}: {name}")})
        progress(len(work), len(work))
    return out


def _copy_learned(cache: Cache, writer: CacheWriter) -> None:
    for name, sealed in cache.manifest.merge.files.items():
        if broken_seal(writer.path / name, sealed):
            if problem := broken_seal(cache.path / name, sealed):
                raise DamagedCacheError(f"{cache.path / name} {problem}; see `probsurgery cache verify`")
            with writer.room(), replaced(writer.path / name) as partial:
                shutil.copyfile(cache.path / name, partial)


def _converted(values: np.ndarray, dtype: str, where: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        new = values.astype(dtype)
    if new.dtype.kind == "f" and np.isinf(new).any():
        raise ProbsurgeryError(f"{where} has values beyond {dtype}'s range; keep {values.dtype}")
    return new


@dataclass(frozen=True)
class Listed:
    """A cache, or what is left of one."""

    path: Path
    size: int
    """Bytes of all its files."""
    cache: Cache | None = None
    problem: str = ""
    """Why it cannot be opened."""

    @property
    def missing(self) -> int:
        """Shards that are not written."""
        return sum(len(spec.missing) for spec in self.cache.manifest.arrays.values()) if self.cache else 0

    @property
    def heads(self) -> int:
        """Heads saved with it."""
        try:
            return sum(file_size(folder / "head.json") is not None for folder in folders_in(self.path / "heads"))
        except OSError:  # of another user
            return 0


def list_caches(root: Path) -> list[Listed]:
    """Every cache in a folder, or the one that it is. Raises `InputError` if there is no such folder."""
    if not root.is_dir():
        raise InputError(f"no folder {root}; name the one that holds the caches")
    caches = []
    for path in [root] if (root / manifests.FILE).is_file() else sorted(root.iterdir()):
        try:
            if (path / manifests.FILE).is_file():
                caches.append(Listed(path, size_of(path), Cache(path)))
            elif path.is_dir() and is_remains(path):
                problem = "remains of an interrupted run; remove them or extract again"
                caches.append(Listed(path, size_of(path), problem=problem))
        except ProbsurgeryError as error:
            caches.append(Listed(path, size_of(path), problem=str(error)))
        except OSError as error:
            if os.path.lexists(path / manifests.FILE):  # else it is any folder, of another user or removed meanwhile
                caches.append(Listed(path, size_of(path), problem=f"cannot be read: {error.strerror}"))
    return caches


def size_of(*paths: Path) -> int:
    """Bytes of all files in some folders; a file that caches share counts once."""
    sizes = {}
    for folder, _, names in chain.from_iterable(map(os.walk, paths)):
        for name in names:
            with suppress(OSError):  # removed meanwhile
                status = os.lstat(os.path.join(folder, name))
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def require_removable(path: Path) -> None:
    """Raise `InputError` unless `path` is a cache, a damaged one or what a kill left of one included."""
    if path.is_symlink():
        raise InputError(f"{path} is a link; remove the folder that it names")
    if path.is_dir() and is_remains(path):
        return
    with suppress(DamagedCacheError):
        read_manifest(path)


def remove(path: Path) -> None:
    """Delete a cache, its heads and results; other files stay, and the folder with them."""
    require_removable(path)
    with locked(path, option=None), held_open(path):
        remove_features(path, heads=True)
        for name in (LOCK, OWNER, CLAIMS):
            (path / name).unlink(missing_ok=True)
    with suppress(OSError):  # other files are in it
        path.rmdir()
