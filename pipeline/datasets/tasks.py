"""Tasks: the sources of images, labels, class names and prompts."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from probsurgery.pipeline.datasets.layouts import ClassIndex, find_layout, folder_of, known_layouts, listed
from probsurgery.pipeline.datasets.pictures import DECODING
from probsurgery.pipeline.datasets.tables import HubDataset, has_table, open_table
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.files import Record


class Task(Record, frozen=True, rename={"class_names": "classes", "hub": "dataset"}):
    """One classification task."""

    name: str
    class_names: tuple[str, ...]
    reader: str = ""
    """`mini`: the images come from installed packages; otherwise from a published data set or a folder."""
    title: str = ""
    """Name in the papers' tables, and in file names of the task-vectors code's checkpoints."""
    templates: tuple[str, ...] = ()
    """Prompts of the zero-shot classifier; `{}` stands for the class name."""
    expert_suffix: str = ""
    """The task's part of the name of its published expert."""
    hub: HubDataset | None = None
    rows: Mapping[str, tuple[int, ...]] = {}
    """Number of images of the papers' splits, where known. SUN397's test split exists in two sizes."""
    aliases: tuple[str, ...] = ()
    """The data set's own class names, where they differ from ours by more than case and separators."""

    @property
    def published(self) -> HubDataset:
        """The data set of the Hub, of a task that has one."""
        assert self.hub is not None, f"{self.name} is in the package"
        return self.hub


@dataclass(frozen=True)
class Images:
    """One opened split of a task: N images, decoded on request, and their labels (N,)."""

    labels: np.ndarray
    fingerprint: str
    """Digest of labels and images (of a sample of the images, except in the mini suite)."""
    decode: Callable[[int], Image.Image]
    """Decodes the image of a row."""
    source: str = "packages"
    """A data set of the Hub, a folder, or the packages of the mini suite."""
    class_order: str = "by name"
    """Whether the source's order of class names was checked against ours."""
    decoding: int = 0
    """Version of `pictures` that decodes them; 0 for the mini suite's, which are compared pixel by pixel."""
    from_files: bool = True
    """Whether the images are files, whose pixels depend on how they are decoded."""

    def __len__(self) -> int:
        return len(self.labels)


def open_images(
    task: Task, split: str, source: str | None = None, limit: int | None = None, *, any_rows: bool = False
) -> Images:
    """Open one split of a task, from the published data set or from a folder of data sets, `source`.

    Raises `InputError` if the data are missing, have another number of rows than the papers' (unless `any_rows`),
    contain labels outside the task's classes, or list the classes in another order.
    """
    images = _open_mini(task, split, source) if task.reader == "mini" else _open_data(task, split, source)
    published = task.rows.get(split)
    if published and len(images) not in published and not any_rows:
        expected = " or ".join(f"{rows:,}" for rows in published)
        raise InputError(
            f"{task.name} ({split}) has {len(images):,} images, but the papers' has {expected}; complete the data set, "
            "or accept it with --any-rows"
        )
    if limit is not None and limit < len(images):
        digest = hashlib.sha256(f"{images.fingerprint} first {limit}".encode()).hexdigest()
        images = replace(images, labels=images.labels[:limit], fingerprint=digest)
    if not len(images):
        raise InputError(f"task {task.name} ({split}) has no rows in {images.source}")
    low, high, classes = images.labels.min(), images.labels.max(), len(task.class_names)
    if low < 0 or high >= classes:
        raise InputError(f"task {task.name} ({split}) has labels from {low} to {high}, but {classes} classes")
    return images


def _open_mini(task: Task, split: str, source: str | None) -> Images:
    from probsurgery.pipeline.mini import MINI_TASKS, load

    if source is not None:
        raise InputError(f"--data is not for {task.name}, whose images come from installed packages; leave it out")
    images, labels = load(task.name, split)
    return Images(labels, MINI_TASKS[task.name].digests[split], images.__getitem__)  # `load` compared the digest


def _open_data(task: Task, split: str, source: str | None) -> Images:
    classes = ClassIndex(task.name, task.class_names, task.aliases)
    if source is None:
        return _open_table(task, split, None, classes)
    folders = _data_folders(task, Path(source))
    for folder in folders:
        listing = find_layout(task.name, split, folder, classes)
        if listing is not None:
            files = [path.relative_to(folder).as_posix() for path in listing.files]
            fingerprint = _data_fingerprint([task.name, split, files], listing.labels, listing.encoded)
            return Images(
                listing.labels,
                fingerprint,
                listing.decode,
                f"folder {folder.name}",
                decoding=DECODING,
                from_files=listing.pixels is None,
            )
        if has_table(folder):
            return _open_table(task, split, folder, classes)
    raise InputError(
        f"{folders[0]} has no known layout of {task.name} ({split}); known are: {known_layouts(task.name)}; "
        f"found: {_first_names(folders[0])}"
    )


def _first_names(folder: Path) -> str:
    return ", ".join(path.name for path in listed(folder)[:8]) or "nothing"


def _data_folders(task: Task, source: Path) -> list[Path]:
    """Folders in a folder of data sets that may hold a task's data."""
    if not source.is_dir():
        raise InputError(f"no folder {source}; --data takes a folder with a folder for each task")
    repo = task.published.id
    names = dict.fromkeys((task.name, task.title, repo.split("/")[-1], repo, *folder_of(task.name).names))
    folders = [source / name for name in names if (source / name).is_dir()]
    if not folders or (folders == [source / "."] and not listed(source, "*_32x32.mat")):
        raise InputError(
            f"{source} has no folder of {task.name}; it may be called: {', '.join(n for n in names if n != '.')}; "
            f"the folder holds: {_first_names(source)}"
        )
    return folders


def _data_fingerprint(origin: list[Any], labels: np.ndarray, encoded: Callable[[int], bytes]) -> str:
    """Digest of the origin, all labels and at most 128 encoded images: reading all takes as long as the extraction."""
    digest = hashlib.sha256(json.dumps(origin).encode() + labels.tobytes())
    for row in range(0, len(labels), max(1, len(labels) // 64)):
        digest.update(encoded(row))
    return digest.hexdigest()


def _open_table(task: Task, split: str, folder: Path | None, classes: ClassIndex) -> Images:
    table = open_table(task.name, task.published, split, folder, classes)
    origin = [task.published.id, task.published.config, split, table.names]
    fingerprint = _data_fingerprint(origin, table.labels, table.encoded)
    return Images(table.labels, fingerprint, table.decode, table.source, table.class_order, DECODING)
