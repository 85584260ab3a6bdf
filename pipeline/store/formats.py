"""How arrays lie on disk: zarr v3 or HDF5 behind one interface. The only module that knows zarr and h5py.

Each shard of an array is a file that appears whole or not at all. Every chunk carries a checksum, so that plain zarr
and h5py readers detect damage. Rows that were never written read as NaN there (labels: -1); by default both formats
would return zeros.

Files may be untrusted: the metadata of an array is compared with what this module would have written before anything is
read through it. So no codec, filter, link or size from a file is followed.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import h5py
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from probsurgery.pipeline.files import read_json, write_atomically
from probsurgery.pipeline.store import arrays
from probsurgery.pipeline.store.arrays import ArraySpec, shard_count, shard_rows, shard_shape

_GROUP = {"attributes", "zarr_format", "node_type"}
"""Keys allowed in a zarr group's metadata: not consolidated metadata, which plain readers prefer to an array's own."""


def _fill(dtype: str) -> float | int:
    return math.nan if dtype.startswith("float") else -1


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


class ZarrFormat(Format):
    """`features.zarr`: a zarr v3 group, sharded, each chunk with a CRC32C."""

    MOST_METADATA = 2**20
    """Bytes of a zarr.json; one of this module has some 2,000."""

    def __init__(self, cache: Path) -> None:
        self.root = cache / "features.zarr"
        self._opened: dict[tuple[str, str], tuple[tuple[int, ...], zarr.Array[Any]]] = {}
        """Arrays that are open, by name and mode, each with the state of its metadata's file."""

    def declare(self, new: Mapping[str, ArraySpec], known: Mapping[str, ArraySpec]) -> None:
        group = zarr.open_group(self.root, mode="a")
        for name, spec in new.items():
            # Not `overwrite=True`, which deletes the shards too.
            (self.root / name / "zarr.json").unlink(missing_ok=True)
            group.create_array(
                name,
                shape=spec.shape,
                dtype=spec.dtype,
                shards=(arrays.SHARD_ROWS, *spec.shape[1:]),
                chunks=(arrays.CHUNK_ROWS, *spec.shape[1:]),
                # Crc32c by name: sharding alone checks its index only, not the chunks.
                compressors=[Crc32cCodec()],
                fill_value=_fill(spec.dtype),
            )

    def metadata(self, name: str) -> tuple[str, ...]:
        return tuple(Path(self.root.name, node, "zarr.json").as_posix() for node in (Path(name), *Path(name).parents))

    def _is_described(self, name: str, spec: ArraySpec) -> bool:
        groups = (self.root / parent / "zarr.json" for parent in Path(name).parents)
        plain = all(read_json(group, self.MOST_METADATA).keys() <= _GROUP for group in groups)
        return plain and self._is_ours(self._open(name, "r"), spec)

    def write(self, name: str, number: int, values: np.ndarray) -> None:
        # Otherwise zarr omits a chunk that equals the fill value.
        array = self._open(name, "r+").with_config({"write_empty_chunks": True})
        first = number * arrays.SHARD_ROWS
        array[first : first + len(values)] = values

    def read(self, name: str, number: int, spec: ArraySpec) -> np.ndarray:
        array = self._open(name, "r")
        if not self._is_ours(array, spec):
            raise ValueError("the array's metadata was changed")
        rows = shard_rows(number, spec.shape[0])
        return np.asarray(array[rows.start : rows.stop])

    def file(self, name: str, number: int) -> Path:
        columns = ("0",) if arrays.has_columns(name) else ()
        return self.root.joinpath(name, "c", str(number), *columns)

    def _open(self, name: str, mode: Literal["r", "r+"]) -> "zarr.Array[Any]":
        """An array, opened once: that takes longer than reading a shard. With other metadata it is opened again."""
        status = (self.root / name / "zarr.json").stat()
        if status.st_size > self.MOST_METADATA:
            raise ValueError(f"the array's metadata has more than {self.MOST_METADATA:,} bytes")
        state = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        known, array = self._opened.get((name, mode), (None, None))
        if array is None or known != state:
            array = zarr.open_array(self.root, path=name, mode=mode, zarr_format=3)
            self._opened[name, mode] = state, array
        return array

    @staticmethod
    def _is_ours(array: "zarr.Array[Any]", spec: ArraySpec) -> bool:
        rest = spec.shape[1:]
        checked = (BytesCodec(endian="little"), Crc32cCodec())
        sharding = ShardingCodec(chunk_shape=(arrays.CHUNK_ROWS, *rest), codecs=checked, index_codecs=checked)
        metadata: Any = array.metadata  # of version 3, as it was opened
        return (
            array.shape == spec.shape
            and array.dtype == spec.dtype
            and array.shards == (arrays.SHARD_ROWS, *rest)
            and metadata.codecs == (sharding,)
            and metadata.encode_chunk_key((0,)) == "c/0"
        )


