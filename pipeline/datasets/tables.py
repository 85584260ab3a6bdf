"""Data sets in tables, opened by the `datasets` library: those of the Hub, Parquet, CSV and JSON files, folders of its
own `save_to_disk`, and webdataset tars. The library decodes no image: `pictures` does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from probsurgery.pipeline.datasets.layouts import SPLIT_WORDS, ClassIndex, listed, read_text, text_encoding
from probsurgery.pipeline.datasets.pictures import read_rgb, to_rgb
from probsurgery.pipeline.errors import InputError, first_line
from probsurgery.pipeline.files import Record
from probsurgery.pipeline.hub import explain, storage_problem

if TYPE_CHECKING:
    from datasets import Dataset

_BYTES_OR_PATHS = ("binary", "large_binary", "string", "large_string")
_BUILDERS = {
    ".parquet": "parquet",
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    ".tar": "webdataset",
}
"""The library's builder by the suffix of a single file."""
_MOST_CLASSES = 2**16
_COLUMNS = {
    "image": ("image", "img", "file_name", "filename", "file", "path", "filepath", "image_path", "jpg", "png"),
    "label": ("label", "labels", "class", "class_name", "category", "target", "fine_label", "cls"),
}
"""Names that columns of images and of labels commonly have; used where none is given, and one of them is there."""


class HubDataset(Record, frozen=True):
    """A data set of the Hugging Face Hub: its names of our splits, its columns of images and labels."""

    id: str
    split: dict[str, str]
    image: str = ""
    label: str = ""
    """Names of columns; empty: one of `_COLUMNS`."""
    config: str | None = None


@dataclass(frozen=True)
class Table:
    """One split of a data set: labels (N,), and the images as files or the bytes of files."""

    labels: np.ndarray
    images: "Dataset"
    column: str
    source: str
    names: Sequence[str] | None
    """The data set's own class names, in its order."""
    class_order: str
    folder: Path | None = None
    """Where paths of images begin."""
    paths: Sequence[str] = ()
    """Of a table that has nothing else of its images."""

    def decode(self, row: int) -> Image.Image:
        """The image of a row. Raises ValueError if the row has none, or names the file that cannot be decoded."""
        value = self.images[int(row)][self.column] or {}
        content, name = value.get("bytes"), value.get("path") or ""
        if content is None and not name:
            raise ValueError("the row has no image")
        try:
            if content is not None:
                return read_rgb(content)
            path = (self.folder or Path()) / name
            path = path if path.is_file() else (self.folder or Path()) / name.replace("\\", "/")
            return read_rgb(path) if path.is_file() else self._fetched(name)
        except Exception as error:  # damaged image files raise anything in their decoders
            raise ValueError(f"{name}: {first_line(error)}" if name else first_line(error)) from None

    def _fetched(self, name: str) -> Image.Image:
        """An image that is in an archive or in a repository of the Hub, which the library can open."""
        import datasets

        archive = name.rpartition("::")[2]
        # What a file of one's own names is nowhere else, as in the working directory or at an address.
        if self.folder is not None and (archive == name or not Path(archive).is_file()):
            raise ValueError(f"there is no such file in {self.folder}")

        return to_rgb(datasets.Image().decode_example({"path": name, "bytes": None}))

    def encoded(self, row: int) -> bytes:
        """The bytes of a row's image, without decoding it; none if it is neither in the table nor in the folder."""
        value = self.images[int(row)][self.column] or {}
        file = (self.folder or Path()) / (value.get("path") or "")
        return value.get("bytes") or (file.read_bytes() if self.paths and file.is_file() else b"")


def has_table(folder: Path) -> bool:
    """Whether a folder holds a data set that `open_table` reads."""
    return bool(_saved(folder) or listed(folder, "**/*.parquet") or listed(folder, "**/*.tar"))


@dataclass(frozen=True)
class TableSource:
    """One split of a data set: of the Hub, or in a folder or file."""

    hub: HubDataset
    split: str
    """What the data set calls the split."""
    place: Path | None = None
    is_exact: bool = False
    """Whether the place was named for this very split, and is not one where data sets are looked for."""

    def __str__(self) -> str:
        return f"data set {self.place or self.hub.id}"

    @property
    def folder(self) -> Path | None:
        """Where paths of images begin, and class names may be listed."""
        return self.place.parent if self.place and self.place.is_file() else self.place


