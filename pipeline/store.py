"""Caches on disk: features in zarr or HDF5 shards, and the manifest that says which of them are whole.

This is the only module that knows zarr and h5py. An array is cut into shards of `SHARD_ROWS` rows. Each shard is a file
that appears at once or not at all, and counts only when the manifest, replaced atomically after it, gives its size and
digest. Every chunk carries a checksum too, so that a plain zarr or h5py reader is told of damage. Rows that were never
written read as NaN (labels: -1) there, because both formats would else make up zeros.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from probsurgery.pipeline.config import differences, fingerprint
from probsurgery.pipeline.errors import DamagedCacheError, InputError, first_line

SCHEMA = 1
SHARD_ROWS = 2048
CHUNK_ROWS = 256
KINDS = ("merged", "expert", "pretrained")


def _fill(dtype: str) -> float | int:
    return math.nan if dtype.startswith("float") else -1


class Backend(Protocol):
    """How arrays lie on disk. Values read are checked by the format's own checksums, and by `Cache` besides."""

    def declare(self, arrays: dict[str, dict]) -> None:
        """Make arrays known, each `{"shape", "dtype"}` under its name, to plain readers of the format."""

    def write(self, name: str, part: int, values: np.ndarray) -> None:
        """Write one shard, atomically."""

    def read(self, name: str, part: int) -> np.ndarray:
        """Read one shard. Raises an OSError or ValueError if a checksum does not hold."""

    def file(self, name: str, part: int) -> Path:
        """The file of one shard."""


class ZarrBackend:
    """`features.zarr`: a zarr v3 group, sharded, each chunk with a CRC32C."""

    def __init__(self, cache: Path) -> None:
        self.root = cache / "features.zarr"

    def declare(self, arrays: dict[str, dict]) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec

        group = zarr.open_group(self.root, mode="a")
        for name, spec in arrays.items():
            rest = spec["shape"][1:]
            group.create_array(
                name,
                shape=spec["shape"],
                dtype=spec["dtype"],
                shards=(SHARD_ROWS, *rest),
                chunks=(CHUNK_ROWS, *rest),
                # Crc32c asked for by name: sharding alone checks its index only, not the chunks.
                compressors=[Crc32cCodec()],
                fill_value=_fill(spec["dtype"]),
                overwrite=True,
            )

    def write(self, name: str, part: int, values: np.ndarray) -> None:
        import zarr

        # Else zarr leaves out a chunk that equals the fill value.
        array = zarr.open_array(self.root, path=name, mode="r+").with_config({"write_empty_chunks": True})
        array[part * SHARD_ROWS : part * SHARD_ROWS + len(values)] = values

    def read(self, name: str, part: int) -> np.ndarray:
        import zarr

        array = zarr.open_array(self.root, path=name, mode="r")
        return array[part * SHARD_ROWS : (part + 1) * SHARD_ROWS]

    def file(self, name: str, part: int) -> Path:
        columns = ("0",) if not name.endswith("labels") else ()
        return self.root.joinpath(name, "c", str(part), *columns)


