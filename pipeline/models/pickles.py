"""Pickled checkpoints -> named tensors, without running or importing anything that the file names.

`torch.save` writes a zip archive (since 1.6) or a stream of pickles followed by raw storages (before); `pickle.dump` of
a model nests such a stream in every tensor. All three hold whole objects as often as state dicts, and the classes of
the published ones (open_clip 2.0's `VisualTransformer`, the task-vectors code's `ImageEncoder`) exist no more. So every
global becomes an inert `Global`, every object an inert `Record`, and only tensors are rebuilt, by this module.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from probsurgery.pipeline.errors import first_line

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
# Calls into the standard library that pickled objects make for good reasons. None is made here; any other is refused,
# because a checkpoint has no use for it and an attack has.
_HARMLESS = {
    "argparse.Namespace",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.dict",
    "builtins.frozenset",
    "builtins.getattr",
    "builtins.list",
    "builtins.object",
    "builtins.set",
    "builtins.slice",
    "collections.Counter",
    "collections.defaultdict",
    "collections.deque",
    "datetime.datetime",
    "datetime.timedelta",
    "functools.partial",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "types.SimpleNamespace",
    "_codecs.encode",
}
_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as protocols up to 2 spell them
_MOST_ENTRIES = 100_000
_DEEPEST = 50


class UnreadableError(Exception):
    """The file is not what it claims to be; the message says how, without the file's name."""


class CutOffError(UnreadableError):
    """The file ends too early."""


@dataclass(frozen=True)
class Global:
    """Something that a pickle names, and that is not looked up."""

    path: str


@dataclass
class Record:
    """What a pickled object was made of."""

    path: str
    args: tuple = ()
    state: Any = None
    items: dict = field(default_factory=dict)
    """Entries, if it is a kind of dictionary."""


@dataclass
class _Storage:
    dtype: torch.dtype
    numel: int
    bytes: bytearray | None = None


@dataclass(frozen=True)
class _View:
    """A tensor that is not made yet."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        if not self.storage.numel or 0 in self.size:
            return torch.empty(self.size, dtype=self.storage.dtype)
        flat = torch.frombuffer(self.storage.bytes, dtype=self.storage.dtype)
        return flat.as_strided(self.size, self.stride, self.offset)  # refuses what lies outside of the storage


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *rest: object) -> _View:
    numbers = [offset, *size, *stride]
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise UnreadableError("it describes a tensor in a way that PyTorch does not")
    return _View(storage, offset, tuple(size), tuple(stride))


def _ordered_dict(entries: list | None = None) -> dict:
    if entries is not None and type(entries) is not list:
        raise UnreadableError("it makes a dictionary of something else than a list")
    return dict(entries or ())


def _reconstructor(cls: Global, *rest: object) -> Record:
    return Record(cls.path)


_REBUILT: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *rest: tensor,
    "torch.storage._load_from_bytes": lambda data: _legacy_object(_Source(io.BytesIO(data), len(data))),
    "torch.jit._pickle.restore_type_tag": lambda value, *rest: value,
    "collections.OrderedDict": _ordered_dict,
    "copyreg._reconstructor": _reconstructor,
}


def _call(function: object, args: tuple) -> object:
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise UnreadableError("it calls something that has no name")
    if function.path in _REBUILT:
        return _REBUILT[function.path](*args)
    if function.path.partition(".")[0] in sys.stdlib_module_names and function.path not in _HARMLESS:
        raise UnreadableError(
            f"it would call {function.path} when unpickled, which no checkpoint needs; do not open it with other tools"
        )
    return Record(function.path, args)


class _Source:
    """A file that is never asked for more than it has, because reading allocates what it is asked for."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.short = False
        """Whether more was wanted than there was."""

    def read(self, count: int) -> bytes:
        data = self._file.read(min(count, self._size - self._file.tell()))
        self.short |= len(data) < count
        return data

    def readline(self) -> bytes:
        line = self._file.readline()
        self.short |= not line.endswith(b"\n")
        return line


