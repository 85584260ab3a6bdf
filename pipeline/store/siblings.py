"""Nothing twice: what a cache beside this one holds already is linked into it, and not encoded again.

An encoder's features depend on its weights, the preprocessing, the images and the precision, and not on the merge that
the cache is of. So a second merge of the same experts needs their features, and the pre-trained encoder's, only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from probsurgery.pipeline.errors import DamagedCacheError, ProbsurgeryError, first_line
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.formats import part_range
from probsurgery.pipeline.store.manifest import is_features
from probsurgery.pipeline.store.writer import CacheWriter


@dataclass
class Reused:
    """What was taken from other caches."""

    rows: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)
    """By array and part of features: the name of the cache that had it, and its rows."""
    damaged: list[str] = field(default_factory=list)
    """Shards that would have been taken, and are damaged or cannot be read."""


def origin(manifest: dict, name: str) -> list | None:
    """What determines an array's values, whatever cache it is in: two that are equal here are the same array."""
    split, task, kind = name.split("/")
    identity, data = manifest["identity"], manifest["tasks"].get(task, {}).get("splits", {}).get(split)
    weights = {"pretrained": "pretrained", "expert": task}
    encoder = identity["merge"].get("digest") if kind == "merged" else identity["checkpoints"].get(weights.get(kind))
    if data is None or (is_features(name) and encoder is None):
        return None
    settings = [identity.get(key) for key in ("arch", "dim", "dtype", "precision", "preprocessing")]
    return [*settings, encoder, data["rows"], data.get("fingerprint")]


def take_from_siblings(writer: CacheWriter, names: Sequence[str], *, skip_bad: bool) -> Reused:
    """Fill what these arrays lack from the caches in the same folder, each shard checked before it is taken.

    It is a hard link where both have one store and lie on one file system, or else a copy: neither cache needs the
    other afterwards. Parts with images that could not be decoded are taken only with `skip_bad`.
    """
    reused = Reused()
    for folder in sorted(writer.path.absolute().parent.iterdir()):
        wanted = {name: parts for name in names if (parts := sorted(writer.pending(name)))}
        if not wanted:
            break
        if folder == writer.path.absolute():
            continue
        try:
            sibling = Cache(folder)
        except (ProbsurgeryError, OSError):  # none, or none that can be read
            continue
        for name, parts in wanted.items():
            ours = origin(writer.manifest, name)
            if ours and name in sibling.manifest["arrays"] and origin(sibling.manifest, name) == ours:
                _take(writer, sibling, name, parts, skip_bad, reused)
    return reused


def _take(writer: CacheWriter, sibling: Cache, name: str, parts: Sequence[int], skip_bad: bool, reused: Reused) -> None:
    split, task, _ = name.split("/")
    spec, skipped = sibling.manifest["arrays"][name], sibling.skipped(task, split)
    for part in parts:
        rows = part_range(part, spec["shape"][0])
        left_out = {str(row): problem for row, problem in skipped.items() if row in rows}
        if spec["shards"][part] is None or (left_out and not skip_bad):
            continue
        noted = {f"{split}/{task}": left_out}
        try:
            if sibling.manifest["store"] == writer.manifest["store"]:
                problem = sibling.broken(name, part)
                if problem:
                    raise DamagedCacheError(f"{sibling.file(name, part)} {problem}")
                writer.adopt(part, name, sibling.file(name, part), spec["shards"][part], noted)
            else:
                writer.write(part, {name: sibling.shard(name, part)}, noted)
        except DamagedCacheError as error:
            reused.damaged.append(str(error).partition(";")[0])
            continue
        except OSError as error:  # removed meanwhile, or somebody else's
            reused.damaged.append(f"{sibling.file(name, part)} cannot be read ({first_line(error)})")
            continue
        if is_features(name):
            reused.rows[name, part] = sibling.path.name, len(rows)
