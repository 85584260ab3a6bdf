"""Arrays cut along their rows into shards, and the seals that tell whether a shard is as it was written."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from msgspec import Meta
from msgspec.structs import replace

from probsurgery.pipeline.files import Digest, Record, Seal
from probsurgery.pipeline.fingerprints import fingerprint

SHARD_ROWS = 2048
CHUNK_ROWS = 256
KINDS = ("merged", "expert", "pretrained")
"""Encoders of which a cache has features."""
Rows = Annotated[int, Meta(ge=0, le=2**40)]
LARGEST_VALUE = 1e10
"""Of a feature or classifier. Squares of larger ones soon exceed float32; encoders give values of 10 at most."""


def shard_count(rows: int) -> int:
    return math.ceil(rows / SHARD_ROWS)


def shard_rows(number: int, rows: int) -> range:
    """Rows of one shard of an array of so many rows."""
    return range(number * SHARD_ROWS, min(rows, (number + 1) * SHARD_ROWS))


def shard_shape(shape: Sequence[int], number: int) -> tuple[int, ...]:
    """Shape of one shard's values, from the array's."""
    return len(shard_rows(number, shape[0])), *shape[1:]


def values_digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def array_kind(name: str) -> str:
    """What an array holds: one of `KINDS`, `labels`, `classifiers` or `biases`; tasks may have these names too."""
    parts = name.split("/")
    return parts[2] if len(parts) == 3 else parts[0]


def is_features(name: str) -> bool:
    """Whether an array holds features, in the cache's type, and not labels or a classifier."""
    return array_kind(name) in KINDS


def has_columns(name: str) -> bool:
    """Whether an array has d columns, and not one number for each row."""
    return array_kind(name) not in ("labels", "biases")


def bad_rows(name: str, values: np.ndarray, classes: int) -> tuple[np.ndarray, str]:
    """Rows of an array that no computation may use, and what is wrong with them: labels that are no class, features
    that are not finite or out of range, biases as well, and rows of a classifier that are zero too.
    """
    if array_kind(name) == "labels":
        return np.flatnonzero((values < 0) | (values >= classes)), f"not classes (0 to {classes - 1})"
    is_good = np.abs(values.astype(np.float32, copy=False)) <= LARGEST_VALUE
    is_bad = ~(is_good.all(-1) if has_columns(name) else is_good)
    wrong = f"NaN, infinite or beyond {LARGEST_VALUE:.0e}"
    if array_kind(name) == "classifiers":
        return np.flatnonzero(is_bad | ~values.any(-1)), f"{wrong}, or zero"
    return np.flatnonzero(is_bad), wrong


class ShardSeal(Seal, frozen=True):
    """The seal of a shard's file, with a digest of its values.

    That digest is the same in every store. It also covers what lies outside the shard's file, such as the byte order.
    """

    values: Digest


class ArraySpec(Record, frozen=True, omit_defaults=False):
    """One array: its shape, type, and a seal for each shard; None for a shard that is not written."""

    shape: tuple[Rows, ...]
    dtype: Annotated[str, Meta(pattern=r"\A(?:float32|float16|int64)\Z")]
    shards: tuple[ShardSeal | None, ...] = ()

    @property
    def missing(self) -> set[int]:
        """Numbers of the shards that are not written."""
        return {number for number, sealed in enumerate(self.shards) if sealed is None}

    @property
    def size(self) -> int:
        """Bytes of the shards that are written."""
        return sum(sealed.bytes for sealed in self.shards if sealed)

    @property
    def digest(self) -> str | None:
        """Digest of shape, type and values, the same in every store; None if a shard is missing."""
        if self.missing:
            return None
        return fingerprint([self.shape, self.dtype, [sealed.values for sealed in self.shards if sealed]])


Seals = Mapping[str, Mapping[int, ShardSeal | None]]
"""Array -> shard number -> its seal, or None for a shard that is gone."""


def with_seals(arrays: Mapping[str, ArraySpec], seals: Seals) -> dict[str, ArraySpec]:
    """The arrays with other seals of some shards."""
    changed = dict(arrays)
    for name, numbered in seals.items():
        shards = list(changed[name].shards)
        for number, sealed in numbered.items():
            shards[number] = sealed
        changed[name] = replace(changed[name], shards=tuple(shards))
    return changed
