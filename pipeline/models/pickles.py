"""Reads named tensors from pickled checkpoint files, by the restricted unpickler.

`torch.save` writes a zip archive since 1.6, and wrote a stream of pickles followed by raw storages before.
`pickle.dump` of a model nests such a stream in every tensor.
"""

import math
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probsurgery.pipeline.models.unpickler import (
    CutOffError,
    PickledObject,
    Storage,
    TensorView,
    UnreadableError,
    load_pickle,
)

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts save the model next to their own data."""
_MAX_ENTRIES = 100_000
_MAX_DEPTH = 50


def read_zip(path: Path) -> object:
    """The value that `torch.save` wrote as a zip archive. The archive's own checksums are verified."""
    storages: dict[str, Storage] = {}
    left = path.stat().st_size
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        kind = CutOffError if "not a zip file" in str(error) else UnreadableError  # its directory is at its end
        raise kind(f"its zip archive has no complete directory ({error})") from error
    except Exception as error:  # a damaged directory can raise anything
        raise UnreadableError(f"the directory of its zip archive is damaged ({type(error).__name__})") from error

    entries = {info.filename: info for info in archive.infolist()}

    def read(name: str, max_bytes: int) -> bytes:
        if name not in entries:
            raise UnreadableError(f"it lacks the entry {name!r}")
        info = entries[name]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > max_bytes:
            raise UnreadableError(f"its entry {name!r} does not have the size that it should have")
        try:
            return archive.read(info)
        except Exception as error:  # a wrong checksum or a damaged header
            raise UnreadableError(f"its entry {name!r} is damaged ({error})") from error

    with archive:
        pickles = [name for name in entries if name.count("/") <= 1 and name.endswith("data.pkl")]
        if len(pickles) != 1:
            content = ", ".join(list(entries)[:3]) or "nothing"
            raise UnreadableError(f"it is a zip archive, but not one of torch.save (it holds {content})")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in entries and read(f"{root}byteorder", 16) != b"little":
            raise UnreadableError("it was written on a big-endian machine")

        def storage(dtype: torch.dtype, key: str, numel: int) -> Storage:
            nonlocal left
            if key not in storages:
                data = bytearray(read(f"{root}data/{key}", left))
                left -= len(data)  # overlapping entries cannot take more memory than the file has bytes
                if len(data) != numel * dtype.itemsize:
                    raise UnreadableError(f"a storage has {len(data):,} bytes instead of {numel * dtype.itemsize:,}")
                storages[key] = Storage(dtype, numel, data)
            if storages[key].dtype != dtype:
                raise UnreadableError("it reads one storage as two types")
            return storages[key]

        return load_pickle(read(pickles[0], left), storage)


def named_tensors(value: object, max_bytes: int) -> dict[str, Tensor]:
    """The state dict of a pickled model, or the tensors of a (nested) dictionary, by their dotted names.

    Raises `UnreadableError` if the tensors would take more than `max_bytes`, the size of the file.
    """
    for wrapper in _WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(wrapper), dict | PickledObject):
            value = value[wrapper]
    views = dict(_views(value))
    size = sum(math.prod(view.size) * view.storage.dtype.itemsize for view in views.values())
    if size > max_bytes:
        raise UnreadableError(f"it claims {size:,} bytes of tensors, more than a file of its size can hold")
    try:
        return {name: view.tensor() for name, view in views.items()}
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise UnreadableError("a tensor exceeds its storage") from error


def _views(value: object) -> Iterator[tuple[str, TensorView]]:
    """The tensors within a value. The search is bounded, because objects can refer to each other."""
    queue: deque[tuple[tuple[str, ...], object]] = deque([((), value)])
    for _ in range(_MAX_ENTRIES):
        if not queue:
            return
        names, value = queue.popleft()
        if isinstance(value, TensorView):
            yield ".".join(names), value
        elif len(names) < _MAX_DEPTH:
            queue.extend(((*names, key), entry) for key, entry in _entries(value).items() if isinstance(key, str))
    raise UnreadableError("it has more entries than a model can have")


def _entries(value: object) -> dict[Any, Any]:
    """Named entries of a value: a module's parameters, buffers and modules, or a dictionary's entries."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, PickledObject):
        return {}
    state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
    if not isinstance(state, dict):
        return value.items
    names = ("_parameters", "_buffers", "_modules")
    groups = [state[name] for name in names if isinstance(state.get(name), dict)]
    return {key: entry for group in groups for key, entry in group.items()} if groups else state | value.items
