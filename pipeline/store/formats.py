"""How arrays lie on disk: zarr v3 or HDF5 behind one interface.

Each shard of an array is a file that appears whole or not at all. Every chunk carries a checksum, so that plain zarr
and h5py readers detect damage. Rows that were never written read as NaN there (labels: -1); by default both formats
would return zeros.

Files may be untrusted: the metadata of an array is compared with what these modules would have written before anything
is read through it. So no codec, filter, link or size from a file is followed.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from probsurgery.pipeline.store import arrays
from probsurgery.pipeline.store.arrays import ArraySpec


class Format(Protocol):
    """How arrays lie on disk. Values read are checked by the format's own checksums, and by `Cache` besides."""

    def __init__(self, cache: Path) -> None: ...

    def declare(self, new: Mapping[str, ArraySpec], known: Mapping[str, ArraySpec]) -> None:
        """Write the metadata of new arrays, by which plain readers of the format find them. Existing shards stay.

        `known` are all arrays of the cache, the new ones among them.
        """

    def metadata(self, name: str) -> tuple[str, ...]:
        """The files that hold an array's metadata, as paths in the cache."""

    def is_described(self, name: str, spec: ArraySpec) -> bool:
        """Whether the metadata shows plain readers the array's own shards, in its shape and type, and nothing else."""
        try:
            return self._is_described(name, spec)
        except Exception:  # the formats' libraries raise anything for a damaged file
            return False

    def _is_described(self, name: str, spec: ArraySpec) -> bool: ...

    def write(self, name: str, number: int, values: np.ndarray) -> None:
        """Write one shard, atomically."""

    def read(self, name: str, number: int, spec: ArraySpec) -> np.ndarray:
        """Read one shard. Raises an OSError or ValueError if a checksum, its shape or its layout is not as written."""

    def file(self, name: str, number: int) -> Path:
        """The file of one shard."""


def open_format(store: str, cache: Path) -> Format:
    """The format of a store by its name. Its library is imported now, because each takes a while."""
    if store == "zarr":
        from probsurgery.pipeline.store.zarr_format import ZarrFormat

        return ZarrFormat(cache)
    from probsurgery.pipeline.store.hdf5_format import Hdf5Format

    return Hdf5Format(cache)


def fill_value(dtype: str) -> float | int:
    """What rows that were never written read as."""
    return math.nan if dtype.startswith("float") else -1


def chunk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an array's chunks."""
    return min(arrays.CHUNK_ROWS, shape[0]), *shape[1:]
