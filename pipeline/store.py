"""Caches on disk: features in shards, and the manifest that says which of them are whole.

A shard counts only when the manifest, replaced atomically after it, gives its size and digest. The manifest carries a
digest of its own. How a shard lies on disk is the business of `backends`.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from probsurgery.pipeline.backends import BACKENDS, Backend, shard_count
from probsurgery.pipeline.config import differences, file_digest, fingerprint
from probsurgery.pipeline.errors import DamagedCacheError, InputError, first_line

SCHEMA = 1
_FEATURES = ("manifest.json", "features.h5", "features.zarr", "shards")
_HEADS = ("heads", "results.jsonl")
_OWN = (*_FEATURES, *_HEADS, ".lock")
KINDS = ("merged", "expert", "pretrained")


def _seal(path: Path, values: np.ndarray) -> dict:
    """Size and digest of a shard's file and digest of its values, as kept in the manifest.

    The values have their own because what describes an array, its byte order say, lies outside the shard.
    """
    return {"bytes": path.stat().st_size, "sha256": file_digest(path), "values": _values_digest(values)}


def _values_digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def software() -> dict[str, str]:
    """Versions of what a cache's numbers depend on."""
    found = {}
    for name in ("probsurgery", "torch", "open_clip_torch", "zarr", "h5py", "numpy", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old or the new text, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def write_manifest(path: Path, manifest: dict) -> None:
    """Replace a cache's manifest, with a digest of itself."""
    sealed = manifest | {"digest": fingerprint(manifest)}
    write_atomically(path / "manifest.json", json.dumps(sealed, indent=1) + "\n")


def _read_manifest(path: Path) -> dict:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "is not a cache (it has no manifest.json)" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}; `probsurgery extract` writes one") from None
    except NotADirectoryError:
        raise InputError(f"{path} is not a cache; `probsurgery extract` writes one") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCacheError(f"{file} is not valid JSON ({error}); delete the folder and extract again") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is not int:
        raise InputError(f"{file} is not a cache's manifest")
    if schema > SCHEMA:
        raise InputError(
            f"{path} was written by a newer version (schema {schema}, this one reads up to {SCHEMA}); "
            "update probsurgery"
        )
    if "identity" not in manifest:
        raise InputError(f"{file} is not a cache's manifest")
    if manifest.pop("digest", None) != fingerprint(manifest):
        raise DamagedCacheError(f"{file} was changed since it was written (its digest differs); extract with --fresh")
    return manifest


