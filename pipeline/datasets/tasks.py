"""Tasks: the sources of images, labels, class names and prompts."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec.structs
import numpy as np
from PIL import Image

from probsurgery.pipeline.config import SPLITS
from probsurgery.pipeline.datasets.layouts import (
    ClassIndex,
    Listing,
    class_files,
    find_layout,
    folders,
    holds_classes,
    holds_images_below,
    known_layouts,
    listed,
    same_spelling,
    split_root,
    unlabelled,
)
from probsurgery.pipeline.datasets.pictures import DECODING
from probsurgery.pipeline.datasets.tables import HubDataset, TableSource, class_names, has_table, open_table
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.files import Record
from probsurgery.pipeline.mini import mini_task


class DataSource(Record, frozen=True, rename={"place": "data"}):
    """Where the images of one split are."""

    place: str
    """A folder or a table's file, `hf:owner/name[:config]`, or `mini:<task>` for images of installed packages."""
    split: str = ""
    """What a data set in a table calls the split; empty: as we do."""
    image: str = ""
    label: str = ""
    """A table's columns; empty: those with a usual name."""

    def table(self, split: str) -> TableSource:
        """The source as a table. Of the Hub, or at its path."""
        kind, _, rest = self.place.partition(":")
        repo, _, config = rest.partition(":")
        hub = HubDataset(repo, {}, self.image, self.label, config or None)
        if kind == "hf":
            return TableSource(hub, self.split or split)
        own = HubDataset(Path(self.place).name, {}, self.image, self.label)
        return TableSource(own, self.split or split, Path(self.place), is_exact=True)


class Task(Record, frozen=True, rename={"class_names": "classes", "hub": "dataset"}):
    """One classification task. A suite's file has a table of these keys for each."""

    name: str
    class_names: tuple[str, ...] = ()
    """Empty: those of the images' source, in its order, for folders by name."""
    title: str = ""
    """Name in tables, and in file names of the task-vectors code's checkpoints."""
    templates: tuple[str, ...] = ()
    """Prompts of the zero-shot classifier; `{}` stands for the class name."""
    classifier: str | bool | None = None
    """A file with the classifier's weight (C, d) and perhaps a bias (C,), instead of `templates`; False: none."""
    normalise: bool | None = None
    """Whether that classifier takes L2-normalised features, as zero-shot ones do; None: it does."""
    expert: str | None = None
    """The expert's checkpoint: a file or folder, or `hf:owner/name`."""
    expert_suffix: str = ""
    """The task's part of the name of its published expert."""
    test: DataSource | None = None
    train: DataSource | None = None
    hub: HubDataset | None = None
    """The published data set of both splits, for which `--data` may have a copy."""
    layout: Literal["", "sun397", "cars", "resisc45", "svhn", "gtsrb", "mnist", "dtd"] = ""
    """One of `layouts.LAYOUTS` that a copy may have."""
    folders: tuple[str, ...] = ()
    """Names that a copy's folder may have, besides the task's and the data set's."""
    labels: bool = True
    """Whether the images have labels; without them there is no accuracy."""
    rows: Mapping[str, tuple[int, ...]] = {}
    """Number of images of the papers' splits, where known. SUN397's test split exists in two sizes."""
    aliases: tuple[str, ...] = ()
    """The data set's own class names, where they differ from ours by more than case and separators."""

    def source(self, split: str) -> DataSource | None:
        """Where the images of a split are, if the suite names a place of their own."""
        return self.test if split == "test" else self.train

    def place(self, split: str) -> str:
        """Where the images of a split are, for people."""
        given = self.source(split)
        return given.place if given else self.hub.id if self.hub else ""

    @property
    def index(self) -> ClassIndex:
        """Class names to labels."""
        return ClassIndex(self.name, self.class_names, self.aliases, prefixed=self.layout == "sun397")


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

    @property
    def has_labels(self) -> bool:
        """Whether the labels are known; they are -1 otherwise."""
        return bool((self.labels >= 0).any())


