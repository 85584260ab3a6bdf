"""Features that a cache beside this one holds already are linked into it, and not encoded again.

An encoder's features depend on its weights, the preprocessing, the images as they were decoded and the precision, and
not on the merge that the cache is of. So a second merge of the same experts needs their features, and the pre-trained
encoder's, only once.
"""

from collections.abc import Sequence

from probsurgery.pipeline.errors import DamagedCacheError, ProbsurgeryError, first_line
from probsurgery.pipeline.store.arrays import is_features, shard_rows
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.manifest import Manifest
from probsurgery.pipeline.store.writer import CacheWriter

TakenRows = dict[tuple[str, int], tuple[str, int]]
"""By array and shard number of features: the name of the cache that had the shard, and its rows."""


def origin(manifest: Manifest, name: str) -> list[object] | None:
    """What determines an array's values, whatever cache it is in; None if that is not known.

    Two arrays that are equal here hold the same values.
    """
    split, task, kind = name.split("/")
    identity, data = manifest.identity, manifest.split_record(task, split)
    if data is None:
        return None
    weights = {"merged": identity.merge.digest, "expert": identity.checkpoints.get(task)}
    weights["pretrained"] = identity.checkpoints.get("pretrained")
    if is_features(name) and weights[kind] is None:
        return None
    encoder = [identity.arch, identity.encoder, identity.dim, identity.preprocessing]
    return [*encoder, identity.dtype, identity.precision, weights.get(kind), data.rows, data.fingerprint, data.decoding]


def take_from_siblings(writer: CacheWriter, names: Sequence[str], *, skip_bad: bool) -> tuple[TakenRows, list[str]]:
    """Fill what these arrays lack from the caches in the same folder, each shard checked before it is taken.

    It is a hard link where both have one store and lie on one file system, or else a copy: neither cache needs the
    other afterwards. Shards with images that could not be decoded are taken only with `skip_bad`. Returns what was
    taken, and why other shards could not be: they are damaged, cannot be read, or are of images decoded otherwise.
    """
    taken: TakenRows = {}
    problems = []
    for folder in sorted(writer.path.absolute().parent.iterdir()):
        missing = [(name, number) for name in names for number in sorted(writer.missing(name))]
        if not missing:
            break
        if folder == writer.path.absolute():
            continue
        try:
            sibling = Cache(folder)
        except (ProbsurgeryError, OSError):  # not a cache, or one that cannot be read
            continue
        same = {name for name in names if _same_values(writer.manifest, sibling.manifest, name)}
        if any(name not in same and _same_values(writer.manifest, sibling.manifest, name, -1) for name in names):
            problems.append(f"{folder} has features of images that another version decoded, perhaps to other pixels")
        for name, number in missing:
            if name not in same:
                continue
            try:
                rows = _take(writer, sibling, name, number, skip_bad)
            except DamagedCacheError as error:
                problems.append(str(error).partition(";")[0])
            except OSError as error:  # removed meanwhile, or not readable by this user
                problems.append(f"{sibling.file(name, number)} cannot be read ({first_line(error)})")
            else:
                if rows and is_features(name):
                    taken[name, number] = sibling.path.name, rows
    return taken, problems


def _same_values(a: Manifest, b: Manifest, name: str, end: int | None = None) -> bool:
    """Whether two caches' arrays have one origin; with -1, whatever version decoded the images."""
    here, there = origin(a, name), origin(b, name)
    return name in b.arrays and here is not None and there is not None and here[:end] == there[:end]


def _take(writer: CacheWriter, sibling: Cache, name: str, number: int, skip_bad: bool) -> int:
    """Take one shard, if the sibling has it; returns its rows."""
    split, task, _ = name.split("/")
    spec = sibling.manifest.arrays[name]
    rows, sealed = shard_rows(number, spec.shape[0]), spec.shards[number]
    skipped = {str(row): problem for row, problem in sibling.skipped(task, split).items() if row in rows}
    if sealed is None or (skipped and not skip_bad):
        return 0
    file, by_task = sibling.file(name, number), {f"{split}/{task}": skipped}
    if sibling.manifest.store != writer.manifest.store:
        writer.write(number, {name: sibling.shard(name, number)}, by_task)
    elif problem := sibling.broken(name, number):
        raise DamagedCacheError(f"{file} {problem}")
    else:
        writer.adopt(number, name, file, sealed, by_task)
    return len(rows)