class Cache:
    """A cache opened for reading.

    `cache.features("mnist")` gives merged features (N, d) in float32; see also `labels` and `classifier`. Everything
    read is checked against the manifest first. Raises `InputError` for what is not there and `DamagedCacheError`,
    naming the file, for what is not as it was written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self._backend: Backend = BACKENDS[self.manifest["store"]](self.path)
        self._fingerprints: dict[tuple[str, str], str] = {}

    def __repr__(self) -> str:
        return f"Cache({str(self.path)!r}, arch={self.identity['arch']!r}, dim={self.dim})"

    @property
    def identity(self) -> dict:
        """What determines the numbers in the cache."""
        return self.manifest["identity"]

    @property
    def fingerprint(self) -> str:
        """Digest of the identity."""
        return fingerprint(self.identity)

    def task_fingerprint(self, task: str, split: str = "test") -> str:
        """Digest of what determines one task's numbers: the identity, its classifier, its images. Results name it."""
        if (task, split) not in self._fingerprints:
            about = self.manifest["tasks"][task]
            digest = fingerprint([self.identity, about["classifier"], about["splits"][split]])
            self._fingerprints[task, split] = digest
        return self._fingerprints[task, split]

    @property
    def dim(self) -> int:
        """d, the features' width."""
        return self.identity["dim"]

    def missing_shards(self, task: str, split: str) -> tuple[int, int]:
        """Shards of one task that are missing, and shards in all; (0, 0) if the task was never begun."""
        shards = [
            shard
            for name, spec in self.manifest["arrays"].items()
            if name.startswith(f"{split}/{task}/")
            for shard in spec["shards"]
        ]
        return shards.count(None), len(shards)

    def is_whole(self, task: str, split: str = "test") -> bool:
        """Whether every shard of a task was written."""
        missing, total = self.missing_shards(task, split)
        return total > 0 and missing == 0

    def tasks(self, split: str = "test") -> tuple[str, ...]:
        """Tasks that the cache holds for a split, in the order of the merge.

        Raises `InputError` if an extraction was begun and not finished.
        """
        for name in self.manifest["requested"]:
            its_split, task = name.split("/")
            if its_split == split:
                self.require(task, split)
        return tuple(task for task in self.identity["tasks"] if self.is_whole(task, split))

    def require(self, task: str, split: str = "test") -> None:
        """Raise `InputError` unless the task is there and whole."""
        if task not in self.identity["tasks"]:
            raise InputError(f"{self.path} has no task {task!r}; it merges: {', '.join(self.identity['tasks'])}")
        missing, total = self.missing_shards(task, split)
        if total and not missing:
            return
        if total or f"{split}/{task}" in self.manifest["requested"]:
            state = f"{missing} of {total} shards are missing" if total else "it was not begun"
            raise InputError(
                f"{self.path} is unfinished: {task} ({split}): {state}; run the same `probsurgery extract` again"
            )
        raise InputError(f"{self.path} does not hold {task} ({split}); extract it with --only {task} --split {split}")

    def has(self, task: str, kind: str, split: str = "test") -> bool:
        """Whether features of this kind were asked for."""
        return f"{split}/{task}/{kind}" in self.manifest["arrays"]

    def rows(self, task: str, split: str = "test") -> int:
        """N, the task's images in a split, without those that were left out because they could not be decoded."""
        self.require(task, split)
        return self.manifest["arrays"][f"{split}/{task}/labels"]["shape"][0] - len(self.skipped(task, split))

    def skipped(self, task: str, split: str = "test") -> dict[int, str]:
        """Images that were left out: row in the data set -> why it could not be decoded."""
        about = self.manifest["tasks"].get(task, {"splits": {}})["splits"].get(split, {})
        return {int(row): problem for row, problem in about.get("skipped", {}).items()}

    def _decoded(self, values: np.ndarray, task: str, split: str) -> np.ndarray:
        skipped = self.skipped(task, split)
        return np.delete(values, list(skipped), axis=0) if skipped else values

    def features(self, task: str, kind: str = "merged", split: str = "test") -> Tensor:
        """Features (N, d) in float32, not normalised; `kind` is merged, expert or pretrained."""
        self.require(task, split)
        if not self.has(task, kind, split):
            raise InputError(
                f"{self.path} holds no {kind!r} features of {task} ({split}); it may hold: {', '.join(KINDS)}"
            )
        values = torch.from_numpy(self._decoded(self._array(f"{split}/{task}/{kind}"), task, split)).float()
        bad = (~values.isfinite()).any(-1).nonzero()
        if len(bad):
            raise InputError(
                f"{self.path}: {kind} features of task {task} ({split}) are NaN or infinite in {len(bad)} rows, "
                f"first in row {bad[0].item()}; check the checkpoints and extract again with --fresh"
            )
        return values

    def labels(self, task: str, split: str = "test") -> Tensor:
        """Labels (N,), for evaluation only."""
        self.require(task, split)
        return torch.from_numpy(self._decoded(self._array(f"{split}/{task}/labels"), task, split))

    def classifier(self, task: str) -> Tensor:
        """Zero-shot classifier (C, d), rows unit-norm times the logit scale."""
        return torch.from_numpy(self._array(f"classifiers/{task}")).float()

    def _array(self, name: str) -> np.ndarray:
        spec = self.manifest["arrays"][name]
        values = np.concatenate([self._shard(name, part) for part in range(len(spec["shards"]))])
        if list(values.shape) != spec["shape"] or values.dtype != spec["dtype"]:
            raise DamagedCacheError(
                f"{self.path}: {name} is {values.dtype} {values.shape}, but the manifest says {spec['dtype']} "
                f"{tuple(spec['shape'])}; extract again with --fresh"
            )
        return values

    def _shard(self, name: str, part: int) -> np.ndarray:
        problem = self._problem(name, part)
        if problem is None:
            try:
                values = self._backend.read(name, part)
                if _values_digest(values) == self.manifest["arrays"][name]["shards"][part]["values"]:
                    return values
                problem = "is not read as it was written (what describes the array was changed)"
            except Exception as error:  # the formats' libraries raise anything for a garbled file
                problem = f"cannot be decoded ({first_line(error)})"
        raise DamagedCacheError(
            f"{self._backend.file(name, part)} {problem}; the cache is damaged: delete that file and extract again"
        )

    def _problem(self, name: str, part: int) -> str | None:
        """What is wrong with a shard's file, if anything."""
        path, seal = self._backend.file(name, part), self.manifest["arrays"][name]["shards"][part]
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != seal["bytes"]:
            return f"has {path.stat().st_size} bytes instead of {seal['bytes']}"
        return None if file_digest(path) == seal["sha256"] else "was changed since it was written (its digest differs)"

    def damage(self) -> list[str]:
        """What is wrong with each array that the manifest counts as whole: its shards, and what describes them."""
        found = []
        for name, spec in self.manifest["arrays"].items():
            if not self._backend.declared(name):
                found.append(f"{self.path}: what describes {name} is missing; extract again")
                continue
            for part, seal in enumerate(spec["shards"]):
                try:
                    if seal:
                        self._shard(name, part)
                except DamagedCacheError as error:
                    found.append(str(error))
        return found


