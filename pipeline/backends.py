"""How arrays lie on disk: zarr v3 or HDF5 behind one interface. The only module that knows zarr and h5py.

An array is cut along its rows into shards of `SHARD_ROWS`. Each shard is a file that appears at once or not at all.
Every chunk carries a checksum, so that plain zarr and h5py readers are told of damage, and rows that were never written
read as NaN (labels: -1) there, because both formats would else make up zeros.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Protocol

import numpy as np

SHARD_ROWS = 2048
CHUNK_ROWS = 256


def shard_count(rows: int) -> int:
    """Shards that an array of so many rows is cut into."""
    return math.ceil(rows / SHARD_ROWS)


def _fill(dtype: str) -> float | int:
    return math.nan if dtype.startswith("float") else -1


class Backend(Protocol):
    """How arrays lie on disk. Values read are checked by the format's own checksums, and by `Cache` besides."""

    def declare(self, arrays: dict[str, dict]) -> None:
        """Make arrays known, each `{"shape", "dtype"}` under its name, to plain readers of the format."""

    def declared(self, name: str) -> bool:
        """Whether what makes an array known is there."""

    def write(self, name: str, part: int, values: np.ndarray) -> None:
        """Write one shard, atomically."""

    def read(self, name: str, part: int) -> np.ndarray:
        """Read one shard. Raises an OSError or ValueError if a checksum does not hold."""

    def file(self, name: str, part: int) -> Path:
        """The file of one shard."""


class ZarrBackend:
    """`features.zarr`: a zarr v3 group, sharded, each chunk with a CRC32C."""

    def __init__(self, cache: Path) -> None:
        self.root = cache / "features.zarr"

    def declare(self, arrays: dict[str, dict]) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec

        group = zarr.open_group(self.root, mode="a")
        for name, spec in arrays.items():
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
                overwrite=True,
            )

    def declared(self, name: str) -> bool:
        return all((folder / "zarr.json").is_file() for folder in (self.root, self.root / name))

    def write(self, name: str, part: int, values: np.ndarray) -> None:
        import zarr

        # Else zarr leaves out a chunk that equals the fill value.
        array = zarr.open_array(self.root, path=name, mode="r+").with_config({"write_empty_chunks": True})
        array[part * SHARD_ROWS : part * SHARD_ROWS + len(values)] = values

    def read(self, name: str, part: int) -> np.ndarray:
        import zarr

        array = zarr.open_array(self.root, path=name, mode="r")
        return array[part * SHARD_ROWS : (part + 1) * SHARD_ROWS]

    def file(self, name: str, part: int) -> Path:
        columns = ("0",) if not name.endswith("labels") else ()
        return self.root.joinpath(name, "c", str(part), *columns)


class Hdf5Backend:
    """`shards/`: an HDF5 file for each shard, with Fletcher32; `features.h5` joins them as virtual data sets."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def declare(self, arrays: dict[str, dict]) -> None:
        import h5py

        index = self.cache / "features.h5"
        partial = index.with_name("features.h5.partial")
        if not arrays:
            return
        if index.is_file() and h5py.is_hdf5(index):
            shutil.copyfile(index, partial)
        with h5py.File(partial, "a", libver="latest") as file:
            for name, spec in arrays.items():
                if name in file:
                    del file[name]
                rows, rest = spec["shape"][0], tuple(spec["shape"][1:])
                layout = h5py.VirtualLayout(tuple(spec["shape"]), spec["dtype"])
                for part in range(shard_count(rows)):
                    start, stop = part * SHARD_ROWS, min(rows, (part + 1) * SHARD_ROWS)
                    source = self.file(name, part).relative_to(self.cache).as_posix()
                    layout[start:stop] = h5py.VirtualSource(source, "data", shape=(stop - start, *rest))
                file.create_virtual_dataset(name, layout, fillvalue=_fill(spec["dtype"]))
        partial.replace(index)

    def declared(self, name: str) -> bool:
        import h5py

        index = self.cache / "features.h5"
        if not index.is_file() or not h5py.is_hdf5(index):
            return False
        with h5py.File(index, "r") as file:
            return name in file

    def write(self, name: str, part: int, values: np.ndarray) -> None:
        import h5py

        path = self.file(name, part)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        chunks = (min(CHUNK_ROWS, len(values)), *values.shape[1:])
        with h5py.File(partial, "w", libver="latest") as file:
            file.create_dataset("data", data=values, chunks=chunks, fletcher32=True, track_times=False)
        partial.replace(path)

    def read(self, name: str, part: int) -> np.ndarray:
        import h5py

        with h5py.File(self.file(name, part), "r") as file:
            return file["data"][:]

    def file(self, name: str, part: int) -> Path:
        return self.cache / "shards" / f"{name}-{part:05d}.h5"


BACKENDS = {"zarr": ZarrBackend, "hdf5": Hdf5Backend}
