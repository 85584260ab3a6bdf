"""How arrays lie on disk: zarr v3 or HDF5 behind one interface. The only module that knows zarr and h5py.

An array is cut along its rows into shards of `SHARD_ROWS`. Each shard is a file that appears at once or not at all.
Every chunk carries a checksum, so that plain zarr and h5py readers are told of damage, and rows that were never written
read as NaN (labels: -1) there, because both formats would else make up zeros.

Files may come from someone else: what describes an array is compared with what this module would have written, before
anything is read by it. So no codec, filter, link or size of theirs is followed.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Protocol

import numpy as np

from probsurgery.pipeline.files import write_atomically

SHARD_ROWS = 2048
CHUNK_ROWS = 256
_GROUP = {"attributes", "zarr_format", "node_type"}
"""Keys of a zarr group. Consolidated metadata, which plain readers prefer to an array's own, is not among them."""


def shard_count(rows: int) -> int:
    """Shards that an array of so many rows is cut into."""
    return math.ceil(rows / SHARD_ROWS)


def shard_rows(number: int, rows: int) -> range:
    """Rows of one shard of an array of so many rows."""
    return range(number * SHARD_ROWS, min(rows, (number + 1) * SHARD_ROWS))


def shard_shape(shape: Sequence[int], number: int) -> tuple[int, ...]:
    """Shape of one shard's values, from the array's."""
    return len(shard_rows(number, shape[0])), *shape[1:]


def _fill(dtype: str) -> float | int:
    return math.nan if dtype.startswith("float") else -1


class Backend(Protocol):
    """How arrays lie on disk. Values read are checked by the format's own checksums, and by `Cache` besides."""

    def declare(self, arrays: dict[str, dict], known: dict[str, dict]) -> None:
        """Make arrays known, each `{"shape", "dtype"}` under its name, to plain readers of the format.

        Shards that are there already stay. `known` are all arrays of the cache, these among them.
        """

    def metadata(self, name: str) -> tuple[Path, ...]:
        """The files that make an array known."""

    def described(self, name: str, spec: dict) -> bool:
        """Whether plain readers are shown the array's own shards, in its shape and type, and nothing else.

        Raises what the format's library does if a file is garbled.
        """

    def write(self, name: str, part: int, values: np.ndarray) -> None:
        """Write one shard, atomically."""

    def read(self, name: str, part: int, spec: dict) -> np.ndarray:
        """Read one shard. Raises an OSError or ValueError if a checksum, its shape or its layout is not as written."""

    def file(self, name: str, part: int) -> Path:
        """The file of one shard."""


class ZarrBackend:
    """`features.zarr`: a zarr v3 group, sharded, each chunk with a CRC32C."""

    MOST_METADATA = 2**20
    """Bytes of a zarr.json; ours have some 2,000."""

    def __init__(self, cache: Path) -> None:
        self.root = cache / "features.zarr"

    def declare(self, arrays: dict[str, dict], known: dict[str, dict]) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec

        group = zarr.open_group(self.root, mode="a")
        for name, spec in arrays.items():
            # Not `overwrite=True`, which deletes the shards too.
            (self.root / name / "zarr.json").unlink(missing_ok=True)
            rest = spec["shape"][1:]
            group.create_array(
                name,
                shape=spec["shape"],
                dtype=spec["dtype"],
                shards=(SHARD_ROWS, *rest),
                chunks=(CHUNK_ROWS, *rest),
                # Crc32c asked for by name: sharding alone checks its index only, not the chunks.
                compressors=[Crc32cCodec()],
                fill_value=_fill(spec["dtype"]),
            )

    def metadata(self, name: str) -> tuple[Path, ...]:
        folders = [self.root / name, *(self.root / parent for parent in Path(name).parents)]
        return tuple(folder / "zarr.json" for folder in folders)

    def described(self, name: str, spec: dict) -> bool:
        groups = (self.root / parent / "zarr.json" for parent in Path(name).parents)
        plain = all(json.loads(self._small(group).read_text()).keys() <= _GROUP for group in groups)
        return plain and self._is_ours(self._open(name, "r"), spec)

    def write(self, name: str, part: int, values: np.ndarray) -> None:
        # Else zarr leaves out a chunk that equals the fill value.
        array = self._open(name, "r+").with_config({"write_empty_chunks": True})
        array[part * SHARD_ROWS : part * SHARD_ROWS + len(values)] = values

    def read(self, name: str, part: int, spec: dict) -> np.ndarray:
        array = self._open(name, "r")
        if not self._is_ours(array, spec):
            raise ValueError("what describes the array was changed")
        rows = part_range(part, spec["shape"][0])
        return array[rows.start : rows.stop]

    def file(self, name: str, part: int) -> Path:
        columns = ("0",) if not name.endswith("labels") else ()
        return self.root.joinpath(name, "c", str(part), *columns)

    def _open(self, name: str, mode: str):
        import zarr

        self._small(self.root / name / "zarr.json")
        return zarr.open_array(self.root, path=name, mode=mode, zarr_format=3)

    def _small(self, file: Path) -> Path:
        if file.stat().st_size > self.MOST_METADATA:
            raise ValueError(f"what describes the array has more than {self.MOST_METADATA:,} bytes")
        return file

    @staticmethod
    def _is_ours(array, spec: dict) -> bool:
        from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

        rest = tuple(spec["shape"][1:])
        checked = [BytesCodec(endian="little"), Crc32cCodec()]
        sharding = ShardingCodec(chunk_shape=(CHUNK_ROWS, *rest), codecs=checked, index_codecs=checked)
        return (
            array.shape == tuple(spec["shape"])
            and array.dtype == spec["dtype"]
            and array.shards == (SHARD_ROWS, *rest)
            and array.metadata.codecs == (sharding,)
            and array.metadata.encode_chunk_key((0,)) == "c/0"
        )


