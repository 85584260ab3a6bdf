"""Features in files, one folder for each task: .npy, .npz, .safetensors or .pt, none of which can run anything here."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.errors import InputError, first_line
from probsurgery.pipeline.files import MalformedError, SourceFile, is_folder, read_json
from probsurgery.pipeline.fingerprints import file_digest
from probsurgery.pipeline.models.checkpoints import read_tensors, to_classifier
from probsurgery.pipeline.store.arrays import KINDS
from probsurgery.pipeline.store.imports import PARTS, Source, TaskSources, to_array
from probsurgery.pipeline.store.manifest import FILE as MANIFEST

ARRAYS = (".npy", ".npz", ".safetensors", ".pt", ".pth")
TEXTS = (".txt", ".json")
_FORMATS = {"class_names": TEXTS}
_OTHERS = (".csv", ".tsv", ".pkl", ".pickle", ".h5", ".hdf5", ".mat", ".parquet", ".bin", ".joblib")
"""Endings of data that is not read, and so may not be passed over either."""
_MOST_TEXT = 2**24


def read_folder(folder: Path, *, plain_features: bool = False) -> dict[str, TaskSources]:
    """The tasks of a folder: `<task>/merged.npy`, `expert.npy` and so on, and train images in `<task>/train/`.

    With `plain_features`, classifiers take features that are not normalised. Raises `InputError` for what is missing,
    cannot be read, or has a name that is none of `PARTS`.
    """
    if not is_folder(folder):
        raise InputError(f"{folder} is not a folder; import takes one with a folder for each task")
    folders = [path for path in sorted(folder.iterdir()) if is_folder(path) and not path.name.startswith(".")]
    tasks = [path for path in folders if not (path / MANIFEST).exists()]  # a cache may have been put among them
    example = f"{folder}/TASK/merged.npy and expert.npy"
    loose = next((path for path in sorted(folder.iterdir()) if path.suffix in ARRAYS and not is_folder(path)), None)
    if loose is not None:
        raise InputError(f"{loose} is of no task; put files into a folder for each task, as {example}")
    if not tasks:
        raise InputError(f"{folder} holds no folder of a task; put files into it as {example}")
    return {path.name: _read_task(path, plain_features=plain_features) for path in tasks}


def _read_task(folder: Path, *, plain_features: bool) -> TaskSources:
    found, splits = _parts(folder, PARTS), {}
    if not found.keys() & {*KINDS}:
        forms = f"merged.npy and expert.npy, or {', '.join(ARRAYS[1:])}"
        raise InputError(f"{folder} holds no features; it needs {forms}. If it is no task, move it away")
    train = folder / "train"
    of_splits = {"test": found} | ({"train": _parts(train, (*KINDS, "labels"))} if is_folder(train) else {})
    for split, parts in of_splits.items():
        splits[split] = {part: _source(parts[part], part) for part in (*KINDS, "labels") if part in parts}
    beside = [part for part in found if part in ("classifier", "class_names")]
    files = {part: _sealed(found[part]) for part in beside}
    classifier = _classifier(found["classifier"], plain_features) if "classifier" in found else None
    names = _class_names(found["class_names"]) if "class_names" in found else ()
    return TaskSources(splits, classifier, names, files)


def _parts(folder: Path, allowed: tuple[str, ...]) -> dict[str, Path]:
    """The file of each part. Other data is refused, because it may be a part whose name is misspelt."""
    parts: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in (*ARRAYS, *TEXTS, *_OTHERS):
            continue
        endings = _FORMATS.get(path.stem, ARRAYS)
        if path.stem not in allowed:
            if path.suffix in TEXTS:  # of another purpose
                continue
            raise InputError(f"{path} is none of: {', '.join(allowed)}; rename it, or move it away")
        if path.suffix not in endings:
            raise InputError(f"{path} is of no format that is read; save {path.stem} as {', '.join(endings)}")
        if is_folder(path) or not path.is_file():
            raise InputError(f"{path} is not a file; put the array's file in its place")
        if path.stem in parts:
            raise InputError(f"{path} and {parts[path.stem].name} are both {path.stem}; keep one of them")
        parts[path.stem] = path
    return parts


def _sealed(path: Path) -> SourceFile:
    return SourceFile(source=str(path), bytes=path.stat().st_size, sha256=file_digest(path))


def _source(path: Path, part: str) -> Source:
    return Source(str(path), partial(_read_array, path, part), _sealed(path))


def _read_array(path: Path, part: str) -> np.ndarray:
    """One array; a .npy file is mapped. Of several in a file, the one with the part's name counts."""
    named = _read_named(path)
    if isinstance(named, np.ndarray):
        return named
    if part not in named and len(named) != 1:
        names = ", ".join(list(named)[:5])
        raise InputError(f"{path} holds {len(named)} arrays ({names}); keep one, or call the right one {part!r}")
    return _member(path, named, part if part in named else next(iter(named)))