class Hdf5Backend:
    """`shards/`: an HDF5 file for each shard, with Fletcher32; `features.h5` joins them as virtual data sets."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def declare(self, arrays: dict[str, dict]) -> None:
        import h5py

        index = self.cache / "features.h5"
        partial = index.with_name("features.h5.partial")
        if index.exists():
            shutil.copyfile(index, partial)
        with h5py.File(partial, "a", libver="latest") as file:
            for name, spec in arrays.items():
                if name in file:
                    del file[name]
                rows, rest = spec["shape"][0], tuple(spec["shape"][1:])
                layout = h5py.VirtualLayout(tuple(spec["shape"]), spec["dtype"])
                for part in range(_parts(spec)):
                    start, stop = part * SHARD_ROWS, min(rows, (part + 1) * SHARD_ROWS)
                    source = self.file(name, part).relative_to(self.cache).as_posix()
                    layout[start:stop] = h5py.VirtualSource(source, "data", shape=(stop - start, *rest))
                file.create_virtual_dataset(name, layout, fillvalue=_fill(spec["dtype"]))
        partial.replace(index)

    def write(self, name: str, part: int, values: np.ndarray) -> None:
        import h5py

        path = self.file(name, part)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        chunks = (min(CHUNK_ROWS, len(values)), *values.shape[1:])
        with h5py.File(partial, "w", libver="latest") as file:
            file.create_dataset("data", data=values, chunks=chunks, fletcher32=True, track_times=False)
        partial.replace(path)

    def read(self, name: str, part: int) -> np.ndarray:
        import h5py

        with h5py.File(self.file(name, part), "r") as file:
            return file["data"][:]

    def file(self, name: str, part: int) -> Path:
        return self.cache / "shards" / f"{name}-{part:05d}.h5"


BACKENDS = {"zarr": ZarrBackend, "hdf5": Hdf5Backend}


def _parts(spec: dict) -> int:
    return math.ceil(spec["shape"][0] / SHARD_ROWS)


def _seal(path: Path) -> dict:
    """Size and digest of a shard's file, as kept in the manifest."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


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


def _read_manifest(path: Path) -> dict:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        what = "is not a cache (it has no manifest.json)" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}; `probsurgery extract` writes one") from None
    except NotADirectoryError:
        raise InputError(f"{path} is not a cache; `probsurgery extract` writes one") from None
    except ValueError as error:
        raise DamagedCacheError(f"{file} is not valid JSON ({error}); extract again with --fresh") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int):
        raise DamagedCacheError(f"{file} does not describe a cache; extract again with --fresh")
    if schema > SCHEMA:
        raise InputError(
            f"{path} was written by a newer version (schema {schema}, this one reads up to {SCHEMA}); "
            "update probsurgery"
        )
    missing = {"identity", "store", "tasks", "requested", "arrays"} - manifest.keys()
    if missing or manifest["store"] not in BACKENDS:
        raise DamagedCacheError(f"{file} is incomplete or garbled; extract again with --fresh")
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

    def __repr__(self) -> str:
        return f"Cache({str(self.path)!r}, arch={self.identity['arch']!r}, dim={self.dim})"

    @property
    def identity(self) -> dict:
        """What determines the numbers in the cache."""
        return self.manifest["identity"]

    @property
    def fingerprint(self) -> str:
        """Digest of the identity; results name it."""
        return fingerprint(self.identity)

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
        if self.is_whole(task, split):
            return
        missing, total = self.missing_shards(task, split)
        if total or f"{split}/{task}" in self.manifest["requested"]:
            state = f"{missing} of {total} shards are missing" if total else "it was not begun"
            raise InputError(
                f"{self.path} is unfinished: {task} ({split}): {state}; run the same `probsurgery extract` again"
            )
        raise InputError(f"{self.path} does not hold {task} ({split}); extract it with --only {task} --split {split}")

    def has(self, task: str, kind: str, split: str = "test") -> bool:
        return f"{split}/{task}/{kind}" in self.manifest["arrays"]

    def rows(self, task: str, split: str = "test") -> int:
        """N, the task's images in a split."""
        self.require(task, split)
        return self.manifest["arrays"][f"{split}/{task}/labels"]["shape"][0]

    def features(self, task: str, kind: str = "merged", split: str = "test") -> Tensor:
        """Features (N, d) in float32, not normalised; `kind` is merged, expert or pretrained."""
        self.require(task, split)
        if not self.has(task, kind, split):
            raise InputError(
                f"{self.path} holds no {kind!r} features of {task} ({split}); it may hold: {', '.join(KINDS)}"
            )
        values = torch.from_numpy(self._array(f"{split}/{task}/{kind}")).float()
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
        return torch.from_numpy(self._array(f"{split}/{task}/labels"))

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
                return self._backend.read(name, part)
            except (OSError, ValueError, KeyError) as error:
                problem = f"cannot be decoded ({first_line(error)})"
        raise DamagedCacheError(
            f"{self._backend.file(name, part)} {problem}; the cache is damaged: delete that file and extract again"
        )

    def _problem(self, name: str, part: int) -> str | None:
        """What is wrong with a shard's file, if anything."""
        path, seal = self._backend.file(name, part), self.manifest["arrays"][name]["shards"][part]
        if not path.is_file():
            return "is missing"
        found = _seal(path)
        if found["bytes"] != seal["bytes"]:
            return f"has {found['bytes']} bytes instead of {seal['bytes']}"
        return None if found == seal else "was changed since it was written (its digest differs)"

    def damage(self) -> list[str]:
        """Every shard that the manifest counts as whole and that is not, each with what is wrong."""
        found = []
        for name, spec in self.manifest["arrays"].items():
            for part, seal in enumerate(spec["shards"]):
                problem = self._problem(name, part) if seal else None
                if problem:
                    found.append(f"{self._backend.file(name, part)} {problem}")
        return found