class Hdf5Backend:
    """`shards/`: an HDF5 file for each shard, with Fletcher32; `features.h5` joins them as virtual data sets.

    Files are made in memory first: on a full disk the library ends in errors of its own, some of which it swallows.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.index = cache / "features.h5"

    def declare(self, arrays: dict[str, dict], known: dict[str, dict]) -> None:
        import h5py

        content = io.BytesIO()
        with h5py.File(content, "w", libver="latest") as file:
            for name, spec in known.items():
                layout = h5py.VirtualLayout(tuple(spec["shape"]), spec["dtype"])
                for part, source in enumerate(self._sources(name, spec)):
                    rows = part_range(part, spec["shape"][0])
                    layout[rows.start : rows.stop] = h5py.VirtualSource(source, "data", shape=part_shape(spec, part))
                file.create_virtual_dataset(name, layout, fillvalue=_fill(spec["dtype"]))
        write_atomically(self.index, content.getvalue())

    def metadata(self, name: str) -> tuple[Path, ...]:
        return (self.index,)

    def described(self, name: str, spec: dict) -> bool:
        import h5py

        with h5py.File(self.index, "r") as file:
            data = _own(file, name)
            if data is None or data.shape != tuple(spec["shape"]) or data.dtype != spec["dtype"]:
                return False
            mapped = data.virtual_sources() if data.is_virtual else []
            there = [(m.file_name, m.dset_name, m.vspace.get_select_bounds()[0][0]) for m in mapped]
            return there == [
                (source, "data", part * SHARD_ROWS) for part, source in enumerate(self._sources(name, spec))
            ]

    def write(self, name: str, part: int, values: np.ndarray) -> None:
        import h5py

        path = self.file(name, part)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        with h5py.File(content, "w", libver="latest") as file:
            file.create_dataset("data", data=values, chunks=_chunks(values.shape), fletcher32=True, track_times=False)
        write_atomically(path, content.getvalue())

    def read(self, name: str, part: int, spec: dict) -> np.ndarray:
        import h5py

        shape = part_shape(spec, part)
        with h5py.File(self.file(name, part), "r") as file:
            data = _own(file, "data")
            if data is None or data.shape != shape or data.dtype != spec["dtype"] or data.is_virtual or data.external:
                raise ValueError("it does not hold the array's values")
            stored = data.id.get_create_plist()
            filters = [stored.get_filter(i)[0] for i in range(stored.get_nfilters())]
            if filters != [h5py.h5z.FILTER_FLETCHER32] or data.chunks != _chunks(shape):
                raise ValueError("its values are stored in another way than they were written")
            return data[:]

    def file(self, name: str, part: int) -> Path:
        return self.cache / "shards" / f"{name}-{part:05d}.h5"

    def _sources(self, name: str, spec: dict) -> list[str]:
        parts = range(shard_count(spec["shape"][0]))
        return [self.file(name, part).relative_to(self.cache).as_posix() for part in parts]


def _chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return min(CHUNK_ROWS, shape[0]), *shape[1:]


def _own(file, name: str):
    """A data set of an HDF5 file that is its own; None if it is not there, or behind a link to somewhere else."""
    import h5py

    node = file
    for step in name.split("/"):
        if not isinstance(node, h5py.Group) or not isinstance(node.get(step, getlink=True), h5py.HardLink):
            return None
        node = node[step]
    return node if isinstance(node, h5py.Dataset) else None


BACKENDS = {"zarr": ZarrBackend, "hdf5": Hdf5Backend}
