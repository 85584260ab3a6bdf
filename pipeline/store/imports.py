"""Features that were made elsewhere -> a cache like any other: each array is checked, then all are written."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.config import DTYPES, SPLITS, STORES
from probsurgery.pipeline.errors import InputError, unknown
from probsurgery.pipeline.files import SourceFile
from probsurgery.pipeline.fingerprints import fingerprint
from probsurgery.pipeline.progress import Progress, no_progress
from probsurgery.pipeline.store import manifest as manifests
from probsurgery.pipeline.store.arrays import KINDS, ArraySpec, bad_rows, shard_count, shard_rows
from probsurgery.pipeline.store.lock import locked, require_writable
from probsurgery.pipeline.store.manifest import (
    IMPORTED,
    Identity,
    MergeIdentity,
    Origin,
    SplitRecord,
    TaskRecord,
    described,
)
from probsurgery.pipeline.store.target import check_target
from probsurgery.pipeline.store.writer import CacheWriter

PARTS = (*KINDS, "labels", "classifier", "class_names")
"""What a task may have, besides a split of train images with features and labels of its own."""
_NAME = re.compile(manifests.TASK)
_MOST_NAME, _MOST_CLASSES = 1_000, 2**31


@dataclass(frozen=True)
class Source:
    """An array that is to be imported."""

    where: str
    """Its name in errors."""
    open: Callable[[], np.ndarray]
    """Opens it, mapped from its file if possible."""
    file: SourceFile


@dataclass(frozen=True)
class TaskSources:
    """What is known of one task."""

    splits: Mapping[str, Mapping[str, Source]]
    """By split, then kind of features or `labels`."""
    classifier: Classifier | None = None
    class_names: Sequence[str] = ()
    files: Mapping[str, SourceFile] = field(default_factory=dict)
    """Other files that were read."""


@dataclass(frozen=True)
class _Checked:
    """An array that may be written."""

    source: Source
    spec: ArraySpec
    digest: str
    """Of its values as they will be stored."""
    largest: int = -1
    """The largest label."""


def write_cache(
    path: str | Path,
    tasks: Mapping[str, Mapping[str, Any]],
    *,
    name: str = IMPORTED,
    store: str = "zarr",
    dtype: str = "float32",
    fresh: bool = False,
) -> Path:
    """Write features that you have, as arrays or tensors, to a cache that `fit`, `sweep`, `report` and others take.

        write_cache("cache/mine", {"birds": {
            "merged": merged,              # (N, d): features of the merged encoder, not normalised
            "expert": expert,              # (N, d): the task's own encoder's, of the same N inputs
            "pretrained": pretrained,      # (N, d), optional
            "labels": labels,              # (N,) whole numbers from 0 to C - 1, optional
            "classifier": weight,          # (C, d), or {"weight", "bias", "normalise"}, or another cache's; optional
            "class_names": names,          # C texts, optional
            "train": {"merged": ..., "expert": ...},  # other inputs to fit on, with labels or without; optional
        }})

    Features are of any floating-point type and stored as `dtype`; d is the same for all tasks. A classifier takes
    normalised features unless its `normalise` is False; without one, or without labels, there is bias and no accuracy.
    `name` is the encoder's in tables. Raises `InputError`, before anything is written, for shapes that disagree,
    values that are not finite, labels that are no classes, or a complete cache at `path` without `fresh`.
    """
    if not isinstance(tasks, Mapping):
        raise InputError(f"tasks are a {type(tasks).__name__}; give a dictionary of each task's arrays, by its name")
    sources = {str(task): _from_memory(str(task), parts) for task, parts in tasks.items()}
    return write_features(Path(path), sources, name=name, store=store, dtype=dtype, fresh=fresh)


def write_features(
    path: Path,
    tasks: Mapping[str, TaskSources],
    *,
    name: str = IMPORTED,
    store: str = "zarr",
    dtype: str = "float32",
    fresh: bool = False,
    progress: Progress = no_progress,
) -> Path:
    """Write a cache of these arrays, each opened when it is needed; an interrupted import of the same values goes on.

    Raises `InputError` as `write_cache` does.
    """
    for what, given, allowed in (("store", store, STORES), ("dtype", dtype, DTYPES)):
        if given not in allowed:
            raise unknown(what, given, allowed)
    if not name or len(name) > 100:
        raise InputError(f"the name {name[:40]!r} must have 1 to 100 characters")
    require_writable(path, "--out")
    if not fresh and _is_complete(path):
        raise InputError(f"{path} is a cache already; choose another --out, or replace it with --fresh")
    checked = _check_tasks(tasks, dtype, progress)
    records, own = _records(tasks, checked)
    dim = next(iter(checked.values())).spec.shape[1]
    identity = Identity(
        arch=name,
        suite=IMPORTED,
        dim=dim,
        dtype=dtype,
        precision="",
        limit=None,
        tasks=tuple(tasks),
        checkpoints={},
        preprocessing={},
        merge=MergeIdentity(
            IMPORTED, {}, digest=fingerprint({array: found.digest for array, found in checked.items()})
        ),
    )
    files = {array: found.source.file for array, found in checked.items()}
    for task, sources in tasks.items():
        files |= {f"{task}/{part}": file for part, file in sources.files.items()}
    check_target(path, identity, store, fresh=fresh)
    with locked(path, option="--out"):
        writer = CacheWriter.begin(path, identity, store, fresh=fresh)
        writer.update(tasks=records, files=files)
        writer.request(f"{split}/{task}" for task, sources in tasks.items() for split in sources.splits)
        writer.add_whole(own)
        writer.declare({array: found.spec for array, found in checked.items()})
        for done, (array, found) in enumerate(checked.items()):
            progress(done, len(checked), f"writing {array}", unit="arrays")
            missing = writer.missing(array)
            values = found.source.open() if missing else np.empty(0)
            for number in sorted(missing):
                rows = shard_rows(number, len(values))
                writer.write(number, {array: _stored(values[rows.start : rows.stop], found.spec.dtype)})
    return path


def _is_complete(path: Path) -> bool:
    if not (path / manifests.FILE).exists():
        return False
    manifest = manifests.read_manifest(path)
    begun = {"/".join(name.split("/")[:2]) for name in manifest.arrays}
    return begun >= set(manifest.requested) and not any(spec.missing for spec in manifest.arrays.values())


def _from_memory(task: str, parts: Mapping[str, Any]) -> TaskSources:
    if not isinstance(parts, Mapping):
        raise InputError(f"{task}: give a dictionary of its arrays, and not a {type(parts).__name__}")
    parts, splits = dict(parts), {}
    of_splits = {"test": parts, "train": parts.pop("train", None)}
    for split, own in of_splits.items():
        if own is None:
            continue
        allowed = PARTS if split == "test" else (*KINDS, "labels")
        other = next((part for part in own if part not in allowed), None)
        if other is not None:
            raise unknown(f"part of {task} ({split})", str(other), (*allowed, *(["train"] if split == "test" else [])))
        named = {part: own[part] for part in (*KINDS, "labels") if own.get(part) is not None}
        splits[split] = {part: _in_memory(f"{task}: {part} ({split})", value) for part, value in named.items()}
    try:
        classifier = _classifier(parts.get("classifier"))
    except InputError as error:
        raise InputError(f"{task}: {error}") from None
    return TaskSources(splits, classifier, _names(task, parts.get("class_names")))


def _names(task: str, given: Any) -> tuple[str, ...]:
    names = () if given is None else given
    if isinstance(names, str | Mapping) or not isinstance(names, Iterable):
        raise InputError(
            f"{task}: class_names are a {type(names).__name__}; give a list of texts, in the classes' order"
        )
    return tuple(str(name) if isinstance(name, str) else name for name in names)  # numpy's texts become Python's


def _in_memory(where: str, value: Any) -> Source:
    return Source(where, lambda: to_array(value, where), SourceFile(source="an array in memory"))


def to_array(value: Any, where: str) -> np.ndarray:
    """A tensor or what numpy takes for an array; bfloat16, which numpy lacks, as float32, which holds it exactly."""
    if isinstance(value, np.ma.MaskedArray):
        raise InputError(f"{where} is a masked array; give an array without the masked rows")
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise InputError(f"{where} is a sparse tensor; give a dense one, as by to_dense()")
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where} is no array: {error}") from None


def _classifier(given: Any) -> Classifier | None:
    if given is None or isinstance(given, Classifier):
        return given
    if isinstance(given, nn.Linear):
        given = {"weight": given.weight, "bias": given.bias}
    parts = dict(given) if isinstance(given, Mapping) else {"weight": given}
    other = next((part for part in parts if part not in ("weight", "bias", "normalise")), None)
    normalise = parts.pop("normalise", True)
    if other is not None or parts.get("weight") is None or not isinstance(normalise, bool | np.bool_):
        problem = "a classifier is an array (C, d), or has weight, bias and normalise"
        raise InputError(f"{problem}; bias may be missing, and normalise is True or False")
    tensors = {}
    for part, values in parts.items():
        if values is not None:
            array = to_array(values, part)
            if array.dtype.kind != "f":
                raise InputError(f"a classifier's {part} is {array.dtype}; its values are floating-point numbers")
            tensors[part] = torch.from_numpy(np.array(array, np.float32, order="C"))
    return Classifier(tensors["weight"], tensors.get("bias"), bool(normalise))


def _check_tasks(tasks: Mapping[str, TaskSources], dtype: str, progress: Progress) -> dict[str, _Checked]:
    """Every array by its name in the cache. Raises `InputError` for the first that cannot be imported."""
    if not tasks:
        raise InputError("there is no task to import; give at least one, with merged and expert features")
    spellings = Counter(map(str.lower, tasks))
    for task in tasks:
        if spellings[task.lower()] > 1:
            raise InputError(f"the task name {task!r} is there in two spellings; choose another name")
        if task.lower() in {reserved.lower() for reserved in manifests.RESERVED_TASKS}:
            used = ", ".join(manifests.RESERVED_TASKS)
            raise InputError(
                f"a task cannot be called {task!r}, as tables and manifests use {used}; choose another name"
            )
    for task, sources in tasks.items():
        if not _NAME.fullmatch(task):
            allowed = "letters, digits and _ . + - (first a letter, digit or _), at most 100"
            raise InputError(f"the task name {task[:80]!r} is not allowed; it may have {allowed}")
        for split, own in sources.splits.items():
            lacking = next((kind for kind in ("merged", "expert") if kind not in own), None)
            if lacking:
                raise InputError(f"{task} ({split}) lacks {lacking} features; it needs merged and expert ones")
        _check_class_names(task, sources)
    listed = [(task, split, kind) for task in tasks for split in SPLITS for kind in tasks[task].splits.get(split, {})]
    checked: dict[str, _Checked] = {}
    for done, (task, split, kind) in enumerate(listed):
        name, source = f"{split}/{task}/{kind}", tasks[task].splits[split][kind]
        progress(done, len(listed), f"checking {name}", unit="arrays")
        if kind == "labels":
            checked[name] = _check_labels(source, tasks[task])
        else:
            checked[name] = _check_features(source, name, dtype)
        _compare(checked, name, tasks[task])
    return checked


def _compare(checked: Mapping[str, _Checked], name: str, sources: TaskSources) -> None:
    """Raise `InputError` unless an array agrees in d with the first of all, and in N with the first of its split."""
    found, first = checked[name], next(iter(checked.values()))
    split = name.rpartition("/")[0]
    beside = next(other for array, other in checked.items() if array.rpartition("/")[0] == split)
    if found.spec.shape[0] != beside.spec.shape[0]:
        rows = f"{found.spec.shape[0]:,} rows, but {beside.source.where} has {beside.spec.shape[0]:,}"
        raise InputError(f"{found.source.where} has {rows}; row i of each must be of the same input")
    if found.spec.shape[1:] and found.spec.shape[1] != first.spec.shape[1]:
        widths = f"d = {found.spec.shape[1]}, but {first.source.where} has d = {first.spec.shape[1]}"
        raise InputError(f"{found.source.where} has {widths}; all tasks need one width")
    if sources.classifier is not None and found.spec.shape[1:] not in ((), sources.classifier.weight.shape[1:]):
        shape = tuple(sources.classifier.weight.shape)
        raise InputError(
            f"{found.source.where} has d = {found.spec.shape[1]}, but the classifier {shape} is not (C, d)"
        )


def _check_class_names(task: str, sources: TaskSources) -> None:
    names, classifier = list(sources.class_names), sources.classifier
    wrong = next((n for n in names if not isinstance(n, str) or not n.strip() or len(n) > _MOST_NAME), None)
    if wrong is not None:
        raise InputError(f"{task}: the class name {str(wrong)[:40]!r} is no text of 1 to {_MOST_NAME:,} characters")
    twice = next((n for n in names if names.count(n) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise InputError(f"{task}: the class name {twice[:80]!r} is there twice")
    if classifier is not None:
        if names and len(names) != len(classifier.weight):
            raise InputError(
                f"{task}: {len(names):,} class names for a classifier of {len(classifier.weight):,} classes"
            )
        for array, values in described(classifier, task)[1].items():
            bad, wrong = bad_rows(array, values, 0)
            if len(bad):
                raise InputError(f"{task}: rows of its classifier are {wrong}; the first is row {bad[0]}")


def _check_features(source: Source, name: str, dtype: str) -> _Checked:
    values = source.open()
    if values.dtype.kind != "f":
        raise InputError(f"{source.where} holds {values.dtype}; features are floating-point numbers")
    if values.ndim != 2 or 0 in values.shape or values.shape[1] > manifests.MOST_DIM:
        raise InputError(f"{source.where} has shape {values.shape}; features are (N, d), with d up to 65,536")
    digest = hashlib.sha256(str(values.shape).encode())
    for rows, block in _blocks(values, dtype):
        bad, wrong = bad_rows(name, block, 0)
        if len(bad):
            raise InputError(f"{source.where} is {wrong} in row {rows.start + bad[0]} (as {dtype})")
        digest.update(block.data)
    return _Checked(source, ArraySpec(values.shape, dtype), digest.hexdigest())


def _check_labels(source: Source, sources: TaskSources) -> _Checked:
    values = source.open()
    if values.dtype.kind not in "iu" or values.ndim != 1:
        given = f"{values.dtype} of shape {values.shape}"
        raise InputError(f"{source.where} is {given}; labels are whole numbers of shape (N,), from 0 to C - 1")
    if not len(values):
        raise InputError(f"{source.where} is empty")
    classes = len(sources.classifier.weight) if sources.classifier else len(sources.class_names) or None
    wrong = (values < 0) | (values >= (_MOST_CLASSES if classes is None else classes))
    if wrong.any():
        row, last = int(np.flatnonzero(wrong)[0]), "" if classes is None else f" to {classes - 1}"
        raise InputError(f"{source.where} has the label {values[row]} in row {row}; labels are classes from 0{last}")
    stored = values.astype(np.int64)
    digest = hashlib.sha256(stored.data).hexdigest()
    return _Checked(source, ArraySpec(values.shape, "int64"), digest, int(values.max()))


def _blocks(values: np.ndarray, dtype: str) -> Iterator[tuple[range, np.ndarray]]:
    """Shards of an array as they are stored."""
    for number in range(shard_count(len(values))):
        rows = shard_rows(number, len(values))
        yield rows, _stored(values[rows.start : rows.stop], dtype)


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # which is then found as infinite
        return np.ascontiguousarray(values, dtype)


def _records(
    tasks: Mapping[str, TaskSources], checked: Mapping[str, _Checked]
) -> tuple[dict[str, TaskRecord], dict[str, np.ndarray]]:
    """The tasks' records, and the arrays of their classifiers."""
    records: dict[str, TaskRecord] = {}
    own: dict[str, np.ndarray] = {}
    for task, sources in tasks.items():
        record, classifier = described(sources.classifier, task, sources.class_names)
        splits, origins = {}, {}
        for split, parts in sources.splits.items():
            of_split = {kind: checked[f"{split}/{task}/{kind}"] for kind in parts}
            digest = fingerprint({kind: found.digest for kind, found in of_split.items()})
            rows = of_split["merged"].spec.shape[0]
            splits[split] = SplitRecord(rows, digest, labels="labels" in parts)
            origins[split] = Origin(source=of_split["merged"].source.file.source)
        largest = max(
            (checked[f"{split}/{task}/labels"].largest for split in splits if splits[split].labels), default=-1
        )
        records[task] = replace(record, classes=record.classes or largest + 1, splits=splits, origins=origins)
        own |= classifier
    return records, own