class CacheWriter:
    """A cache opened for adding shards to it."""

    def __init__(self, path: Path, manifest: dict) -> None:
        self.path = path
        self.manifest = manifest
        self.backend: Backend = BACKENDS[manifest["store"]](path)

    @classmethod
    def begin(cls, path: Path, identity: dict, store: str, *, fresh: bool = False) -> CacheWriter:
        """Open the cache at `path`, or begin it, inside a `locked(path)`.

        Raises `InputError` as `check_target` does; `fresh` deletes what is there first, heads and results too.
        """
        known = check_target(path, identity, store, fresh=fresh)
        if known is None:
            _clear(path, heads=fresh and (path / "manifest.json").exists())
        for name in _FEATURES:
            for partial in [path / f"{name}.partial", *(path / name).rglob("*.partial")]:
                partial.unlink(missing_ok=True)
        writer = cls(path, known or _new_manifest(identity, store))
        writer.save()
        arrays = writer.manifest["arrays"]
        writer.backend.declare({name: spec for name, spec in arrays.items() if not writer.backend.declared(name)})
        return writer

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
        if new:
            self.backend.declare(new)
            for name, spec in new.items():
                self.manifest["arrays"][name] = {**spec, "shards": [None] * shard_count(spec["shape"][0])}
            self.save()

    def pending(self, name: str) -> set[int]:
        """Parts of which an array lacks a whole shard; a shard whose file is gone is lacking."""
        lacking = set()
        for part, seal in enumerate(self.manifest["arrays"][name]["shards"]):
            path = self.backend.file(name, part)
            if seal is None or not path.is_file() or path.stat().st_size != seal["bytes"]:
                lacking.add(part)
        return lacking

    def write(self, part: int, values: dict[str, np.ndarray]) -> None:
        """Write one part of several arrays, then count them as whole."""
        for name, array in values.items():
            self.backend.write(name, part, array)
            self.manifest["arrays"][name]["shards"][part] = _seal(self.backend.file(name, part), array)
        self.save()

    def save(self) -> None:
        """Replace the manifest."""
        write_manifest(self.path, self.manifest)


