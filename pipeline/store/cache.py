"""Caches opened for reading: what one holds, and that it is as it was written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from probsurgery.pipeline.errors import DamagedCacheError, InputError, first_line
from probsurgery.pipeline.files import broken_seal
from probsurgery.pipeline.fingerprints import fingerprint
from probsurgery.pipeline.store.formats import BACKENDS, Backend, part_range
from probsurgery.pipeline.store.manifest import KINDS, content_digest, read_manifest, values_digest
from probsurgery.pipeline.store.memmap import spill


class Cache:
    """A cache opened for reading.

    `cache.features("mnist")` gives merged features (N, d) in float32; see also `labels` and `classifier`. Everything
    read is checked against the manifest first. Raises `InputError` for what is not there and `DamagedCacheError`,
    naming the file, for what is not as it was written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
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

    @property
    def content(self) -> str:
        """Digest of the values of every array, the same in every store."""
        return content_digest(self.manifest)

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
            self._require_parts(task, split)
            return
        if total or f"{split}/{task}" in self.manifest["requested"]:
            state = f"{missing} of {total} shards are missing" if total else "it was not begun"
            raise InputError(
                f"{self.path} is unfinished: {task} ({split}): {state}; run the same `probsurgery extract` again"
            )
        raise InputError(f"{self.path} does not hold {task} ({split}); extract it with --only {task} --split {split}")

    def _require_parts(self, task: str, split: str) -> None:
        arrays, about = self.manifest["arrays"], self.manifest["tasks"].get(task, {"splits": {}})
        needed = [*(f"{split}/{task}/{kind}" for kind in ("merged", "expert", "labels")), f"classifiers/{task}"]
        lacking = [name for name in needed if name not in arrays or None in arrays[name]["shards"]]
        if lacking or split not in about["splits"]:
            what = lacking[0] if lacking else f"what it says of {task} ({split})"
            raise DamagedCacheError(f"{self.path} lacks {what}; run the same `probsurgery extract` again")

    def has(self, task: str, kind: str, split: str = "test") -> bool:
        """Whether features of this kind were asked for."""
        return f"{split}/{task}/{kind}" in self.manifest["arrays"]

    def rows(self, task: str, split: str = "test") -> int:
        """N, the task's images in a split, without those that were left out because they could not be decoded.

        Raises `InputError` if none is left.
        """
        self.require(task, split)
        rows = self.manifest["arrays"][f"{split}/{task}/labels"]["shape"][0] - len(self.skipped(task, split))
        if not rows:
            raise InputError(f"{self.path}: no image of {task} ({split}) could be decoded; give --tasks without it")
        return rows

    def skipped(self, task: str, split: str = "test") -> dict[int, str]:
        """Images that were left out: row in the data set -> why it could not be decoded."""
        about = self.manifest["tasks"].get(task, {"splits": {}})["splits"].get(split, {})
        return {int(row): problem for row, problem in about.get("skipped", {}).items()}

    def features(self, task: str, kind: str = "merged", split: str = "test", scratch: Path | None = None) -> Tensor:
        """Features (N, d) in float32, not normalised; `kind` is merged, expert or pretrained.

        With `scratch`, they are decoded into a .npy file at that path, shard by shard, and mapped: however many there
        are, no more than a shard is in memory.
        """
        self.require(task, split)
        if not self.has(task, kind, split):
            raise InputError(
                f"{self.path} holds no {kind!r} features of {task} ({split}); it may hold: {', '.join(KINDS)}"
            )
        name, shape = f"{split}/{task}/{kind}", (self.rows(task, split), self.dim)
        self._require_sizes(name)
        bad: list[int] = []

        def blocks() -> Iterator[np.ndarray]:
            row = 0
            for block in self._blocks(name, self.skipped(task, split)):
                bad.extend(row + np.flatnonzero(~np.isfinite(block).all(-1)))
                row += len(block)
                yield block

        if scratch is None:
            values, filled = torch.empty(shape), 0
            for block in blocks():
                values[filled : filled + len(block)] = torch.from_numpy(block)
                filled += len(block)
        else:
            values = spill(scratch, shape, blocks())
        if bad:
            raise InputError(
                f"{self.path}: {kind} features of task {task} ({split}) are NaN or infinite in {len(bad)} rows, "
                f"first in row {bad[0]}; check the checkpoints and extract again with --fresh"
            )
        return values

    def labels(self, task: str, split: str = "test") -> Tensor:
        """Labels (N,), for evaluation only."""
        self.require(task, split)
        return torch.from_numpy(np.concatenate([*self._blocks(f"{split}/{task}/labels", self.skipped(task, split))]))

    def classifier(self, task: str) -> Tensor:
        """Zero-shot classifier (C, d), rows unit-norm times the logit scale."""
        return torch.from_numpy(np.concatenate([*self._blocks(f"classifiers/{task}")])).float()

    def _require_sizes(self, name: str) -> None:
        """Have every file of an array there, in its size, before memory is taken for the whole."""
        for part, sealed in enumerate(self.manifest["arrays"][name]["shards"]):
            file = self.file(name, part)
            if not file.is_file() or file.stat().st_size != sealed["bytes"]:
                self.shard(name, part)  # which says what is wrong

    def _blocks(self, name: str, left_out: dict[int, str] | None = None) -> Iterator[np.ndarray]:
        """An array's shards, without the rows that were left out."""
        spec = self.manifest["arrays"][name]
        for part in range(len(spec["shards"])):
            rows = part_range(part, spec["shape"][0])
            holes = [row - rows.start for row in left_out or () if row in rows]
            values = self.shard(name, part)
            yield np.delete(values, holes, axis=0) if holes else values

    def file(self, name: str, part: int) -> Path:
        """The file of one shard."""
        return self._backend.file(name, part)

    def description(self, name: str) -> tuple[Path, ...]:
        """The files that describe an array to plain readers of the format."""
        return self._backend.metadata(name)

    def described(self, name: str) -> bool:
        """Whether plain readers are shown what the cache holds."""
        try:
            return self._backend.described(name, self.manifest["arrays"][name])
        except Exception:  # the formats' libraries raise anything for a garbled file
            return False

    def broken(self, name: str, part: int) -> str | None:
        """What is wrong with a shard's file, if anything."""
        sealed = self.manifest["arrays"][name]["shards"][part]
        return "was not written" if sealed is None else broken_seal(self.file(name, part), sealed)

    def shard(self, name: str, part: int) -> np.ndarray:
        """One shard's values. Raises `DamagedCacheError` if they are not as they were written."""
        spec, problem = self.manifest["arrays"][name], self.broken(name, part)
        if problem is None:
            try:
                values = self._backend.read(name, part, spec)
                if values_digest(values) == spec["shards"][part]["values"]:
                    return values
                problem = "is not read as it was written (what describes the array was changed)"
            except Exception as error:  # the formats' libraries raise anything for a garbled file
                problem = f"cannot be decoded ({first_line(error)})"
        raise DamagedCacheError(
            f"{self.file(name, part)} {problem}; the cache is damaged: drop what is with "
            f"`probsurgery cache verify --repair {self.path}`, and extract again"
        )
