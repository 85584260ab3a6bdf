"""Data sets in tables, opened by the `datasets` library: those of the Hub, and folders of Parquet files, of its own
`save_to_disk`, and of webdataset tars. The library decodes no image: `pictures` does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from probsurgery.pipeline.datasets.layouts import ClassIndex, listed, read_text
from probsurgery.pipeline.datasets.pictures import read_rgb, to_rgb
from probsurgery.pipeline.errors import InputError, first_line
from probsurgery.pipeline.files import Record
from probsurgery.pipeline.hub import explain, storage_problem

if TYPE_CHECKING:
    from datasets import Dataset

_SPLIT_WORDS = {"test": {"test", "testing", "eval", "evaluation"}, "train": {"train", "training"}}
"""By split: what the path of its files has as a word."""
_BYTES_OR_PATHS = ("binary", "large_binary", "string", "large_string")


class HubDataset(Record, frozen=True):
    """A data set of the Hugging Face Hub: its names of our splits, its columns of images and labels."""

    id: str
    split: dict[str, str]
    image: str
    label: str
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
            return read_rgb(path) if path.is_file() else self._fetched(name)
        except Exception as error:  # damaged image files raise anything in their decoders
            raise ValueError(f"{name}: {first_line(error)}" if name else first_line(error)) from None

    def _fetched(self, name: str) -> Image.Image:
        """An image that is in an archive or in a repository of the Hub, which the library can open."""
        import datasets

        return to_rgb(datasets.Image().decode_example({"path": name, "bytes": None}))

    def encoded(self, row: int) -> bytes:
        """The bytes of a row's image, without decoding it; none if the row has only a path."""
        return (self.images[int(row)][self.column] or {}).get("bytes") or b""


def has_table(folder: Path) -> bool:
    """Whether a folder holds a data set that `open_table` reads."""
    return bool(_saved(folder) or listed(folder, "**/*.parquet") or listed(folder, "**/*.tar"))


def open_table(task: str, hub: HubDataset, split: str, folder: Path | None, classes: ClassIndex) -> Table:
    """One split of a data set of the Hub, or of a folder.

    Labels are numbers, or class names in any spelling. Raises `InputError` if it cannot be loaded, lacks a column or a
    label, or lists the classes in another order than ours.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"task {task} needs the package datasets; pip install 'probsurgery[hub]'") from None
    path = hub.id if folder is None else str(folder)
    where, table = f"data set {path}", _load(hub, hub.split[split], folder)
    image, label = hub.image, hub.label
    if "__key__" in table.column_names:  # of tars, whose columns are called after the suffixes of their files
        image = next((n for n, kind in table.features.items() if isinstance(kind, datasets.Image)), image)
        label = "cls"
    for column in (image, label):
        if column not in table.column_names:
            raise InputError(f"{where} has no column {column!r}; it has: {', '.join(table.column_names)}")
    kind = table.features[image]
    if not isinstance(kind, datasets.Image | dict) and getattr(kind, "dtype", None) not in _BYTES_OR_PATHS:
        raise InputError(f"{where} has {kind} in column {image!r}, and not image files or their bytes")
    names = getattr(table.features[label], "names", None) or _listed_names(folder)
    if names is not None and len(names) != len(classes.names):
        raise InputError(f"{where} has {len(names)} classes, but {task} has {len(classes.names)}")
    order = None if names is None else classes.check_order(names, where)
    labels, by_name = _labels(list(table[label]), f"{where} ({split})", classes)
    order = order or ("by name" if by_name else "names unknown")
    images = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return Table(labels, images, image, path, names, order, folder)


def _load(hub: HubDataset, split: str, folder: Path | None) -> "Dataset":
    import datasets

    try:
        if folder is None:
            return datasets.load_dataset(hub.id, hub.config, split=split)
        return _load_folder(folder, hub.config, split)
    except InputError:
        raise
    except Exception as error:  # the library raises its own, the hub client's and the OS's errors
        if folder is None:
            raise InputError(explain(error, hub.id, "--data", "dataset")) from None
        if storage := storage_problem(error, f"the data set {folder}"):
            raise InputError(storage) from None
        while isinstance(error.__cause__, Exception):  # the library's own says only that something went wrong
            error = error.__cause__
        problem = f"cannot load the data set {folder}, split {split} ({first_line(error)})"
        raise InputError(f"{problem}; check its files") from None


def _load_folder(folder: Path, config: str | None, split: str) -> "Dataset":
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised too, and become one line
    saved = _saved(folder)
    if saved:
        place = folder / split if folder / split in saved else folder
        if place not in saved:
            raise InputError(f"{folder} has no split {split}; it has: {', '.join(path.name for path in saved)}")
        table = datasets.load_from_disk(str(place))
        if place == folder and str(table.split or "test") != split:  # a table that was not loaded knows no split
            held = table.split or "without a name"
            raise InputError(f"{folder} holds one split ({held}); save the split {split} to {folder / split}")
        return table
    files = {kind: listed(folder, f"**/*.{suffix}") for kind, suffix in (("parquet", "parquet"), ("webdataset", "tar"))}
    kind = "parquet" if files["parquet"] else "webdataset"
    # The library's own search takes what other programs leave, and guesses a format from it.
    words = {path: path.relative_to(folder).as_posix().lower() for path in files[kind]}
    own = [
        path
        for path, text in words.items()
        if not _SPLIT_WORDS.get(split, {split}).isdisjoint(re.split("[^a-z]+", text))
    ]
    own = [path for path in own if config in path.parts] or own
    if not own:
        found = ", ".join(path.relative_to(folder).as_posix() for path in files[kind][:4])
        raise InputError(f"{folder} has no file of the split {split}, by its name or its folder's; it has: {found}")
    return datasets.load_dataset(kind, data_files={split: [escape(str(path)) for path in own]}, split=split)


def _saved(folder: Path) -> list[Path]:
    """The folders, this one and those in it, that `save_to_disk` wrote a table to."""
    infos = (info for pattern in ("state.json", "*/state.json") for info in listed(folder, pattern))
    return [info.parent for info in infos if (info.parent / "dataset_info.json").is_file()]


def _listed_names(folder: Path | None) -> list[str] | None:
    """The class names in order, which CLIP benchmark's tars have beside them."""
    path = folder and folder / "classnames.txt"
    return [line for line in read_text(path).splitlines() if line.strip()] if path and path.is_file() else None


def _labels(values: Sequence[Any], where: str, classes: ClassIndex) -> tuple[np.ndarray, bool]:
    """Labels (N,), from numbers or from class names, and whether they are from names."""
    missing = next((row for row, value in enumerate(values) if value is None or value != value), None)
    if missing is not None:
        raise InputError(f"{where} has no label in row {missing}; give it one, or remove the row")
    if values and all(isinstance(value, str) for value in values):
        known = {name: classes.label(name, where) for name in dict.fromkeys(values)}
        return np.array([known[value] for value in values], dtype=np.int64), True
    for value in values:
        if not isinstance(value, int | float) or not abs(value) < 2**31 or value != int(value):
            raise InputError(f"{where} has a label {str(value)[:80]!r}; labels are numbers from 0, or class names")
    return np.array(values, dtype=np.int64), False