class CacheWriter:
    """A cache opened for adding shards to it; it is locked until the context ends."""

    def __init__(self, path: Path, manifest: dict) -> None:
        self.path = path
        self.manifest = manifest
        self.backend: Backend = BACKENDS[manifest["store"]](path)

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, identity: dict, store: str, *, fresh: bool = False) -> Iterator[CacheWriter]:
        """Open the cache at `path`, or begin it.

        Raises `InputError` if a cache of another identity or store is there (with the difference; `fresh` replaces
        it), if the folder holds something else, if it cannot be written to, or if another process is writing.
        """
        check_target(path, identity, store, fresh=fresh)
        path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path / ".lock", timeout=0):
                if fresh:
                    _clear(path)
                for partial in path.rglob("*.partial"):
                    if partial.is_file():
                        partial.unlink()
                writer = cls(path, _begin(path, identity, store))
                writer.save()
                yield writer
        except Timeout:
            raise InputError(f"another process is writing to {path}; wait for it, or choose another --out") from None

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
            self.manifest["arrays"] |= {n: {**spec, "shards": [None] * _parts(spec)} for n, spec in new.items()}
            self.save()

    def pending(self, names: list[str]) -> set[int]:
        """Parts of which at least one of these arrays lacks a whole shard; a shard whose file is gone is lacking."""
        lacking = set()
        for name in names:
            for part, seal in enumerate(self.manifest["arrays"][name]["shards"]):
                path = self.backend.file(name, part)
                if seal is None or not path.is_file() or path.stat().st_size != seal["bytes"]:
                    lacking.add(part)
        return lacking

    def write(self, part: int, values: dict[str, np.ndarray]) -> None:
        """Write one part of several arrays, then count them as whole."""
        for name, array in values.items():
            self.backend.write(name, part, array)
            self.manifest["arrays"][name]["shards"][part] = _seal(self.backend.file(name, part))
        self.save()

    def save(self) -> None:
        write_atomically(self.path / "manifest.json", json.dumps(self.manifest, indent=1) + "\n")


def require_writable(path: Path, option: str) -> None:
    """Raise `InputError` unless the folder can be written, or made; `option` names another place."""
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise InputError(f"cannot write to {path}: {parent} is a file; choose another place with {option}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {path}: no permission in {parent}; choose another place with {option}")


def check_target(path: Path, identity: dict, store: str, *, fresh: bool = False) -> None:
    """Raise `InputError` if a cache of this identity cannot be written at `path`; changes nothing."""
    require_writable(path, "--root")
    if not path.exists():
        return
    if not (path / "manifest.json").exists():
        if any(p.name != ".lock" for p in path.iterdir()):
            raise InputError(f"{path} exists and is not a cache; choose another --out")
        return
    if fresh:
        return
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


def _begin(path: Path, identity: dict, store: str) -> dict:
    if (path / "manifest.json").exists():
        return _read_manifest(path)
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


def _clear(path: Path) -> None:
    """Remove what a cache is made of, the manifest first so that a kill leaves no cache rather than a torn one."""
    for name in ("manifest.json", "results.jsonl", "features.h5"):
        (path / name).unlink(missing_ok=True)
    for name in ("features.zarr", "shards", "heads"):
        shutil.rmtree(path / name, ignore_errors=True)


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