def open_table(source: TableSource, classes: ClassIndex, *, labelled: bool = True) -> Table:
    """One split of a data set.

    Labels are numbers, or class names in any spelling; -1 unless `labelled`. Raises `InputError` if it cannot be
    loaded, lacks a column or a label, or lists the classes in another order than ours.
    """
    table = _load(source, classes.task)
    import datasets

    image = _column(table, "image", source)
    kind = table.features[image]
    if not isinstance(kind, datasets.Image | dict) and getattr(kind, "dtype", None) not in _BYTES_OR_PATHS:
        raise InputError(f"{source} has {kind} in column {image!r}, and not image files or their bytes")
    names, order, labels = None, "no labels", np.full(len(table), -1)
    if labelled:
        label = _column(table, "label", source)
        names = getattr(table.features[label], "names", None) or _listed_names(source.folder)
        if names is not None and len(names) != len(classes.names):
            raise InputError(f"{source} has {len(names)} classes, but {classes.task} has {len(classes.names)}")
        checked = None if names is None else classes.check_order(names, str(source))
        are_names = names is None and all(name.isascii() and name.isdigit() for name in classes.names)
        labels, by_name = _labels(list(table[label]), f"{source} ({source.split})", classes, are_names=are_names)
        order = checked or ("by name" if by_name else "names unknown")
    paths = list(table[image]) if getattr(kind, "dtype", None) in _BYTES_OR_PATHS[2:] else ()
    images = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return Table(labels, images, image, str(source.place or source.hub.id), names, order, source.folder, paths)


def class_names(source: TableSource, task: str) -> tuple[list[str], bool]:
    """The classes of a data set, and whether they are in the order of the labels.

    They are those that it lists, or 0 to the largest label; else the distinct labels, sorted.
    """
    table = _load(source, task)
    label = _column(table, "label", source)
    if names := getattr(table.features[label], "names", None) or _listed_names(source.folder):
        return list(names), True
    values = _plain_labels(list(table[label]), f"{source} ({source.split})")
    if all(isinstance(value, str) for value in values):
        if not all(value.isascii() and value.isdigit() and str(int(value)) == value for value in values):
            return sorted(set(values)), False
        values = [int(value) for value in values]
    largest = max(values, default=-1)
    if largest >= _MOST_CLASSES:
        raise InputError(f"{source} has a label {largest}; list the names of its classes as `classes`")
    return [str(number) for number in range(int(largest) + 1)], True


def _column(table: "Dataset", kind: str, source: TableSource) -> str:
    """The column of images or labels: the given one, or that with a usual name."""
    import datasets

    names, given = table.column_names, source.hub.image if kind == "image" else source.hub.label
    # Columns of tars are called after the suffixes of their files.
    if "__key__" in names and not (source.is_exact and given):
        of_images = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
        given = (of_images or [given])[0] if kind == "image" else "cls"
    found = given or next((name for name in _COLUMNS[kind] if name in names), _COLUMNS[kind][0])
    if found not in names:
        advice = "" if given else f"; name the column of {kind}s by `{kind}`"
        raise InputError(f"{source} has no column {found!r}; it has: {', '.join(names)}{advice}")
    return found


def _load(source: TableSource, task: str) -> "Dataset":
    try:
        import datasets
    except ImportError:
        raise InputError(f"task {task} needs the package datasets; pip install 'probsurgery[hub]'") from None
    place = source.place
    try:
        if place is None:
            return datasets.load_dataset(source.hub.id, source.hub.config, split=source.split)
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised too, and become one line
        if place.is_file():
            return _load_files([place], source.split)
        return _load_folder(place, source)
    except InputError:
        raise
    except Exception as error:  # the library raises its own, the hub client's and the OS's errors
        if place is None:
            raise InputError(explain(error, source.hub.id, "--data", "dataset")) from None
        if storage := storage_problem(error, f"the data set {place}"):
            raise InputError(storage) from None
        while isinstance(error.__cause__, Exception):  # the library's own says only that something went wrong
            error = error.__cause__
        problem = f"cannot load the data set {place}, split {source.split} ({first_line(error)})"
        raise InputError(f"{problem}; check its files") from None