class _Reader(pickle._Unpickler):
    """The pure-Python unpickler, with each opcode that could run something replaced by one that cannot.

    The C one allocates what a damaged file claims to need, and leaves no opcode to replace.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, source: _Source, storage: Callable[[torch.dtype, str, int], _Storage] | None = None) -> None:
        super().__init__(source)
        self._source, self._storage = source, storage

    def find_class(self, module: str, name: str) -> Global:
        return Global(f"{_OLD_NAMES.get(module, module)}.{name}")

    def persistent_load(self, pid: object) -> object:
        match pid:
            case ("module", Global() as cls, *_):
                return cls
            case ("storage", Global(path=path), str(key), _, int(numel), *_) if self._storage and numel >= 0:
                dtype = _DTYPES.get(path.rpartition(".")[2])
                if dtype is None:
                    raise UnreadableError(f"it holds tensors of an unknown type ({path})")
                return self._storage(dtype, key, numel)
        raise UnreadableError("it refers to data in a way that PyTorch does not")

    def load(self) -> object:
        try:
            return super().load()
        except UnreadableError:
            raise
        except Exception as error:  # garbled opcodes can raise anything
            if self._source.short:
                raise CutOffError("it ends in the middle of a pickle") from error
            raise UnreadableError(f"it is no valid pickle ({first_line(error)})") from error

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.append(_call(function, args))

    def load_newobj(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.append(_call(cls, args))

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_newobj()

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Record):
            made.state = state
        elif not isinstance(made, dict | _View):  # what either carries besides its contents is of no use here
            raise UnreadableError("it sets the state of something that has none")

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        values = self.pop_mark()
        self._extend(values)

    def _extend(self, values: list) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)
        elif not isinstance(self.stack[-1], Record):
            raise UnreadableError("it appends to something that is no list")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def load_setitems(self) -> None:
        values = self.pop_mark()
        self._update(values)

    def _update(self, values: list) -> None:
        target = self.stack[-1].items if isinstance(self.stack[-1], Record) else self.stack[-1]
        if not isinstance(target, dict):
            raise UnreadableError("it sets an entry of something that is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if isinstance(key, str | int | float | bytes | None):  # weights have plain names; others can be costly
                target[key] = value

    def load_dict(self) -> None:
        values = self.pop_mark()
        self.append({})
        self._update(values)

    def load_additems(self) -> None:
        self.pop_mark()

    def load_frozenset(self) -> None:
        self.append(Record("builtins.frozenset", tuple(self.pop_mark())))

    def refuse(self) -> None:
        raise UnreadableError("it uses a part of the pickle format that no checkpoint does")

    for _opcode, _method in {
        pickle.REDUCE: load_reduce,
        pickle.NEWOBJ: load_newobj,
        pickle.NEWOBJ_EX: load_newobj_ex,
        pickle.BUILD: load_build,
        pickle.APPEND: load_append,
        pickle.APPENDS: load_appends,
        pickle.SETITEM: load_setitem,
        pickle.SETITEMS: load_setitems,
        pickle.DICT: load_dict,
        pickle.ADDITEMS: load_additems,
        pickle.FROZENSET: load_frozenset,
        **dict.fromkeys((pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER), refuse),
    }.items():
        dispatch[_opcode[0]] = _method


def read_zip(path: Path) -> object:
    """What `torch.save` wrote as a zip archive. The archive's own checksums are checked."""
    storages: dict[str, _Storage] = {}
    left = path.stat().st_size

    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        kind = CutOffError if "not a zip file" in str(error) else UnreadableError  # its directory stands at its end
        raise kind(f"its zip archive has no whole directory ({error})") from error
    except Exception as error:  # a garbled directory can raise anything
        raise UnreadableError(f"the directory of its zip archive is damaged ({type(error).__name__})") from error

    def read(name: str, most: int) -> bytes:
        try:
            info = archive.getinfo(name)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
                raise UnreadableError(f"its entry {name!r} does not have the size that it should have")
            return archive.read(info)
        except KeyError:
            raise UnreadableError(f"it lacks the entry {name!r}") from None
        except UnreadableError:
            raise
        except Exception as error:  # of a wrong checksum, or of garbled headers
            raise UnreadableError(f"its entry {name!r} is damaged ({error})") from error

    with archive:
        roots = [n.removesuffix("data.pkl") for n in archive.namelist() if n.count("/") <= 1 and n.endswith("data.pkl")]
        if len(roots) != 1:
            held = ", ".join(archive.namelist()[:3]) or "nothing"
            raise UnreadableError(f"it is a zip archive, but not one of torch.save (it holds {held})")
        root = roots[0]
        if f"{root}byteorder" in archive.namelist() and read(f"{root}byteorder", 16) != b"little":
            raise UnreadableError("it was written on a big-endian machine")

        def storage(dtype: torch.dtype, key: str, numel: int) -> _Storage:
            nonlocal left
            if key not in storages:
                data = bytearray(read(f"{root}data/{key}", left))
                left -= len(data)  # entries that lie over each other cannot take more memory than the file is long
                storages[key] = _filled(dtype, numel, data)
            if storages[key].dtype != dtype:
                raise UnreadableError("it reads one storage as two types")
            return storages[key]

        pickled = read(f"{root}data.pkl", left)
        return _Reader(_Source(io.BytesIO(pickled), len(pickled)), storage).load()