def open_images(
    task: Task, split: str, source: str | None = None, limit: int | None = None, *, any_rows: bool = False
) -> Images:
    """Open one split of a task: where its suite says, or in a folder with copies of published data sets, `source`.

    Raises `InputError` if the data are missing, have another number of rows than the papers' (unless `any_rows`),
    contain labels outside the task's classes, or list the classes in another order.
    """
    images = _open(task, split, source)
    published = task.rows.get(split)
    if published and len(images) not in published and not any_rows:
        expected = " or ".join(f"{rows:,}" for rows in published)
        raise InputError(
            f"{task.name} ({split}) has {len(images):,} images, and not {expected} as its suite states; complete the "
            "data set, or accept it with --any-rows"
        )
    if limit is not None and limit < len(images):
        digest = hashlib.sha256(f"{images.fingerprint} first {limit}".encode()).hexdigest()
        images = replace(images, labels=images.labels[:limit], fingerprint=digest)
    if not len(images):
        raise InputError(f"task {task.name} ({split}) has no rows in {images.source}")
    low, high, classes = images.labels.min(), images.labels.max(), len(task.class_names)
    if task.labels and (low < 0 or high >= classes):
        raise InputError(f"task {task.name} ({split}) has labels from {low} to {high}, but {classes} classes")
    return images


def with_classes(task: Task) -> Task:
    """The task with its class names, read from its images' source if its suite does not list them.

    Raises `InputError` if the source has none.
    """
    if task.class_names or not task.labels:
        return task
    found = [found for split in SPLITS if (found := _listed_classes(task, split)) is not None]
    ordered = max((names for names, is_ordered in found if is_ordered), key=len, default=())
    names = tuple(ordered) or tuple(sorted({name for names, _ in found for name in names}))
    if not names:
        raise InputError(f"task {task.name} has no class names; list them as `classes`, or set `labels = false`")
    for one, other in same_spelling(names):
        if not any({one, other} <= set(listed) for listed, _ in found):
            both = f"{one!r} and {other!r}, in different splits"
            raise InputError(f"task {task.name} has classes {both}; give them one name, or list `classes`")
    return msgspec.structs.replace(task, class_names=names)


def _listed_classes(task: Task, split: str) -> tuple[Sequence[str], bool] | None:
    """The classes of a split's source, and whether their order is that of the labels; None without a source."""
    given = task.source(split)
    if given is None:
        return class_names(TableSource(task.hub, task.hub.split[split]), task.name) if task.hub else None
    kind, _, rest = given.place.partition(":")
    if kind == "mini":
        return mini_task(rest).class_names, True
    if kind != "hf" and (base := _class_root(task, split, given)):
        return [folder.name for folder in folders(base)], False
    return class_names(given.table(split), task.name)


def _open(task: Task, split: str, copies: str | None) -> Images:
    given = task.source(split)
    if given is None and task.hub is None:
        raise InputError(f"task {task.name} names no {split} images; add `{split} = ...` to its table in the suite")
    is_published = given is None or given.place.startswith("hf:")
    hub = given.table(split).hub if given else task.hub
    if copies is not None and is_published and hub is not None:
        return _open_copy(task, split, Path(copies), hub)
    if copies is not None:
        raise InputError(f"--data is not for {task.name}, whose suite says where its images are; leave it out")
    if given is None:
        assert task.hub is not None
        return _open_table(task, split, TableSource(task.hub, task.hub.split[split]))
    if given.place.startswith("mini:"):
        return _open_mini(task, split, given.place.removeprefix("mini:"))
    return _open_table(task, split, given.table(split)) if is_published else _open_path(task, split, given)


def _open_mini(task: Task, split: str, name: str) -> Images:
    from probsurgery.pipeline.mini import load

    entry = mini_task(name)
    task.index.check_order(entry.class_names, f"mini:{name}")
    images, labels = load(name, split)
    return Images(labels, entry.digests[split], images.__getitem__)  # `load` compared the digest