def _load_files(files: Sequence[Path], split: str) -> "Dataset":
    """Files of one kind."""
    import datasets

    suffix = files[0].suffix.lower()
    if suffix not in _BUILDERS:
        raise InputError(f"{files[0]} is no table of images; known are: {', '.join(_BUILDERS)}")
    settings: dict[str, Any] = {}
    if _BUILDERS[suffix] == "csv":  # cells as they stand: 01 is no number and NA not missing, as either may be a class
        header = next(iter(read_text(files[0]).splitlines()), "")
        settings = {"sep": max(",;\t", key=header.count), "keep_default_na": False, "skipinitialspace": True}
        settings |= {"index_col": False, "encoding": text_encoding(files[0])}
        settings["converters"] = dict.fromkeys(range(header.count(settings["sep"]) + 1), str)
    paths = {split: [escape(str(path)) for path in files]}
    return datasets.load_dataset(_BUILDERS[suffix], data_files=paths, split=split, **settings)


def _load_folder(folder: Path, source: TableSource) -> "Dataset":
    import datasets

    saved, split, config = _saved(folder), source.split, source.hub.config
    if saved:
        place = folder / split if folder / split in saved else folder
        if place not in saved:
            raise InputError(f"{folder} has no split {split}; it has: {', '.join(path.name for path in saved)}")
        table = datasets.load_from_disk(str(place))
        # A table that was not loaded knows no split.
        if place == folder and not source.is_exact and str(table.split or "test") != split:
            held = table.split or "without a name"
            raise InputError(f"{folder} holds one split ({held}); save the split {split} to {folder / split}")
        return table
    # The library's own search takes what other programs leave, and guesses a format from it.
    files = listed(folder, "**/*.parquet") or listed(folder, "**/*.tar")
    words = {path: set(re.split("[^a-z]+", path.relative_to(folder).as_posix().lower())) for path in files}
    own = [path for path in files if words[path] & SPLIT_WORDS.get(split, {split})]
    own = [path for path in own if config in path.parts] or own
    if source.is_exact and not own and not any(words[path] & set().union(*SPLIT_WORDS.values()) for path in files):
        own = files
    if not own:
        found = ", ".join(path.relative_to(folder).as_posix() for path in files[:4])
        raise InputError(f"{folder} has no file of the split {split}, by its name or its folder's; it has: {found}")
    return _load_files(own, split)


def _saved(folder: Path) -> list[Path]:
    """The folders, this one and those in it, that `save_to_disk` wrote a table to."""
    infos = (info for pattern in ("state.json", "*/state.json") for info in listed(folder, pattern))
    return [info.parent for info in infos if (info.parent / "dataset_info.json").is_file()]


def _listed_names(folder: Path | None) -> list[str] | None:
    """The class names in order, which CLIP benchmark's tars have beside them."""
    path = folder and folder / "classnames.txt"
    return [line for line in read_text(path).splitlines() if line.strip()] if path and path.is_file() else None


def _labels(values: Sequence[Any], where: str, classes: ClassIndex, *, are_names: bool) -> tuple[np.ndarray, bool]:
    """Labels (N,), from numbers or from class names, and whether they are from names; numbers may be names too."""
    plain = _plain_labels(values, where)
    if plain and (are_names or isinstance(plain[0], str)):
        known = {value: classes.label(str(value), where) for value in dict.fromkeys(plain)}
        return np.array([known[value] for value in plain], dtype=np.int64), True
    return np.array(plain, dtype=np.int64), False


def _plain_labels(values: Sequence[Any], where: str) -> list[Any]:
    """Labels that are all whole numbers from 0, or all class names. Raises `InputError` for anything else."""
    plain = [value.strip() if isinstance(value, str) else value for value in values]
    missing = next((row for row, value in enumerate(plain) if value in (None, "") or value != value), None)
    if missing is not None:
        raise InputError(f"{where} has no label in row {missing}; give it one, or remove the row")
    if plain and all(isinstance(value, str) for value in plain):
        return plain
    for value in plain:
        if not isinstance(value, int | float) or not abs(value) < 2**31 or value != int(value):
            raise InputError(f"{where} has a label {str(value)[:80]!r}; labels are numbers from 0, or class names")
    return [int(value) for value in plain]