def _read_named(path: Path) -> np.ndarray | Mapping[str, Any]:
    """What a file holds: one array, or arrays by name that are read on access."""
    if path.suffix not in (".npy", ".npz"):
        return read_tensors(path)
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # the library raises anything for a damaged file
        raise _unreadable(path, error) from None
    if (path.suffix == ".npy") != isinstance(values, np.ndarray):
        raise InputError(f"{path} does not have the format of a {path.suffix} file; save it again")
    return values


def _member(path: Path, named: Mapping[str, Any], name: str) -> np.ndarray:
    try:
        return to_array(named[name], f"{path}: {name}")
    except InputError:
        raise
    except Exception as error:  # the library raises anything for a damaged file
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InputError:
    text = first_line(error)
    if any(word in text for word in ("allow_pickle", "pickled", "Python objects")):
        return InputError(f"{path} holds pickled Python objects, which are never read; save an array of numbers")
    if isinstance(error, ValueError) and "mmap length" in text:
        text = "it is cut off"
    return InputError(f"{path} cannot be read as an array: {text.rstrip('.')}; save or copy it again")


def _classifier(path: Path, plain_features: bool) -> Classifier:
    """A weight (C, d) alone, or `weight` and `bias`, and `normalise` if the file says so itself."""
    named = _read_named(path)
    if isinstance(named, np.ndarray):
        named = {"weight": np.array(named)}
    whole = "classifier" if "classifier" in named else next(iter(named)) if len(named) == 1 else None
    if whole not in (None, "bias", "normalise") and "weight" not in named:
        parts = {"weight": _member(path, named, whole)}
    else:
        parts = {name: _member(path, named, name) for name in named}
    normalise = parts.pop("normalise", None)
    if normalise is not None and (normalise.size != 1 or normalise.dtype.kind not in "biu"):
        raise InputError(f"{path}: normalise is {normalise.dtype} of shape {normalise.shape}; it is true or false")
    heeds = not plain_features if normalise is None else bool(normalise)
    odd = next((name for name, values in parts.items() if values.dtype.kind != "f"), None)
    if odd is not None and odd in ("weight", "bias"):
        raise InputError(f"{path}: {odd} is {parts[odd].dtype}; a classifier's are floating-point numbers")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values, np.float32)) for name, values in parts.items()}
    return to_classifier(tensors, path, normalise=heeds)


def _class_names(path: Path) -> tuple[str, ...]:
    try:
        if path.suffix == ".json":
            names = read_json(path, _MOST_TEXT)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise InputError(f"{path} is not a list of texts; write one name for each class, in order")
            return tuple(names)
        if path.stat().st_size > _MOST_TEXT:
            raise InputError(f"{path} has more than {_MOST_TEXT:,} bytes; it holds one class name a line")
        return tuple(path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n"))  # U+2028 ends no line
    except (MalformedError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}; save it as UTF-8") from None
