"""Features that a cache beside this one holds already are linked into it, and not encoded again.

An encoder's features depend on its weights, the preprocessing, the images and the precision, and not on the merge that
the cache is of. So a second merge of the same experts needs their features, and the pre-trained encoder's, only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from probsurgery.pipeline.errors import DamagedCacheError, ProbsurgeryError, first_line
from probsurgery.pipeline.store.arrays import is_features, shard_rows
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.manifest import Manifest
from probsurgery.pipeline.store.writer import CacheWriter


@dataclass
class Reused:
    """What was taken from other caches."""

    rows: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)
    """By array and shard number of features: the name of the cache that had the shard, and its rows."""
    damaged: list[str] = field(default_factory=list)
    """Shards that would have been taken, and are damaged or cannot be read."""


def origin(manifest: Manifest, name: str) -> list | None:
    """What determines an array's values, whatever cache it is in; None if that is not known.

    Two arrays that are equal here hold the same values.
    """
    split, task, kind = name.split("/")
    identity = manifest.identity
    if task not in manifest.tasks or split not in manifest.tasks[task].splits:
        return None
    data = manifest.tasks[task].splits[split]
    weights = {"merged": identity.merge.digest, "expert": identity.checkpoints.get(task)}
    weights["pretrained"] = identity.checkpoints.get("pretrained")
    if is_features(name) and weights[kind] is None:
        return None
    settings = [identity.arch, identity.dim, identity.dtype, identity.precision, identity.preprocessing]
    return [*settings, weights.get(kind), data.rows, data.fingerprint]


def take_from_siblings(writer: CacheWriter, names: Sequence[str], *, skip_bad: bool) -> Reused:
    """Fill what these arrays lack from the caches in the same folder, each shard checked before it is taken.

    It is a hard link where both have one store and lie on one file system, or else a copy: neither cache needs the
    other afterwards. Shards with images that could not be decoded are taken only with `skip_bad`.
    """
    reused = Reused()
    for folder in sorted(writer.path.absolute().parent.iterdir()):
        missing = {name: sorted(numbers) for name in names if (numbers := writer.missing(name))}
        if not missing:
            break
        if folder == writer.path.absolute():
            continue
        try:
            sibling = Cache(folder)
        except (ProbsurgeryError, OSError):  # not a cache, or one that cannot be read
            continue
        for name, numbers in missing.items():
            wanted = origin(writer.manifest, name)
            if wanted and name in sibling.manifest.arrays and origin(sibling.manifest, name) == wanted:
                _take(writer, sibling, name, numbers, skip_bad, reused)
    return reused


def _take(
    writer: CacheWriter, sibling: Cache, name: str, numbers: Sequence[int], skip_bad: bool, reused: Reused
) -> None:
    split, task, _ = name.split("/")
    spec, skipped = sibling.manifest.arrays[name], sibling.skipped(task, split)
    for number in numbers:
        rows = shard_rows(number, spec.shape[0])
        skipped_here = {str(row): problem for row, problem in skipped.items() if row in rows}
        sealed = spec.shards[number]
        if sealed is None or (skipped_here and not skip_bad):
            continue
        by_task = {f"{split}/{task}": skipped_here}
        try:
            if sibling.manifest.store == writer.manifest.store:
                problem = sibling.broken(name, number)
                if problem:
                    raise DamagedCacheError(f"{sibling.file(name, number)} {problem}")
                writer.adopt(number, name, sibling.file(name, number), sealed, by_task)
            else:
                writer.write(number, {name: sibling.shard(name, number)}, by_task)
        except DamagedCacheError as error:
            reused.damaged.append(str(error).partition(";")[0])
            continue
        except OSError as error:  # removed meanwhile, or not readable by this user
            reused.damaged.append(f"{sibling.file(name, number)} cannot be read ({first_line(error)})")
            continue
        if is_features(name):
            reused.rows[name, number] = sibling.path.name, len(rows)
