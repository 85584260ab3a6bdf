"""The manifest of a cache: what the cache holds, how it was made, and a seal for each of its files.

docs/cache-format.md describes it. A shard counts only when the manifest, replaced atomically after it, has its seal.
The manifest carries a digest of itself; that finds damage, and not forgery, so its form is checked before anything in
it is used: no name leads out of the cache's folder, and no size is larger than the files bear out.
"""

import datetime
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from probsurgery.pipeline import files
from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.config import DTYPES, SPLITS, STORES
from probsurgery.pipeline.errors import DamagedCacheError, InputError
from probsurgery.pipeline.files import (
    Count,
    MalformedError,
    Name,
    Number,
    Record,
    Seal,
    Setting,
    SourceFile,
    Text,
    refuse_links,
)
from probsurgery.pipeline.fingerprints import fingerprint
from probsurgery.pipeline.store.arrays import KINDS, ArraySpec, Rows, has_columns, shard_count, shard_shape

SCHEMA = 2
"""The newest that is read. Caches that version 1 describes rightly are written as such: see `_schema`."""
FILE = "manifest.json"
MERGED, COEFFICIENTS = "merged.safetensors", "coefficients.json"
"""Files that keep what a merge has learned."""
IMPORTED = "imported"
"""The method of a cache whose features were made elsewhere."""
LearnedFile = Annotated[str, Meta(pattern=rf"\A(?:{re.escape(MERGED)}|{re.escape(COEFFICIENTS)})\Z")]
MOST_BYTES = 2**28
"""Of a manifest; a cache of the papers' eight tasks has some 100 KB."""
TASK = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}"
_ARRAY = re.compile(rf"(?:({'|'.join(SPLITS)})/({TASK})/({'|'.join(KINDS)}|labels)|(?:classifiers|biases)/({TASK}))")

RESERVED_TASKS = ("Avg", "average", "bias", "elsewhere", "pretrained")
"""Names that stand for something else beside tasks' names, in tables and among files; in any case."""

TaskName = Annotated[str, Meta(pattern=rf"\A{TASK}\Z")]
Split = Annotated[str, Meta(pattern=rf"\A(?:{'|'.join(SPLITS)})\Z")]
MOST_DIM = 2**16
Dim = Annotated[int, Meta(ge=1, le=MOST_DIM)]
Request = Annotated[str, Meta(pattern=rf"\A(?:{'|'.join(SPLITS)})/{TASK}\Z")]
"""`<split>/<task>`."""
RowNumber = Annotated[str, Meta(pattern=r"\A[0-9]{1,13}\Z")]
MetadataFile = Annotated[str, Meta(pattern=rf"\A(?:features\.h5|features\.zarr/(?:{TASK}/){{0,3}}zarr\.json)\Z")]


class SplitRecord(Record, frozen=True):
    """The images of one split of a task."""

    rows: Rows
    fingerprint: str
    skipped: Mapping[RowNumber, str] = {}
    """Images that could not be decoded: row -> why. Their features are NaN, their labels -1."""
    decoding: Count = 0
    """Version of the decoding of image files; 0 for the mini suite's images, and in caches from before it had one."""
    labels: bool = True
    """Whether there are labels."""


class Origin(Record, frozen=True):
    """Where the images of a split are from."""

    source: str = ""
    class_order: str = ""
    """Whether the source's list of class names agrees with the task's."""


class TaskRecord(Record, frozen=True, kw_only=True):
    """One task of a cache."""

    title: Text = ""
    """Its name in tables, if it has another there."""
    classes: Count
    """C; 0 if it is not known."""
    class_names: tuple[str, ...] = ()
    classifier: str
    """Digest of the classifier; "" for a task without one."""
    normalise: bool = True
    """Whether the classifier takes L2-normalised features."""
    splits: Mapping[Split, SplitRecord]
    origins: Mapping[Split, Origin] = {}


class MergeIdentity(Record, frozen=True):
    """What determines a merged model."""

    method: Text
    settings: Mapping[Name, Setting]
    name: Text | None = None
    """Name that was given to a merged checkpoint."""
    digest: str | None = None
    """Of the merged weights; None as long as they are not known."""


