"""Arrays in zarr v3. The only module that knows zarr."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from probsurgery.pipeline.files import read_json
from probsurgery.pipeline.store import arrays
from probsurgery.pipeline.store.arrays import ArraySpec, shard_rows
from probsurgery.pipeline.store.formats import Format, fill_value

_GROUP = {"attributes", "zarr_format", "node_type"}
"""Keys allowed in a zarr group's metadata: not consolidated metadata, which plain readers prefer to an array's own."""


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
                fill_value=fill_value(spec.dtype),
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