def require_writable(path: Path, option: str) -> None:
    """Raise `InputError` unless the folder can be written, or made; `option` names another place."""
    try:
        parent = next(p for p in (path, *path.absolute().parents) if _is_there(p))
        is_folder = stat.S_ISDIR(os.stat(parent).st_mode)
    except OSError as error:
        name = str(path) if len(str(path)) <= 80 else f"{str(path)[:77]}..."
        raise InputError(f"cannot write to {name}: {error.strerror}; choose another place with {option}") from None
    if not is_folder:
        raise InputError(f"cannot write to {path}: {parent} is a file; choose another place with {option}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {path}: no permission in {parent}; choose another place with {option}")


def _is_there(path: Path) -> bool:
    """Whether a path names something, be it a dangling link. Raises an OSError for a name that cannot be one."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep every other writer from the cache at `path`. Raises `InputError` if there is one, or no permission."""
    require_writable(path, "--root or --out")
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    lock = path / ".lock"
    here = lock.exists()
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise InputError(f"another process is writing to {path}; wait for it, or choose another --out") from None
    finally:
        if not here and not (path / "manifest.json").exists():  # nothing was begun
            lock.unlink(missing_ok=True)
            if new:
                path.rmdir()


def check_target(path: Path, identity: dict, store: str, *, fresh: bool = False) -> dict | None:
    """The manifest of the cache at `path` if this identity can be added to it; None if one is to be begun there.

    Changes nothing. Raises `InputError` if a cache of another identity or store is there (with the difference;
    `fresh` is to replace it), if the folder holds something else, or if it cannot be written.
    """
    require_writable(path, "--root or --out")
    if not path.exists():
        return None
    if not (path / "manifest.json").exists():
        # A kill may have left what a cache is made of without its manifest.
        strange = [p.name for p in path.iterdir() if p.name.removesuffix(".partial") not in _OWN]
        if strange:
            raise InputError(f"{path} exists and is not a cache (it holds {min(strange)}); choose another --out")
        return None
    if fresh:
        with contextlib.suppress(DamagedCacheError):  # a damaged one may be replaced, another program's may not
            _read_manifest(path)
        return None
    manifest = _read_manifest(path)
    differ = differences(manifest["identity"], identity)
    if manifest["store"] != store:
        differ.insert(0, f"store: {manifest['store']} / {store}")
    if differ:
        more = f" (and {len(differ) - 3} more)" if len(differ) > 3 else ""
        raise InputError(
            f"{path} was written with other settings (there / asked): {'; '.join(differ[:3])}{more}; "
            "choose another --out, or replace it with --fresh"
        )
    return manifest


def _new_manifest(identity: dict, store: str) -> dict:
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "software": software(),
        "store": store,
        "identity": identity,
        "requested": [],
        "tasks": {},
        "arrays": {},
    }


def _clear(path: Path, *, heads: bool) -> None:
    """Remove what a cache is made of, the manifest first: a kill leaves an unfinished cache rather than a torn one."""
    for name in _FEATURES + (_HEADS if heads else ()):
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class TaskData:
    """One task's tensors in memory, as the fit and its evaluation use them."""

    task: str
    merged: Tensor
    expert: Tensor
    pretrained: Tensor | None
    labels: Tensor
    classifier: Tensor


def load_task(cache: Cache, task: str, split: str = "test") -> TaskData:
    """Read everything a cache holds of one task and split."""
    pretrained = cache.features(task, "pretrained", split) if cache.has(task, "pretrained", split) else None
    merged, expert = (cache.features(task, kind, split) for kind in ("merged", "expert"))
    return TaskData(task, merged, expert, pretrained, cache.labels(task, split), cache.classifier(task))