class Hdf5Format(Format):
    """`shards/`: an HDF5 file for each shard, with Fletcher32; `features.h5` joins them as virtual data sets.

    Files are built in memory first: on a full disk the library raises errors of its own and swallows some.
    """

    def __init__(self, cache: Path) -> None:
        self.cache, self.index = cache, cache / "features.h5"

    def declare(self, new: Mapping[str, ArraySpec], known: Mapping[str, ArraySpec]) -> None:
        content = io.BytesIO()
        with h5py.File(content, "w", libver="latest") as file:
            for name, spec in known.items():
                layout = h5py.VirtualLayout(spec.shape, spec.dtype)
                for number, source in enumerate(self._sources(name, spec)):
                    rows, shape = shard_rows(number, spec.shape[0]), shard_shape(spec.shape, number)
                    layout[rows.start : rows.stop] = h5py.VirtualSource(source, "data", shape=shape)
                file.create_virtual_dataset(name, layout, fillvalue=_fill(spec.dtype))
        write_atomically(self.index, content.getvalue())

    def metadata(self, name: str) -> tuple[str, ...]:
        return (self.index.name,)

    def _is_described(self, name: str, spec: ArraySpec) -> bool:
        sources = [(source, "data", i * arrays.SHARD_ROWS) for i, source in enumerate(self._sources(name, spec))]
        with h5py.File(self.index, "r") as file:
            data = _own_dataset(file, name)
            if data is None or data.shape != spec.shape or data.dtype != spec.dtype or not data.is_virtual:
                return False
            mapped = data.virtual_sources()
            return sources == [(m.file_name, m.dset_name, m.vspace.get_select_bounds()[0][0]) for m in mapped]

    def write(self, name: str, number: int, values: np.ndarray) -> None:
        path, content = self.file(name, number), io.BytesIO()
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(content, "w", libver="latest") as file:
            file.create_dataset("data", data=values, chunks=_chunks(values.shape), fletcher32=True, track_times=False)
        write_atomically(path, content.getvalue())

    def read(self, name: str, number: int, spec: ArraySpec) -> np.ndarray:
        shape = shard_shape(spec.shape, number)
        with h5py.File(self.file(name, number), "r") as file:
            data = _own_dataset(file, "data")
            if data is None or data.shape != shape or data.dtype != spec.dtype or data.is_virtual or data.external:
                raise ValueError("it does not hold the array's values")
            stored = data.id.get_create_plist()
            filters = [stored.get_filter(i)[0] for i in range(stored.get_nfilters())]
            if filters != [h5py.h5z.FILTER_FLETCHER32] or data.chunks != _chunks(shape):
                raise ValueError("its values are not stored with the expected chunks and filters")
            return np.asarray(data[:])

    def file(self, name: str, number: int) -> Path:
        return self.cache / "shards" / f"{name}-{number:05d}.h5"

    def _sources(self, name: str, spec: ArraySpec) -> list[str]:
        numbers = range(shard_count(spec.shape[0]))
        return [self.file(name, number).relative_to(self.cache).as_posix() for number in numbers]


def _chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return min(arrays.CHUNK_ROWS, shape[0]), *shape[1:]


def _own_dataset(file: h5py.File, name: str) -> h5py.Dataset | None:
    """A data set that lies in this HDF5 file; None if it is missing, or behind a link to another place."""
    node = file
    for step in name.split("/"):
        if not isinstance(node, h5py.Group) or not isinstance(node.get(step, getlink=True), h5py.HardLink):
            return None
        node = node[step]
    return node if isinstance(node, h5py.Dataset) else None


FORMATS: dict[str, type[Format]] = {"zarr": ZarrFormat, "hdf5": Hdf5Format}
