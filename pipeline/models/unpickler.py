"""A restricted unpickler: nothing that a pickle names is imported, called or changed.

Checkpoints hold whole objects as often as state dicts, and the classes of the published ones (open_clip 2.0's
`VisualTransformer`, the task-vectors code's `ImageEncoder`) no longer exist. Every global becomes an inert `Global`,
every object an inert `PickledObject`, and only tensors are rebuilt, by this module.
"""

import io
import pickle
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
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
# Standard-library callables that legitimate pickled objects use. None is called here. Any other one is refused: a
# checkpoint has no use for it, and an attack has.
_HARMLESS = {
    "argparse": ("Namespace",),
    "builtins": ("bytearray", "complex", "dict", "frozenset", "getattr", "list", "object", "set", "slice"),
    "collections": ("Counter", "defaultdict", "deque"),
    "datetime": ("datetime", "timedelta"),
    "functools": ("partial",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    "types": ("SimpleNamespace",),
    "_codecs": ("encode",),
}
_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # in protocols up to 2


class UnreadableError(Exception):
    """The file's content is malformed or not allowed. The message is a clause without the file's name."""


class CutOffError(UnreadableError):
    """The file ends too early."""


@dataclass(frozen=True)
class Global:
    """A name in a pickle, which is not looked up."""

    path: str


@dataclass
class PickledObject:
    """The pickled state of an object, instead of the object."""

    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    """Entries, if it is a kind of dictionary."""


@dataclass
class Storage:
    """The values of one or more tensors; `bytes` is None until they are read."""

    dtype: torch.dtype
    numel: int
    bytes: bytearray | None = None


@dataclass(frozen=True)
class TensorView:
    """Where a tensor lies in its storage, which may not be read yet."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """Raises if the tensor exceeds its storage."""
        if not self.storage.numel or 0 in self.size:
            return torch.empty(self.size, dtype=self.storage.dtype)
        flat = torch.frombuffer(self.storage.bytes, dtype=self.storage.dtype)
        return flat.as_strided(self.size, self.stride, self.offset)


def _rebuild_tensor(
    storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: object
) -> TensorView:
    numbers = [offset, *size, *stride]
    if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise UnreadableError("it describes a tensor in a way that PyTorch does not")
    return TensorView(storage, offset, tuple(size), tuple(stride))


def _ordered_dict(entries: list[Any] | None = None) -> dict[Any, Any]:
    if entries is not None and type(entries) is not list:
        raise UnreadableError("it builds a dictionary from something other than a list")
    return dict(entries or ())


_REBUILT: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *rest: tensor,
    "torch.storage._load_from_bytes": lambda data: load_stream(io.BytesIO(data), len(data)),
    "torch.jit._pickle.restore_type_tag": lambda value, *rest: value,
    "collections.OrderedDict": _ordered_dict,
    "copyreg._reconstructor": lambda *args: PickledObject(),
}


def _call(function: object, args: object) -> object:
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise UnreadableError("it calls something that has no name")
    if function.path in _REBUILT:
        return _REBUILT[function.path](*args)
    module, _, name = function.path.partition(".")
    if module in sys.stdlib_module_names and name not in _HARMLESS.get(module, ()):
        raise UnreadableError(
            f"it would call {function.path} when unpickled, which no checkpoint needs; do not open it with other tools"
        )
    return PickledObject()


class _BoundedFile:
    """A file from which no more is requested than it has left: reading allocates the requested size."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.is_short = False  # whether a read requested more than was left

    def read(self, count: int) -> bytes:
        data = self._file.read(min(count, self._size - self._file.tell()))
        self.is_short |= len(data) < count
        return data

    def readline(self) -> bytes:
        line = self._file.readline()
        self.is_short |= not line.endswith(b"\n")
        return line


StorageLoader = Callable[[torch.dtype, str, int], Storage]
"""Maps a type, a key and a number of elements to a storage."""


class _Unpickler(pickle._Unpickler):
    """The pure-Python unpickler, with each opcode that could run something replaced by one that cannot.

    The C unpickler allocates what a damaged file claims to need, and its opcodes cannot be replaced.
    """

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    # Set by the base class, and unknown to type checkers.
    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: _BoundedFile, storage: StorageLoader | None = None) -> None:
        super().__init__(file)
        self._bounded_file, self._storage = file, storage

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
        except Exception as error:  # damaged opcodes can raise anything
            if self._bounded_file.is_short:
                raise CutOffError("it ends in the middle of a pickle") from error
            raise UnreadableError(f"it is not a valid pickle ({first_line(error)})") from error

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.append(_call(function, args))

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_reduce()

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, PickledObject):
            target.state = state
        elif not isinstance(target, dict | TensorView):  # the state of these two is not needed
            raise UnreadableError("it sets the state of something that has none")

    def load_dict(self) -> None:
        values = self.pop_mark()
        self.append({})
        self.update(values)

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(PickledObject())

    def extend(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)
        elif not isinstance(self.stack[-1], PickledObject):
            raise UnreadableError("it appends to something that is not a list")

    def update(self, values: list[Any]) -> None:
        target = self.stack[-1].items if isinstance(self.stack[-1], PickledObject) else self.stack[-1]
        if not isinstance(target, dict):
            raise UnreadableError("it sets an entry of something that is not a dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if isinstance(key, str | int | float | bytes | None):  # hashing other keys can be slow, weights have names
                target[key] = value

    def refuse(self) -> None:
        raise UnreadableError("it uses a part of the pickle format that no checkpoint uses")

    for _opcode, _method in {
        pickle.REDUCE: load_reduce,
        pickle.NEWOBJ: load_reduce,
        pickle.NEWOBJ_EX: load_newobj_ex,
        pickle.BUILD: load_build,
        pickle.DICT: load_dict,
        pickle.APPEND: lambda self: self.extend([self.stack.pop()]),
        pickle.APPENDS: lambda self: self.extend(self.pop_mark()),
        pickle.SETITEM: lambda self: self.update([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS: lambda self: self.update(self.pop_mark()),
        pickle.ADDITEMS: lambda self: self.pop_mark(),
        pickle.FROZENSET: load_frozenset,
        **dict.fromkeys((pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER), refuse),
    }.items():
        dispatch[_opcode[0]] = _method


def load_pickle(data: bytes, storage: StorageLoader) -> object:
    """The value of one pickle; `storage` provides the storages of its tensors."""
    return _Unpickler(_BoundedFile(io.BytesIO(data), len(data)), storage).load()


def load_stream(stream: BinaryIO, size: int) -> object:
    """The value of a file of `size` bytes: a pickle, or what `torch.save` wrote before 1.6.

    The latter is five pickles (magic number, version, system, value, keys of storages) followed by the storages.
    """
    file = _BoundedFile(stream, size)
    storages: dict[str, Storage] = {}

    def storage(dtype: torch.dtype, key: str, numel: int) -> Storage:
        return storages.setdefault(key, Storage(dtype, numel))

    first = _Unpickler(file).load()
    if first != _LEGACY_MAGIC:
        return first
    _version, system = _Unpickler(file).load(), _Unpickler(file).load()
    if isinstance(system, dict) and not system.get("little_endian", True):
        raise UnreadableError("it was written on a big-endian machine")
    value = _Unpickler(file, storage).load()
    keys = _Unpickler(file).load()
    if not isinstance(keys, list) or set(map(str, keys)) != storages.keys():
        raise UnreadableError("its list of storages does not agree with its tensors")
    for key in map(str, keys):
        header, expected = file.read(8), storages[key].numel * storages[key].dtype.itemsize
        data = bytearray(file.read(expected))
        if len(header) < 8 or len(data) < expected:
            raise CutOffError(f"it ends in the middle of a tensor ({len(data):,} of {expected:,} bytes)")
        if struct.unpack("<q", header)[0] != storages[key].numel:
            raise UnreadableError("a storage has another size than its tensors say")
        storages[key].bytes = data
    return value