class Identity(Record, frozen=True, kw_only=True):
    """What determines the numbers in a cache; never the device, the batch size or the worker count."""

    corruption: str | None = None
    arch: str
    """Name of the encoder."""
    encoder: Mapping[str, Any] = {}
    """What rebuilds an encoder that its name alone does not: its `library` and `config`."""
    suite: str
    dim: Dim
    """d, the features' width."""
    dtype: Annotated[str, Meta(pattern=rf"\A(?:{'|'.join(DTYPES)})\Z")]
    precision: str
    limit: int | None
    tasks: tuple[TaskName, ...]
    """Tasks that are merged, in order."""
    checkpoints: Mapping[str, str]
    """Digests of the encoders' weights: `pretrained`, and each expert by its task."""
    preprocessing: Mapping[Name, Setting | list[Number]]
    """Of images, as `models.preprocessing.Preprocessing`."""
    merge: MergeIdentity


class Run(Record, frozen=True, kw_only=True, omit_defaults=False):
    """One run of `extract` that added to the cache."""

    images: Count
    passes: Count = 0
    """Forward passes of a single image through a single encoder."""
    taken: Mapping[str, Count] = {}
    """Passes saved: rows of features taken from other caches, by the cache's name."""
    ranks: int = 1
    seconds: Mapping[str, float] = {}
    device: str = ""


class MergeRecord(Record, frozen=True):
    """What a merge has learned, and how."""

    seconds: float | None = None
    entropy: Mapping[str, float] = {}
    """Mean entropy of the predictions, over the first and the last steps."""
    images: Mapping[str, str] = {}
    """Fingerprints of the images that it learned from, by task; by `split/task` if its parts used different splits."""
    files: Mapping[LearnedFile, Seal] = {}
    chosen: Mapping[Name, float] = {}
    """Numbers that were chosen on images, such as `rescale.factor`."""
    coefficients: Mapping[str, float | tuple[float, ...]] | None = None


class Conversion(Record, frozen=True):
    """The cache that this one was converted from."""

    store: str
    dtype: str
    content: str
    tasks: str
    """Digest of its description of the tasks."""


class Manifest(Record, frozen=True, kw_only=True):
    """Everything that is known of a cache. Changed with `msgspec.structs.replace`, and by `CacheWriter` alone."""

    schema: int
    created: str = ""
    software: Mapping[str, str] = {}
    store: Annotated[str, Meta(pattern=rf"\A(?:{'|'.join(STORES)})\Z")]
    identity: Identity
    requested: tuple[Request, ...]
    tasks: Mapping[TaskName, TaskRecord]
    arrays: Mapping[str, ArraySpec]
    metadata: Mapping[MetadataFile, Seal] = {}
    """Seals of the files that describe arrays to plain readers of the format, by path."""
    files: Mapping[str, SourceFile] = {}
    merge: MergeRecord = MergeRecord()
    runs: tuple[Run, ...] = ()
    precision: Mapping[str, float] = {}
    """By array: relative difference of its first features from fp32's."""
    converted_from: Conversion | None = None

    def split_record(self, task: str, split: str) -> SplitRecord | None:
        """The images of one split of a task, if they are described."""
        return self.tasks[task].splits.get(split) if task in self.tasks else None


def described(
    classifier: Classifier | None, name: str, class_names: Sequence[str] = (), title: str = ""
) -> tuple[TaskRecord, dict[str, np.ndarray]]:
    """A new task's record, without splits, and the arrays of its classifier."""
    arrays = {}
    if classifier is not None:
        arrays[f"classifiers/{name}"] = classifier.weight.cpu().numpy()
        if classifier.bias is not None:
            arrays[f"biases/{name}"] = classifier.bias.cpu().numpy()
    record = TaskRecord(
        title="" if title == name else title,
        classes=len(class_names) or (len(classifier.weight) if classifier else 0),
        class_names=tuple(class_names),
        classifier=classifier.digest if classifier else "",
        normalise=classifier.normalise if classifier else True,
        splits={},
    )
    return record, arrays


def new_manifest(identity: Identity, store: str) -> Manifest:
    """The manifest of a cache that holds nothing yet."""
    return Manifest(
        schema=1,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        software=software(),
        store=store,
        identity=identity,
        requested=(),
        tasks={},
        arrays={},
    )


