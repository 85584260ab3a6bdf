"""Arrays in HDF5. The only module that knows h5py."""

import io
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from probsurgery.pipeline.files import write_atomically
from probsurgery.pipeline.store import arrays
from probsurgery.pipeline.store.arrays import ArraySpec, shard_count, shard_rows, shard_shape
from probsurgery.pipeline.store.formats import Format, chunk_shape, fill_value


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
                file.create_virtual_dataset(name, layout, fillvalue=fill_value(spec.dtype))
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
            file.create_dataset(
                "data", data=values, chunks=chunk_shape(values.shape), fletcher32=True, track_times=False
            )
        write_atomically(path, content.getvalue())

    def read(self, name: str, number: int, spec: ArraySpec) -> np.ndarray:
        shape = shard_shape(spec.shape, number)
        with h5py.File(self.file(name, number), "r") as file:
            data = _own_dataset(file, "data")
            if data is None or data.shape != shape or data.dtype != spec.dtype or data.is_virtual or data.external:
                raise ValueError("it does not hold the array's values")
            stored = data.id.get_create_plist()
            filters = [stored.get_filter(i)[0] for i in range(stored.get_nfilters())]
            if filters != [h5py.h5z.FILTER_FLETCHER32] or data.chunks != chunk_shape(shape):
                raise ValueError("its values are not stored with the expected chunks and filters")
            return np.asarray(data[:])

    def file(self, name: str, number: int) -> Path:
        return self.cache / "shards" / f"{name}-{number:05d}.h5"

    def _sources(self, name: str, spec: ArraySpec) -> list[str]:
        numbers = range(shard_count(spec.shape[0]))
        return [self.file(name, number).relative_to(self.cache).as_posix() for number in numbers]


def _own_dataset(file: h5py.File, name: str) -> h5py.Dataset | None:
    """A data set that lies in this HDF5 file; None if it is missing, or behind a link to another place."""
    node = file
    for step in name.split("/"):
        if not isinstance(node, h5py.Group) or not isinstance(node.get(step, getlink=True), h5py.HardLink):
            return None
        node = node[step]
    return node if isinstance(node, h5py.Dataset) else None
