"""Caches opened for reading. Everything read is checked against the manifest."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.errors import DamagedCacheError, InputError, first_line
from probsurgery.pipeline.files import SYSTEM_ERRORS, broken_seal, file_size
from probsurgery.pipeline.fingerprints import fingerprint
from probsurgery.pipeline.store.arrays import KINDS, bad_rows, shard_rows, values_digest
from probsurgery.pipeline.store.formats import open_format
from probsurgery.pipeline.store.manifest import IMPORTED, Identity, read_manifest
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
        self.format = open_format(self.manifest.store, self.path)
        self._fingerprints: dict[tuple[str, str], str] = {}

    def __repr__(self) -> str:
        return f"Cache({str(self.path)!r}, arch={self.identity.arch!r}, dim={self.dim})"

    @property
    def identity(self) -> Identity:
        """What determines the numbers in the cache."""
        return self.manifest.identity

    @property
    def fingerprint(self) -> str:
        """Digest of the identity."""
        return fingerprint(self.identity.to_json())

    @property
    def content(self) -> str:
        """Digest of the values of every array, the same in every store."""
        return fingerprint({name: spec.digest for name, spec in self.manifest.arrays.items()})

    def task_fingerprint(self, task: str, split: str = "test") -> str:
        """Digest of what determines the numbers of one task: the identity, its classifier, its images.

        Result rows carry it as `cache`.
        """
        if (task, split) not in self._fingerprints:  # asked for by every head of a sweep
            record = self.manifest.tasks[task]
            parts = [self.identity.to_json(), record.classifier, record.splits[split].to_json()]
            self._fingerprints[task, split] = fingerprint(parts)
        return self._fingerprints[task, split]

    @property
    def titles(self) -> dict[str, str]:
        """Names in tables of the tasks that have others there, by task."""
        return {name: record.title for name, record in self.manifest.tasks.items() if record.title}

    @property
    def dim(self) -> int:
        """d, the features' width."""
        return self.identity.dim

    def missing_shards(self, task: str, split: str) -> tuple[int, int]:
        """Missing and total shards of one task; (0, 0) if the task was never begun."""
        prefix = f"{split}/{task}/"
        specs = [spec for name, spec in self.manifest.arrays.items() if name.startswith(prefix)]
        return sum(len(spec.missing) for spec in specs), sum(len(spec.shards) for spec in specs)

    def is_whole(self, task: str, split: str = "test") -> bool:
        """Whether every shard of a task was written."""
        missing, total = self.missing_shards(task, split)
        return total > 0 and missing == 0

    def tasks(self, split: str = "test") -> tuple[str, ...]:
        """Tasks that the cache holds for a split, in the order of the merge.

        Raises `InputError` if an extraction was begun and not finished.
        """
        for name in self.manifest.requested:
            requested_split, task = name.split("/")
            if requested_split == split:
                self.require(task, split)
        return tuple(task for task in self.identity.tasks if self.is_whole(task, split))

    def require(self, task: str, split: str = "test") -> None:
        """Raise `InputError` unless every shard of the task is there."""
        if task not in self.identity.tasks:
            raise InputError(f"{self.path} has no task {task!r}; it merges: {', '.join(self.identity.tasks)}")
        missing, total = self.missing_shards(task, split)
        if not total and f"{split}/{task}" not in self.manifest.requested:
            advice = f"extract it with --only {task} --split {split}"
            raise InputError(f"{self.path} does not hold {task} ({split}); {advice}")
        again = f"run the same `probsurgery {'import' if self.identity.merge.method == IMPORTED else 'extract'}` again"
        if missing or not total:
            state = f"{missing} of {total} shards are missing" if total else "it was not begun"
            raise InputError(f"{self.path} is unfinished: {task} ({split}): {state}; {again}")
        arrays, record = self.manifest.arrays, self.manifest.tasks.get(task)
        data = self.manifest.split_record(task, split)
        kinds = ("merged", "expert", "labels") if data is None or data.labels else ("merged", "expert")
        needed = [f"{split}/{task}/{kind}" for kind in kinds]
        needed += [f"classifiers/{task}"] if record is None or record.classifier else []
        needed += [name for name in (f"biases/{task}",) if name in arrays]
        lacking = [name for name in needed if name not in arrays or arrays[name].missing]
        if data is None:
            lacking.append(f"the description of {task} ({split})")
        if lacking:
            raise DamagedCacheError(f"{self.path} lacks {lacking[0]}; {again}")

    def has(self, task: str, kind: str, split: str = "test") -> bool:
        """Whether features of this kind were asked for."""
        return f"{split}/{task}/{kind}" in self.manifest.arrays

    def rows(self, task: str, split: str = "test") -> int:
        """N, the task's images in a split, without those that could not be decoded.

        Raises `InputError` if none is left.
        """
        self.require(task, split)
        rows = self.manifest.arrays[f"{split}/{task}/merged"].shape[0] - len(self.skipped(task, split))
        if not rows:
            raise InputError(f"{self.path}: no image of {task} ({split}) could be decoded; give --tasks without it")
        return rows

    def skipped(self, task: str, split: str = "test") -> dict[int, str]:
        """Images that were left out: row in the data set -> why it could not be decoded."""
        record = self.manifest.split_record(task, split)
        return {int(row): problem for row, problem in record.skipped.items()} if record else {}

    def features(self, task: str, kind: str = "merged", split: str = "test", scratch: Path | None = None) -> Tensor:
        """Features (N, d) in float32, not normalised; `kind` is merged, expert or pretrained.

        With `scratch`, they are decoded into a .npy file at that path, shard by shard, and mapped: no more than one
        shard is in memory at a time.
        """
        self.require(task, split)
        if not self.has(task, kind, split):
            kinds = ", ".join(KINDS)
            raise InputError(f"{self.path} holds no {kind!r} features of {task} ({split}); it may hold: {kinds}")
        name, shape = f"{split}/{task}/{kind}", (self.rows(task, split), self.dim)
        self._require_sizes(name)
        if scratch is not None:
            return spill(scratch, shape, self._checked_blocks(name))
        values, row = torch.empty(shape), 0
        for block in self._checked_blocks(name):
            values[row : row + len(block)] = torch.from_numpy(block)
            row += len(block)
        return values

    def has_labels(self, task: str, split: str = "test") -> bool:
        """Whether a task's images have labels."""
        return self.has(task, "labels", split)

    def labels(self, task: str, split: str = "test") -> Tensor:
        """Labels (N,), for evaluation only. Raises `InputError` if there are none."""
        self.require(task, split)
        if not self.has_labels(task, split):
            raise InputError(f"{self.path} holds no labels of {task} ({split}), so there is no accuracy on it")
        return torch.from_numpy(np.concatenate([*self._checked_blocks(f"{split}/{task}/labels")]))

    def classifier(self, task: str) -> Tensor:
        """The weight (C, d) of a task's classifier; of a zero-shot one, unit-norm rows times the logit scale.

        Raises `InputError` if the task has none. `linear_classifier` has its bias, and whether it normalises, too.
        """
        found = self.linear_classifier(task)
        if found is None:
            raise InputError(f"{self.path} holds no classifier of {task}")
        return found.weight

    def linear_classifier(self, task: str) -> Classifier | None:
        """A task's classifier; None if the cache has none of it."""
        if task not in self.manifest.tasks:
            raise InputError(f"{self.path} does not describe the task {task!r}")
        if not self.manifest.tasks[task].classifier:
            return None
        weight, bias = (self._whole(f"{array}/{task}") for array in ("classifiers", "biases"))
        if weight is None:
            raise DamagedCacheError(f"{self.path} lacks classifiers/{task}; extract again with --fresh")
        return Classifier(weight, bias, self.manifest.tasks[task].normalise)

    def truth(self, task: str, split: str = "test") -> tuple[Classifier, Tensor] | None:
        """What accuracy needs: classifier and labels (N,); None for a task that lacks either."""
        classifier = self.linear_classifier(task)
        return (classifier, self.labels(task, split)) if classifier and self.has_labels(task, split) else None

    def _whole(self, name: str) -> Tensor | None:
        """A small array, if the cache has it."""
        if name not in self.manifest.arrays:
            return None
        return torch.from_numpy(np.concatenate([*self._checked_blocks(name)])).float()

    def _checked_blocks(self, name: str) -> Iterator[np.ndarray]:
        """The decoded rows of each shard. Raises `InputError` at the end if `bad_rows` has found some."""
        task, row, bad = name.split("/")[1], 0, []
        classes, wrong = self.manifest.tasks[task].classes, ""
        for block in self._blocks(name):
            rows, wrong = bad_rows(name, block, classes)
            bad += [row + int(found) for found in rows]
            row += len(block)
            yield block
        if bad:
            raise InputError(
                f"{self.path}: {len(bad)} rows of {name} are {wrong}, the first is row {bad[0]}; "
                "check the checkpoints, classifiers and labels that it was made from, and extract again with --fresh"
            )

    def _require_sizes(self, name: str) -> None:
        """Raise unless every file of an array has its size, before memory is allocated for the array."""
        for number, sealed in enumerate(self.manifest.arrays[name].shards):
            file = self.file(name, number)
            if sealed is None or file_size(file) != sealed.bytes:
                self.shard(name, number)  # which raises the error

    def _blocks(self, name: str) -> Iterator[np.ndarray]:
        return (self.decoded_rows(name, number) for number in range(len(self.manifest.arrays[name].shards)))

    def file(self, name: str, number: int) -> Path:
        """The file of one shard."""
        return self.format.file(name, number)

    def broken(self, name: str, number: int) -> str | None:
        """What is wrong with a shard's file, if anything."""
        sealed = self.manifest.arrays[name].shards[number]
        return "was not written" if sealed is None else broken_seal(self.file(name, number), sealed)

    def shard(self, name: str, number: int) -> np.ndarray:
        """One shard's values. Raises `DamagedCacheError` if they are not as they were written."""
        spec, problem = self.manifest.arrays[name], self.broken(name, number)
        sealed = spec.shards[number]
        if sealed and problem is None:
            try:
                values = self.format.read(name, number, spec)
                if values_digest(values) == sealed.values:
                    return values
                problem = "is not read as it was written (the array's metadata was changed)"
            except Exception as error:  # the formats' libraries raise anything for a damaged file
                if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
                    raise
                problem = f"cannot be decoded ({first_line(error)})"
        raise DamagedCacheError(
            f"{self.file(name, number)} {problem}; the cache is damaged: drop the damaged shards with "
            f"`probsurgery cache verify --repair {self.path}`, and extract again"
        )

    def decoded_rows(self, name: str, number: int) -> np.ndarray:
        """One shard's values without the rows of images that could not be decoded."""
        values = self.shard(name, number)
        split, task = name.split("/")[:2]
        rows = shard_rows(number, self.manifest.arrays[name].shape[0])
        skipped = [row - rows.start for row in self.skipped(task, split) if row in rows]
        return np.delete(values, skipped, axis=0) if skipped else values


open_cache = Cache  # the public name
