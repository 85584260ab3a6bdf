"""Looking after caches: check, repair, convert, list, remove."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from probsurgery.pipeline.config import DTYPES, STORES
from probsurgery.pipeline.errors import DamagedCacheError, InputError, ProbsurgeryError, unknown
from probsurgery.pipeline.files import broken_seal
from probsurgery.pipeline.fingerprints import fingerprint
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.formats import part_range
from probsurgery.pipeline.store.manifest import array_digest, is_features, learned_files, read_manifest
from probsurgery.pipeline.store.writer import LOCK, CacheWriter, is_remains, locked, remove_features


@dataclass(frozen=True)
class ArrayCheck:
    """What the check of one array found, or of a file that keeps what a merge has learned, which has no shards."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shards: int
    missing: int
    """Shards that were not written yet; no damage."""
    digest: str | None
    """Of shape, type and values, as the manifest has it; None while shards are missing."""
    problems: tuple[str, ...] = ()
    bad_shards: tuple[int, ...] = ()
    bad_files: tuple[Path, ...] = field(default=(), repr=False)
    """What describes the array to plain readers, if it is not as it was written."""


def check(cache: Cache) -> Iterator[ArrayCheck]:
    """Read every array of a cache and compare it with the manifest, chunk by chunk and as a whole."""
    seen: set[Path] = set()
    for name, spec in cache.manifest["arrays"].items():
        problems, bad_files = _description_problems(cache, name, seen)
        bad_shards = []
        for part, sealed in enumerate(spec["shards"]):
            if sealed is None:
                continue
            problem = _shard_problem(cache, name, part, decode=not bad_files)
            if problem:
                bad_shards.append(part)
                problems.append(problem)
        yield ArrayCheck(
            name,
            tuple(spec["shape"]),
            spec["dtype"],
            len(spec["shards"]),
            spec["shards"].count(None),
            array_digest(spec),
            tuple(problems),
            tuple(bad_shards),
            tuple(bad_files),
        )
    for name, sealed in learned_files(cache.manifest).items():
        file = cache.path / name
        problem = broken_seal(file, sealed)
        problems = (f"{file} {problem}",) if problem else ()
        yield ArrayCheck(name, (), "", 0, 0, sealed["sha256"], problems, (), (file,) if problem else ())


def _description_problems(cache: Cache, name: str, seen: set[Path]) -> tuple[list[str], list[Path]]:
    """What is wrong with the files that describe an array; one that several arrays have in common is named once."""
    files = {file.relative_to(cache.path).as_posix(): file for file in cache.description(name)}
    sealed = cache.manifest["metadata"]
    if any(n in sealed and broken_seal(file, sealed[n]) for n, file in files.items()):
        sealed = read_manifest(cache.path)["metadata"]  # an extraction may have described more arrays meanwhile
    broken = {files[n]: problem for n in files if n in sealed and (problem := broken_seal(files[n], sealed[n]))}
    problems = [
        f"{file}, which describes arrays to plain readers, {problem}"
        for file, problem in broken.items()
        if file not in seen
    ]
    seen.update(broken)
    # A file without a seal is none yet: a run was ended while it described arrays, and the next does it again.
    if files.keys() <= sealed.keys() and not broken and not cache.described(name):
        return [f"{next(iter(files.values()))} does not describe {name} as it is"], [*files.values()]
    return problems, [*broken]


def _shard_problem(cache: Cache, name: str, part: int, *, decode: bool) -> str | None:
    """What is wrong with a shard, if anything; its file alone is looked at where what describes it is broken."""
    file = cache.file(name, part)
    if not decode:
        problem = cache.broken(name, part)
        return f"{file} {problem}" if problem else None
    try:
        values = cache.shard(name, part)
    except DamagedCacheError as error:
        return str(error).partition(";")[0]
    split, task = name.split("/")[:2]
    rows = part_range(part, cache.manifest["arrays"][name]["shape"][0])
    left_out = [row - rows.start for row in cache.skipped(task, split) if row in rows]
    kept = np.delete(values, left_out, axis=0) if left_out else values
    if values.dtype.kind == "f":
        bad = int((~np.isfinite(kept)).any(-1).sum())
        return f"{file} holds NaN or infinite features in {bad} rows" if bad else None
    classes = cache.manifest["tasks"].get(task, {}).get("classes", 0)
    wrong = int(((kept < 0) | (kept >= classes)).sum())
    return f"{file} holds {wrong} labels that are no class of {task}" if wrong else None


def repair(path: Path) -> list[ArrayCheck]:
    """Drop every bad shard, so that `extract` fills it again, and describe arrays anew; gives the checks."""
    with locked(path, option=None):
        cache = Cache(path)
        writer = CacheWriter(path, cache.manifest)
        writer.finish()
        checks = list(check(cache))
        for one in checks:
            for part in one.bad_shards:
                cache.manifest["arrays"][one.name]["shards"][part] = None
            for file in one.bad_files:
                cache.manifest["metadata"].pop(file.relative_to(path).as_posix(), None)
                learned_files(cache.manifest).pop(file.name, None)
        writer.save()  # before the files go: a kill leaves a file too many rather than a seal too many
        for one in checks:
            for file in (*one.bad_files, *(cache.file(one.name, part) for part in one.bad_shards)):
                file.unlink(missing_ok=True)
        writer.mend()
        return checks