def software() -> dict[str, str]:
    """Versions of what a cache's numbers depend on."""
    versions = {}
    for name in ("probsurgery", "torch", "open_clip_torch", "zarr", "h5py", "numpy", "pillow"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _schema(manifest: Manifest) -> int:
    """The oldest version of the format whose readers read this cache rightly."""
    new = (
        bool(manifest.identity.encoder),
        any(name.startswith("biases/") for name in manifest.arrays),
        any(not task.normalise or not task.classifier for task in manifest.tasks.values()),
        any(not split.labels for task in manifest.tasks.values() for split in task.splits.values()),
    )
    return 2 if any(new) else 1


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace a cache's manifest, with a digest of itself."""
    plain = manifest.to_json() | {"schema": _schema(manifest)}
    files.write_json(path / FILE, plain | {"digest": fingerprint(plain)})


def read_manifest(path: Path) -> Manifest:
    """The manifest of the cache at `path`, its form checked.

    Raises `InputError` if there is no cache, one of a newer schema or one that holds links, and `DamagedCacheError` if
    the manifest is not as it was written.
    """
    file = path / FILE
    if os.path.lexists(file):  # else it is any folder, and may be a large one
        refuse_links(path)
    try:
        plain = files.read_json(file, MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        problem = "is not a cache (it has no manifest.json)" if path.exists() else "does not exist"
        raise InputError(f"{path} {problem}; `probsurgery extract` writes one") from None
    except MalformedError as error:
        raise DamagedCacheError(f"{file} is damaged ({error}); delete the folder and extract again") from None
    schema = plain.get("schema") if isinstance(plain, dict) else None
    if type(schema) is int and schema > SCHEMA:
        newer = f"schema {schema}, this one reads up to {SCHEMA}"
        raise InputError(f"{path} was written by a newer version ({newer}); update probsurgery")
    if type(schema) is not int or "identity" not in plain:
        raise InputError(f"{file} is not a cache's manifest")
    if plain.pop("digest", None) != fingerprint(plain):
        raise DamagedCacheError(f"{file} was changed since it was written (its digest differs); extract with --fresh")
    return checked_manifest(plain, file)


def checked_manifest(plain: object, file: Path) -> Manifest:
    """A manifest from JSON's types. Raises `DamagedCacheError` unless each field is valid, and all agree."""
    try:
        manifest = files.decode(Manifest, plain)
        for problem in _disagreements(manifest):
            raise MalformedError(problem)
        return manifest
    except MalformedError as error:
        raise DamagedCacheError(
            f"{file} does not have a manifest's form ({error}); do not use this cache, and extract it again"
        ) from None


def _disagreements(manifest: Manifest) -> Iterator[str]:
    """What no single field shows to be wrong, as clauses."""
    merged = manifest.identity.tasks
    if len(set(merged)) < len(merged):
        yield "a task is merged twice"
    for requested in manifest.requested:
        if requested.partition("/")[2] not in merged:
            yield f"the requested {requested!r} is not of a merged task"
    for name, task in manifest.tasks.items():
        if name not in merged:
            yield f"the task {name} is described and not merged"
        for split, data in task.splits.items():
            if any(int(row) >= data.rows for row in data.skipped):
                yield f"{name} ({split}) skips a row beyond the last"
    for name, spec in manifest.arrays.items():
        yield from _array_disagreements(name, spec, manifest)
    coefficients = (manifest.merge.coefficients or {}).values()
    if len({len(row) if isinstance(row, tuple) else 1 for row in coefficients}) > 1:
        yield "the tasks have different numbers of merging coefficients"


def _array_disagreements(name: str, spec: ArraySpec, manifest: Manifest) -> Iterator[str]:
    match = _ARRAY.fullmatch(name)
    if match is None:
        yield f"no cache has an array called {name[:80]!r}"
        return
    split, task, kind, classifier = match.groups()
    if (task or classifier) not in manifest.identity.tasks:
        yield f"the array {name} is of a task that is not merged"
    dtype = "int64" if kind == "labels" else "float32" if classifier else manifest.identity.dtype
    columns = (manifest.identity.dim,) if has_columns(name) else ()
    if spec.dtype != dtype or not spec.shape or spec.shape[0] == 0 or spec.shape[1:] != columns:
        yield f"{name} is {spec.dtype} of shape {spec.shape}, which is not its kind's type and width"
        return
    weights = manifest.arrays.get(f"classifiers/{classifier}")
    if name.startswith("biases/") and (weights is None or weights.shape[:1] != spec.shape):
        yield f"{name} has {spec.shape[0]} rows, and its classifier has not"
    data = manifest.split_record(task, split)
    if data and spec.shape[0] != data.rows:
        yield f"{name} has {spec.shape[0]} rows, but its task {data.rows}"
    if len(spec.shards) != shard_count(spec.shape[0]):
        yield f"{name} has {len(spec.shards)} shards for {spec.shape[0]} rows"
        return
    for number, sealed in enumerate(spec.shards):
        least = np.dtype(spec.dtype).itemsize * math.prod(shard_shape(spec.shape, number))
        if sealed is not None and sealed.bytes < least:
            yield f"a shard of {name} has {sealed.bytes} bytes, fewer than its values"