def read_stream(path: Path) -> object:
    """What `pickle.dump`, or `torch.save` before 1.6, wrote."""
    with path.open("rb") as file:
        return _legacy_object(_Source(file, path.stat().st_size))


def _legacy_object(file: _Source) -> object:
    """The object of a pickle, or of the stream that `torch.save` wrote before 1.6, its storages filled."""
    storages: dict[str, _Storage] = {}

    def storage(dtype: torch.dtype, key: str, numel: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, numel))

    first = _Reader(file).load()
    if first != _LEGACY_MAGIC:
        return first
    _version, about = _Reader(file).load(), _Reader(file).load()
    if isinstance(about, dict) and not about.get("little_endian", True):
        raise UnreadableError("it was written on a big-endian machine")
    value = _Reader(file, storage).load()
    keys = _Reader(file).load()
    if not isinstance(keys, list) or set(map(str, keys)) != storages.keys():
        raise UnreadableError("its list of storages does not agree with its tensors")
    for key in keys:
        held = storages[key]
        header = file.read(8)
        wanted = held.numel * held.dtype.itemsize
        data = bytearray(file.read(wanted)) if len(header) == 8 else bytearray()
        if len(data) < wanted or len(header) < 8:
            raise CutOffError(f"it ends in the middle of a tensor ({len(data):,} of {wanted:,} bytes)")
        if struct.unpack("<q", header)[0] != held.numel:
            raise UnreadableError("a storage has another size than its tensors say")
        held.bytes = data
    return value


def _filled(dtype: torch.dtype, numel: int, data: bytearray) -> _Storage:
    if len(data) != numel * dtype.itemsize:
        raise UnreadableError(f"a storage has {len(data):,} bytes instead of {numel * dtype.itemsize:,}")
    return _Storage(dtype, numel, data)


def named_tensors(value: object, most_bytes: int) -> dict[str, Tensor]:
    """The state dict of a pickled model, or the tensors of a (nested) dictionary, by their dotted names.

    Raises `UnreadableError` if the tensors would take more than `most_bytes`: a file cannot hold more than it is long.
    """
    views = dict(_views(value))
    held = sum(math.prod(view.size) * view.storage.dtype.itemsize for view in views.values())
    if held > most_bytes:
        raise UnreadableError(f"it claims {held:,} bytes of tensors, more than a file of its size can hold")
    try:
        return {name: view.tensor() for name, view in views.items()}
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise UnreadableError("a tensor lies outside of its storage") from error


def _views(value: object) -> Iterator[tuple[str, _View]]:
    """The tensors within a value. Objects can refer to each other, so how far this goes is bounded."""
    waiting = deque([((), value)])
    for _ in range(_MOST_ENTRIES):
        if not waiting:
            return
        names, value = waiting.popleft()
        if isinstance(value, _View):
            yield ".".join(names), value
        elif len(names) < _DEEPEST:
            waiting.extend(((*names, key), entry) for key, entry in _entries(value).items() if isinstance(key, str))
    raise UnreadableError("it has more entries than a model can have")


def _entries(value: object) -> dict:
    """What is named within a value: a module's parameters, buffers and modules, or a dictionary's entries."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Record):
        return {}
    state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
    if not isinstance(state, dict):
        return value.items
    parts = [state.get(part) for part in ("_parameters", "_buffers", "_modules")]
    if any(isinstance(part, dict) for part in parts):
        return {key: entry for part in parts if isinstance(part, dict) for key, entry in part.items()}
    return state | value.items