def convert(
    source: Path,
    store: str | None = None,
    dtype: str | None = None,
    out: Path | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Path:
    """Write a cache anew in another store, or type, beside it or at `out`; goes on after an interruption.

    Values keep their digests where the type is the same; in float16 they are those that an extraction in float16
    gives. Heads and results stay with the old cache. Raises `InputError` if nothing would change, or if float16 is
    to become float32, which does not bring back what was lost.
    """
    cache = Cache(source)
    old_store, old_dtype = cache.manifest["store"], cache.identity["dtype"]
    store, dtype = store or old_store, dtype or old_dtype
    for what, given, allowed in (("store", store, STORES), ("dtype", dtype, DTYPES)):
        if given not in allowed:
            raise unknown(what, given, allowed)
    if (store, dtype) == (old_store, old_dtype):
        raise InputError(f"{source} is kept in {store} and {dtype} already; give --store or --dtype to change it")
    if old_dtype == "float16" and dtype == "float32":
        raise InputError(f"{source} is kept in float16, and float32 would not bring back what that lost; extract anew")
    suffix = "_".join(new for new, old in ((store, old_store), (dtype, old_dtype)) if new != old)
    named = source if source.name not in ("", "..") else source.resolve()
    out = out or named.with_name(f"{named.name}_{suffix}")
    if out.resolve() == source.resolve():
        raise InputError(f"--out {out} is the cache itself; choose another place")
    arrays = {
        name: {"shape": spec["shape"], "dtype": dtype if is_features(name) else spec["dtype"]}
        for name, spec in cache.manifest["arrays"].items()
    }
    with locked(out, option="--out"):
        writer = CacheWriter.begin(out, cache.identity | {"dtype": dtype}, store)
        converted = {"store": old_store, "dtype": old_dtype, "content": cache.content}
        converted["tasks"] = fingerprint(cache.manifest["tasks"])
        if writer.manifest["arrays"] and writer.manifest.get("converted_from") != converted:
            raise InputError(
                f"{out} was not made from {source} as it is now; remove it with `probsurgery cache rm`, or choose "
                "another --out"
            )
        for key in ("tasks", "requested", "files", "merge", "runs", "precision", "software", "created"):
            if key in cache.manifest:
                writer.manifest[key] = cache.manifest[key]
        for name, sealed in learned_files(cache.manifest).items():
            if broken_seal(out / name, sealed):
                problem = broken_seal(source / name, sealed)
                if problem:
                    raise DamagedCacheError(f"{source / name} {problem}; see `probsurgery cache verify`")
                with writer.room():
                    shutil.copyfile(source / name, out / f"{name}.partial")
                    (out / f"{name}.partial").replace(out / name)
        writer.manifest["converted_from"] = converted
        writer.declare(arrays)
        work = [
            (name, part)
            for name, spec in cache.manifest["arrays"].items()
            for part in sorted(writer.pending(name))
            if spec["shards"][part] is not None
        ]
        for done, (name, part) in enumerate(work):
            progress(done, len(work), name)
            writer.write(part, {name: _converted(cache.shard(name, part), arrays[name]["dtype"], source, name)})
        progress(len(work), len(work), "")
        writer.save()
    return out


def _converted(values: np.ndarray, dtype: str, source: Path, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        new = values.astype(dtype)
    if new.dtype.kind == "f" and np.isinf(new).any():
        raise ProbsurgeryError(f"{source}: {name} has values beyond {dtype}'s range; keep {values.dtype}")
    return new


@dataclass(frozen=True)
class Listed:
    """One cache in a list."""

    path: Path
    size: int
    """Bytes of all its files."""
    cache: Cache | None = None
    problem: str = ""
    """Why it cannot be opened."""

    @property
    def missing(self) -> int:
        """Shards that were asked for and are not there."""
        return sum(spec["shards"].count(None) for spec in self.cache.manifest["arrays"].values())

    @property
    def heads(self) -> int:
        """Heads kept with it."""
        return sum(1 for _ in (self.path / "heads").glob("*/head.json"))


def list_caches(root: Path) -> list[Listed]:
    """Every cache in a folder, or the one that it is. Raises `InputError` if there is no such folder."""
    if not root.is_dir():
        raise InputError(f"no folder {root}; name the one that holds the caches")
    found = []
    for path in [root] if (root / "manifest.json").is_file() else sorted(root.iterdir()):
        try:
            if (path / "manifest.json").is_file():
                found.append(Listed(path, size_of(path), Cache(path)))
            elif path.is_dir() and is_remains(path):
                found.append(Listed(path, size_of(path), problem="what is left of a cache; remove it or extract again"))
        except ProbsurgeryError as error:
            found.append(Listed(path, size_of(path), problem=str(error)))
        except PermissionError:  # a folder that is somebody else's
            continue
    return found


def size_of(*paths: Path) -> int:
    """Bytes of all files in some folders; one that caches share counts once."""
    sizes = {}
    for path in paths:
        for folder, _, names in os.walk(path):
            for name in names:
                with contextlib.suppress(OSError):  # removed meanwhile
                    about = os.lstat(os.path.join(folder, name))
                    sizes[about.st_dev, about.st_ino] = about.st_size
    return sum(sizes.values())


def removable(path: Path) -> None:
    """Raise `InputError` unless `path` is a cache, be it a damaged one or what a kill left of one."""
    if path.is_symlink():
        raise InputError(f"{path} is a link; remove the folder that it names")
    if path.is_dir() and is_remains(path):
        return
    with contextlib.suppress(DamagedCacheError):
        read_manifest(path)


def remove(path: Path) -> None:
    """Delete a cache, its heads and results; files that are none of its own stay, and the folder with them."""
    removable(path)
    with locked(path, option=None):
        remove_features(path, heads=True)
        for name in LOCK:
            (path / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in it
        path.rmdir()