def _open_path(task: Task, split: str, given: DataSource) -> Images:
    """The images in a folder or a table's file that the suite names."""
    path = Path(given.place)
    if base := _class_root(task, split, given):
        return _listed_images(task, split, path, class_files(folders(base), task.index))
    if path.is_file() or has_table(path):
        return _open_table(task, split, given.table(split))
    return _listed_images(task, split, path, unlabelled(split_root(path, given.split or split)))


def _class_root(task: Task, split: str, given: DataSource) -> Path | None:
    """The folder of class folders in what a suite names for a split; None for a table and for images without labels."""
    path = Path(given.place)
    if not path.exists():
        raise InputError(f"task {task.name}: {split} names {path}, which does not exist")
    if path.is_file() and given.split:
        raise InputError(f"task {task.name}: {path} is one file, which has no splits; leave `split` out")
    if path.is_file():
        return None
    base = split_root(path, given.split or split)
    if given.split and base == path and not has_table(path):
        raise InputError(f"task {task.name}: {path} has no folder of the split {given.split!r}")
    if not task.labels or not holds_images_below(base):
        if task.labels and not has_table(path):
            raise InputError(
                f"{path} has neither class folders with images nor a table; it holds: {_first_names(path)}; images "
                f"without labels need `labels = false` in the table of {task.name}"
            )
        return None
    if given.image or given.label:
        raise InputError(f"task {task.name}: {path} holds class folders, which have no columns; leave them out")
    if not task.class_names and not holds_classes(base):
        inner = ", ".join(folder.name for folder in folders(base)[:4])
        raise InputError(
            f"task {task.name}: the images in {path} are all two folders down (in {inner}); name the folder whose "
            "folders are classes, or list `classes`"
        )
    return base


def _open_copy(task: Task, split: str, source: Path, hub: HubDataset) -> Images:
    """A published data set's copy in a folder of data sets."""
    archive = task.layout or None
    places = _data_folders(task, hub.id, source)
    for folder in places:
        listing = find_layout(archive, split, folder, task.index)
        if listing is not None:
            return _listed_images(task, split, folder, listing)
        if has_table(folder):
            return _open_table(task, split, TableSource(hub, hub.split.get(split, split), folder))
    raise InputError(
        f"{places[0]} has no known layout of {task.name} ({split}); known are: {known_layouts(archive)}; "
        f"found: {_first_names(places[0])}"
    )


def _listed_images(task: Task, split: str, folder: Path, listing: Listing) -> Images:
    listing = replace(listing, root=folder.parent)
    files = [path.relative_to(folder).as_posix() for path in listing.files]
    fingerprint = _data_fingerprint([task.name, split, files], listing.labels, listing.encoded)
    origin = f"folder {folder.name}"
    in_files = listing.pixels is None
    return Images(listing.labels, fingerprint, listing.decode, origin, decoding=DECODING, from_files=in_files)


def _first_names(folder: Path) -> str:
    return ", ".join(path.name for path in listed(folder)[:8]) or "nothing"


def _data_folders(task: Task, repo: str, source: Path) -> list[Path]:
    """Folders in a folder of data sets that may hold a task's data."""
    if not source.is_dir():
        raise InputError(f"no folder {source}; --data takes a folder with a folder for each task")
    names = dict.fromkeys(filter(None, (task.name, task.title, repo.split("/")[-1], repo, *task.folders)))
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
        with suppress(OSError):  # decoding the image will say so
            digest.update(encoded(row))
    return digest.hexdigest()


def _open_table(task: Task, split: str, source: TableSource) -> Images:
    table = open_table(source, task.index, labelled=task.labels)
    origin = [source.hub.id, source.hub.config, split, table.names, *table.paths]
    fingerprint = _data_fingerprint(origin, table.labels, table.encoded)
    return Images(table.labels, fingerprint, table.decode, table.source, table.class_order, DECODING)
